/* A panel with AVX2, without VNNI: 8 rows at a time in the 8 lanes of a register.
 *
 * `vpmaddubsw` saturates at 16 bits, so digits are shifted down first: a pair of products is at
 * most 3810 (int4), 762 (int2) or 508 (trit5), and 4 lines of int4 or 8 of the others are summed in
 * 16 bits before they are widened. int8 has no such room: it is multiplied as a signed weight, its
 * magnitude by the activation with its sign, at most 2 * 128 * 127 = 32512.
 */
#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#include "activations.h"

#define WIDE __attribute__((target("avx2,fma,f16c")))
#define PART static inline __attribute__((always_inline)) WIDE

/* Bytes from a line to the one that is fetched ahead of it; rows at a time. */
enum { AHEAD = 3072, HALF = UC_ROWS / 2 };

static WIDE void uc_convert_avx2(enum uc_dtype dtype, const uint8_t *from, size_t count,
                                 float *restrict to) {
    if (dtype == UC_FLOAT32) {
        memcpy(to, from, 4 * count);
    } else if (dtype == UC_BFLOAT16) {
        uc_from_bfloat16(from, count, to);
    } else {
        size_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i,
                             _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * i))));
        for (; i < count; i++) {
            uint16_t half;
            memcpy(&half, from + 2 * i, 2);
            to[i] = _cvtsh_ss(half);
        }
    }
}

static WIDE void uc_store_avx2(enum uc_dtype dtype, const float *from, size_t count,
                               uint8_t *restrict to) {
    if (dtype == UC_FLOAT32) {
        memcpy(to, from, 4 * count);
    } else if (dtype == UC_BFLOAT16) {
        uc_to_bfloat16(from, count, to);
    } else {
        for (size_t i = 0; i < count; i++) {
            uint16_t half = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
            memcpy(to + 2 * i, &half, 2);
        }
    }
}

static WIDE void uc_quantize_avx2(const float *from, size_t count, int8_t *restrict codes,
                                  float *scale, int32_t *sum) {
    uc_quantize_body(from, count, codes, scale, sum);
}

PART __m256 scales_at(enum uc_dtype dtype, const uint8_t *scales, size_t row) {
    const uint8_t *at = scales + row * uc_bytes_of(dtype);
    if (dtype == UC_FLOAT32)
        return _mm256_loadu_ps((const float *)(const void *)at);
    __m128i half = _mm_loadu_si128((const __m128i *)at);
    if (dtype == UC_FLOAT16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

PART __m256i offsets_at(const uint8_t *offsets, size_t row) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(offsets + row)));
}

/* The panel before this one fetched its scales and so much less of this one's lines. */
PART void fetch_hole(const struct uc_layout *layout, const uint8_t *panel) {
    const size_t tail = layout->panel_bytes - UC_LINE * layout->panel_lines;
    for (size_t at = tail < AHEAD ? AHEAD - tail : 0; at < AHEAD; at += UC_LINE)
        _mm_prefetch((const char *)panel + at, _MM_HINT_T0);
}

/* Four activations in every lane. */
PART __m256i four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm256_set1_epi32(word);
}

/* The digits of half a line, shifted down. */
PART void digits_of(enum uc_kind kind, __m256i line, __m256i digits[5]) {
    const __m256i mask = _mm256_set1_epi8((char)((1 << 8 / uc_digits(kind)) - 1));
    if (kind == UC_INT8) {
        digits[0] = line;
    } else if (kind == UC_INT4) {
        digits[0] = _mm256_and_si256(line, mask);
        digits[1] = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
    } else if (kind == UC_INT2) {
        digits[0] = _mm256_and_si256(line, mask);
        digits[1] = _mm256_and_si256(_mm256_srli_epi16(line, 2), mask);
        digits[2] = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
        digits[3] = _mm256_and_si256(_mm256_srli_epi16(line, 6), mask);
    } else {
        /* 3 q / 256, rounded down, is 1 from 86 on and 2 from 171 on. */
        const __m256i low = _mm256_set1_epi8(85), high = _mm256_set1_epi8((char)170);
        const __m256i one = _mm256_set1_epi8(1);
#pragma GCC unroll 5
        for (int i = 0; i < 5; i++) {
            digits[i] = _mm256_add_epi8(_mm256_min_epu8(_mm256_subs_epu8(line, low), one),
                                        _mm256_min_epu8(_mm256_subs_epu8(line, high), one));
            line = _mm256_add_epi8(_mm256_add_epi8(line, line), line);
        }
    }
}

/* sum[t] = the sum of x * u over half a span; of x * (u - 128) for int8. */
PART void sums_of(enum uc_kind kind, const size_t count, const uint8_t *lines, size_t size,
                  const int8_t *x, size_t tokens, __m256i *sum) {
    const size_t turn = uc_digits(kind), most = kind == UC_INT8 ? 1 : kind == UC_INT4 ? 4 : 8;
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
        sum[t] = _mm256_setzero_si256();
    while (size) {
        const size_t some = size < most ? size : most;
        __m256i narrow[4];
#pragma GCC unroll 4
        for (size_t t = 0; t < count; t++)
            narrow[t] = _mm256_setzero_si256();
        for (size_t line = 0; line < some; line++, lines += UC_LINE) {
            _mm_prefetch((const char *)lines + AHEAD, _MM_HINT_T0);
            const __m256i bytes = _mm256_loadu_si256((const __m256i *)lines);
            if (kind == UC_INT8) {
                const __m256i weight = _mm256_xor_si256(bytes, _mm256_set1_epi8((char)128));
                const __m256i size_of = _mm256_abs_epi8(weight);
#pragma GCC unroll 4
                for (size_t t = 0; t < count; t++)
                    narrow[t] = _mm256_maddubs_epi16(
                        size_of, _mm256_sign_epi8(four(x + UC_LANE * t), weight));
            } else {
                __m256i digits[5];
                digits_of(kind, bytes, digits);
#pragma GCC unroll 5
                for (size_t i = 0; i < turn; i++)
#pragma GCC unroll 4
                    for (size_t t = 0; t < count; t++)
                        narrow[t] = _mm256_add_epi16(
                            narrow[t],
                            _mm256_maddubs_epi16(digits[i], four(x + UC_LANE * (i * tokens + t))));
            }
            x += UC_LANE * turn * tokens;
        }
#pragma GCC unroll 4
        for (size_t t = 0; t < count; t++)
            sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(narrow[t], ones));
        size -= some;
    }
}

PART void dots(enum uc_kind kind, const size_t count, const struct uc_layout *layout,
               const uint8_t *panel, const struct uc_tokens *tokens, size_t first, float *to) {
    const uint8_t *scales = uc_scales_of(layout, panel), *offsets = uc_offsets_of(layout, panel);
    const size_t wide = UC_ROWS * uc_bytes_of(layout->scale_dtype);
    const __m256i base = _mm256_set1_epi32(kind == UC_INT8 ? 128 : 0);
    __m256 total[2][4];
    fetch_hole(layout, panel);
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
        total[0][t] = total[1][t] = _mm256_setzero_ps();
    for (size_t span = 0; span < layout->spans; span++) {
        const size_t group = span * layout->scale_step, size = uc_lines_of(layout, span);
        const uint8_t *lines = panel + span * layout->span_lines * UC_LINE;
        const int8_t *own =
            tokens->codes + span * layout->span_columns * tokens->count + UC_LANE * first;
        /* The scales lie behind the lines: those of the next panel, long before it begins. */
        _mm_prefetch((const char *)scales + layout->panel_bytes + group * wide, _MM_HINT_T0);
#pragma GCC unroll 2
        for (size_t half = 0; half < 2; half++) {
            const size_t row = group * UC_ROWS + half * HALF;
            __m256i sum[4];
            sums_of(kind, count, lines + half * UC_LINE / 2, size, own, tokens->count, sum);
            const __m256 scale = scales_at(layout->scale_dtype, scales, row);
            __m256i offset =
                layout->symmetric ? _mm256_set1_epi32(uc_offset(kind)) : offsets_at(offsets, row);
            offset = _mm256_sub_epi32(offset, base);
#pragma GCC unroll 4
            for (size_t t = 0; t < count; t++) {
                size_t at = span * tokens->count + first + t;
                __m256i gone = _mm256_mullo_epi32(offset, _mm256_set1_epi32(tokens->sums[at]));
                __m256 dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[t], gone));
                dot = _mm256_mul_ps(_mm256_mul_ps(dot, _mm256_set1_ps(tokens->scales[at])), scale);
                total[half][t] = _mm256_add_ps(total[half][t], dot);
            }
        }
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++) {
        _mm256_storeu_ps(to + (first + t) * UC_ROWS, total[0][t]);
        _mm256_storeu_ps(to + (first + t) * UC_ROWS + HALF, total[1][t]);
    }
}

PART void exact(enum uc_kind kind, const size_t count, const struct uc_layout *layout,
                const uint8_t *panel, const struct uc_tokens *tokens, size_t first, size_t half,
                float *to) {
    const size_t turn = uc_digits(kind), step = UC_LANE * tokens->count;
    const uint8_t *scales = uc_scales_of(layout, panel), *offsets = uc_offsets_of(layout, panel);
    const __m256i byte = _mm256_set1_epi32(255);
    __m256 total[2];
#pragma GCC unroll 2
    for (size_t t = 0; t < count; t++)
        total[t] = _mm256_setzero_ps();
    for (size_t span = 0; span < layout->spans; span++) {
        const size_t group = span * layout->scale_step, size = uc_lines_of(layout, span);
        const size_t row = group * UC_ROWS + half * HALF;
        const uint8_t *lines = panel + span * layout->span_lines * UC_LINE + half * UC_LINE / 2;
        const float *x = tokens->values + span * layout->span_columns * tokens->count + first;
        const __m256 offset = layout->symmetric ? _mm256_set1_ps((float)uc_offset(kind))
                                                : _mm256_cvtepi32_ps(offsets_at(offsets, row));
        __m256 part[2][4];
#pragma GCC unroll 2
        for (size_t t = 0; t < count; t++)
#pragma GCC unroll 4
            for (size_t j = 0; j < 4; j++)
                part[t][j] = _mm256_setzero_ps();
        for (size_t line = 0; line < size; line++, lines += UC_LINE, x += step * turn) {
            _mm_prefetch((const char *)lines + AHEAD, _MM_HINT_T0);
            __m256i digits[5];
            digits_of(kind, _mm256_loadu_si256((const __m256i *)lines), digits);
#pragma GCC unroll 5
            for (size_t i = 0; i < turn; i++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    __m256i value = _mm256_and_si256(_mm256_srli_epi32(digits[i], 8 * j), byte);
                    __m256 weight = _mm256_sub_ps(_mm256_cvtepi32_ps(value), offset);
#pragma GCC unroll 2
                    for (size_t t = 0; t < count; t++)
                        part[t][j] = _mm256_fmadd_ps(
                            weight, _mm256_set1_ps(x[step * i + tokens->count * (size_t)j + t]),
                            part[t][j]);
                }
        }
        const __m256 scale = scales_at(layout->scale_dtype, scales, row);
#pragma GCC unroll 2
        for (size_t t = 0; t < count; t++) {
            __m256 sum = _mm256_add_ps(_mm256_add_ps(part[t][0], part[t][1]),
                                       _mm256_add_ps(part[t][2], part[t][3]));
            total[t] = _mm256_add_ps(total[t], _mm256_mul_ps(sum, scale));
        }
    }
#pragma GCC unroll 2
    for (size_t t = 0; t < count; t++)
        _mm256_storeu_ps(to + (first + t) * UC_ROWS + half * HALF, total[t]);
}

/* Both products of a kind, in blocks of as many tokens as registers hold. */
#define KIND(name, kind)                                                                           \
    static WIDE void uc_dots_##name##_avx2(const struct uc_layout *layout, const uint8_t *panel,   \
                                           const struct uc_tokens *tokens, float *restrict to) {   \
        size_t t = 0;                                                                              \
        for (; tokens->count - t >= 4; t += 4)                                                     \
            dots(kind, 4, layout, panel, tokens, t, to);                                           \
        for (; t < tokens->count; t++)                                                             \
            dots(kind, 1, layout, panel, tokens, t, to);                                           \
    }                                                                                              \
    static WIDE void uc_exact_##name##_avx2(const struct uc_layout *layout, const uint8_t *panel,  \
                                            const struct uc_tokens *tokens, float *restrict to) {  \
        for (size_t half = 0; half < 2; half++) {                                                  \
            size_t t = 0;                                                                          \
            for (; tokens->count - t >= 2; t += 2)                                                 \
                exact(kind, 2, layout, panel, tokens, t, half, to);                                \
            if (t < tokens->count)                                                                 \
                exact(kind, 1, layout, panel, tokens, t, half, to);                                \
        }                                                                                          \
    }

KIND(int8, UC_INT8)
KIND(int4, UC_INT4)
KIND(int2, UC_INT2)
KIND(trit5, UC_TRIT5)

static int usable(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && uc_has_f16c();
}

const struct uc_isa uc_isa_avx2 = {
    .name = "avx2",
    .usable = usable,
    .convert = uc_convert_avx2,
    .store = uc_store_avx2,
    .quantize = uc_quantize_avx2,
    .dots = {uc_dots_int8_avx2, uc_dots_int4_avx2, uc_dots_int2_avx2, uc_dots_trit5_avx2},
    .exact = {uc_exact_int8_avx2, uc_exact_int4_avx2, uc_exact_int2_avx2, uc_exact_trit5_avx2},
};

#endif
