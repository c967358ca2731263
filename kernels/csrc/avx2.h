/* What panels and tiles of AVX2 share: products of bytes, summed in 16 bits. */
#ifndef UC_AVX2_H
#define UC_AVX2_H

#include <immintrin.h>
#include <string.h>

#include "layout.h"

#define WIDE __attribute__((target("avx2,fma,f16c")))
#define PART static inline __attribute__((always_inline)) WIDE

enum { HALF = UC_ROWS / 2, HALVES = 2 };

/* How many times `digits` digits of a kind, four columns each, can be summed before 16 bits could
 * overflow. `vpmaddubsw` adds pairs of products. int8 has no such room: once. */
PART size_t narrow_lines(enum uc_kind kind, size_t digits) {
    const int32_t greatest = kind == UC_INT4 ? 15 : kind == UC_INT2 ? 3 : 2;
    const size_t lines = INT16_MAX / (2 * greatest * uc_most(kind)) / digits;
    return kind == UC_INT8 ? 1 : lines;
}

PART void fetch(const uint8_t *at) {
    _mm_prefetch((const char *)at, _MM_HINT_T0);
}

/* Four bytes in every lane. */
PART __m256i four(const void *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm256_set1_epi32(word);
}

/* sum + digits * x. Spelt out: GCC would make all products before it adds one, and spill sums. */
PART __m256i dot(__m256i sum, __m256i digits, __m256i x) {
    __m256i product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
            : "+x"(sum), "=&x"(product)
            : "x"(digits), "x"(x));
    return sum;
}

#endif
