/* Tiles with AVX-512 VNNI: 16 sums of two panels by eight tokens, in registers over a span. */
#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define PART static inline __attribute__((always_inline)) WIDE

/* sum + digits * x, four bytes a lane. Spelt out: GCC copies the sum of its builtin around. */
PART __m512i dot(__m512i sum, __m512i unsigned_, __m512i signed_) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_), "v"(signed_));
    return sum;
}

/* Bytes of activations between what is read and what is fetched: they come from the second cache or
 * the third. */
enum { AHEAD = 512 };

PART void fetch(const uint8_t *at) {
    _mm_prefetch((const char *)at, _MM_HINT_T0);
}

/* Four bytes in every lane. */
PART __m512i four(const uint8_t *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}

WIDE int32_t uc_lay_avx512vnni(const int8_t *codes, size_t pairs, int32_t most, size_t step,
                               uint8_t *to) {
    /* Even words are first ones: + most; odd ones - (128 - most). */
    const uint64_t up = 0x01010101u * (uint64_t)most;
    const uint64_t down = 0x01010101u * (uint64_t)(uint8_t)(most - 128);
    const __m512i change = _mm512_set1_epi64((int64_t)(up | down << 32));
    const __m512i low = _mm512_set1_epi64(0xffffffff);
    __m512i sum = _mm512_setzero_si512();
    size_t pair = 0;
    for (; pair < pairs; pair += 8) {
        const size_t some = pairs - pair < 8 ? pairs - pair : 8;
        const __mmask8 there = (__mmask8)((1u << some) - 1);
        __m512i bytes =
            _mm512_add_epi8(_mm512_maskz_loadu_epi64(there, codes + UC_PAIR * pair), change);
        bytes = _mm512_maskz_mov_epi64(there, bytes);
        sum = dot(sum, _mm512_and_si512(bytes, low), _mm512_srli_epi64(bytes, 32));
        uint64_t words[8];
        _mm512_storeu_si512(words, bytes);
        for (size_t i = 0; i < some; i++, to += step)
            memcpy(to, words + i, sizeof *words);
    }
    return _mm512_reduce_add_epi32(sum) + (int32_t)pairs * UC_LANE * most * (128 - most);
}

PART void tile_of(const size_t count, const struct uc_layout *layout, const struct uc_slab *slab,
                  size_t first, size_t spans, const struct uc_tile *tile, float *restrict totals) {
    const uint8_t *digits = slab->digits[0][0][0], *x = tile->codes, *next = tile->next[0];
    const ptrdiff_t far = tile->next[1] - next;
    for (size_t span = 0; span < spans; span++) {
        const size_t pairs = uc_pairs_of(layout, first + span);
        __m512i sum[UC_TILE][UC_SIDES];
#pragma GCC unroll 2
        for (size_t side = 0; side < UC_SIDES; side++) {
            const __m512i taken = _mm512_loadu_si512(slab->taken[span][side]);
#pragma GCC unroll 8
            for (size_t t = 0; t < count; t++)
                sum[t][side] =
                    _mm512_add_epi32(taken, _mm512_set1_epi32(tile->starts[span * count + t]));
        }
        if (!layout->symmetric) {
#pragma GCC unroll 2
            for (size_t side = 0; side < UC_SIDES; side++) {
                const __m512i offsets = _mm512_loadu_si512(slab->offsets[span][side]);
#pragma GCC unroll 8
                for (size_t t = 0; t < count; t++) {
                    const __m512i owed = _mm512_set1_epi32(tile->owed[span * count + t]);
                    sum[t][side] =
                        _mm512_add_epi32(sum[t][side], _mm512_mullo_epi32(offsets, owed));
                }
            }
        }
        for (size_t pair = 0; pair < pairs; pair++) {
            fetch(x + AHEAD);
            fetch(next);
            fetch(next + far);
            next += tile->next_step;
            __m512i digit[UC_SIDES][2];
#pragma GCC unroll 2
            for (size_t side = 0; side < UC_SIDES; side++) {
                digit[side][0] = _mm512_load_si512(digits + 2 * UC_LINE * side);
                digit[side][1] = _mm512_load_si512(digits + 2 * UC_LINE * side + UC_LINE);
            }
#pragma GCC unroll 8
            for (size_t t = 0; t < count; t++) {
                const __m512i one = four(x + UC_PAIR * t), two = four(x + UC_PAIR * t + UC_LANE);
#pragma GCC unroll 2
                for (size_t side = 0; side < UC_SIDES; side++)
                    sum[t][side] = dot(sum[t][side], _mm512_add_epi8(one, digit[side][1]),
                                       _mm512_add_epi8(two, digit[side][0]));
            }
            x += UC_PAIR * count;
            digits += UC_SIDES * 2 * UC_LINE;
        }
        const __m512 scale[] = {_mm512_loadu_ps(slab->scales[span][0]),
                                _mm512_loadu_ps(slab->scales[span][1])};
#pragma GCC unroll 8
        for (size_t t = 0; t < count; t++) {
            const __m512 one = _mm512_set1_ps(tile->scales[span * count + t]);
#pragma GCC unroll 2
            for (size_t side = 0; side < UC_SIDES; side++) {
                float *total = totals + (t * UC_SIDES + side) * UC_ROWS;
                __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t][side]), one);
                product = _mm512_mul_ps(product, scale[side]);
                _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), product));
            }
            /* GCC 12 would work all products out before it adds one, and spill them. */
            __asm__ volatile("" ::: "memory");
        }
    }
}

WIDE void uc_tile_avx512vnni(const struct uc_layout *layout, const struct uc_slab *slab,
                             size_t first, size_t spans, const struct uc_tile *tile,
                             float *restrict totals) {
#define CASE(count)                                                                                \
    case count:                                                                                    \
        tile_of(count, layout, slab, first, spans, tile, totals);                                  \
        break
    switch (tile->count) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
    default:
        tile_of(UC_TILE, layout, slab, first, spans, tile, totals);
    }
#undef CASE
}

#endif
