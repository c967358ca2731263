/* A panel with AVX-512 VNNI: the 16 rows are the 16 lanes of a register, one load a line.
 *
 * `vpdpbusd` multiplies the 64 unsigned digits of a line with four activations that are broadcast
 * to all lanes, so nothing is ever summed across lanes. Digits need not be shifted down where there
 * are accumulators enough: masked in place they count 16 or 64 times, and one shift a span takes it
 * back.
 */
#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#include "activations.h"

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define PART static inline __attribute__((always_inline)) WIDE

/* Bytes from a line to the one that is fetched ahead of it. */
enum { AHEAD = 3072 };

static WIDE void uc_convert_avx512vnni(enum uc_dtype dtype, const uint8_t *from, size_t count,
                                       float *restrict to) {
    if (dtype == UC_FLOAT32) {
        memcpy(to, from, 4 * count);
    } else if (dtype == UC_BFLOAT16) {
        uc_from_bfloat16(from, count, to);
    } else {
        for (size_t i = 0; i < count; i += 16) {
            __mmask16 some = (__mmask16)(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff);
            __m256i half = _mm256_maskz_loadu_epi16(some, from + 2 * i);
            _mm512_mask_storeu_ps(to + i, some, _mm512_cvtph_ps(half));
        }
    }
}

static WIDE void uc_store_avx512vnni(enum uc_dtype dtype, const float *from, size_t count,
                                     uint8_t *restrict to) {
    if (dtype == UC_FLOAT32) {
        memcpy(to, from, 4 * count);
    } else if (dtype == UC_BFLOAT16) {
        uc_to_bfloat16(from, count, to);
    } else {
        for (size_t i = 0; i < count; i += 16) {
            __mmask16 some = (__mmask16)(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff);
            __m512 value = _mm512_maskz_loadu_ps(some, from + i);
            _mm256_mask_storeu_epi16(to + 2 * i, some,
                                     _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
        }
    }
}

static WIDE void uc_quantize_avx512vnni(const float *from, size_t count, int8_t *restrict codes,
                                        float *scale, int32_t *sum) {
    uc_quantize_body(from, count, codes, scale, sum);
}

/* The 16 scales of a group. */
PART __m512 scales_at(enum uc_dtype dtype, const uint8_t *scales, size_t group) {
    const uint8_t *at = scales + group * UC_ROWS * uc_bytes_of(dtype);
    if (dtype == UC_FLOAT32)
        return _mm512_loadu_ps(at);
    __m256i half = _mm256_loadu_si256((const __m256i *)at);
    if (dtype == UC_FLOAT16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

PART __m512i offsets_at(const uint8_t *offsets, size_t group) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(offsets + group * UC_ROWS)));
}

/* The panel before this one fetched its scales and so much less of this one's lines. */
PART void fetch_hole(const struct uc_layout *layout, const uint8_t *panel) {
    const size_t tail = layout->panel_bytes - UC_LINE * layout->panel_lines;
    for (size_t at = tail < AHEAD ? AHEAD - tail : 0; at < AHEAD; at += UC_LINE)
        _mm_prefetch((const char *)panel + at, _MM_HINT_T0);
}

/* Four activations in every lane. */
PART __m512i four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}

PART __m512i triple(__m512i bytes) {
    return _mm512_add_epi8(_mm512_add_epi8(bytes, bytes), bytes);
}

/* The digits of a line, shifted down. */
PART void digits_of(enum uc_kind kind, __m512i line, __m512i digits[5]) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << 8 / uc_digits(kind)) - 1));
    if (kind == UC_INT8) {
        digits[0] = line;
    } else if (kind == UC_INT4) {
        digits[0] = _mm512_and_si512(line, mask);
        digits[1] = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
    } else if (kind == UC_INT2) {
        digits[0] = _mm512_and_si512(line, mask);
        digits[1] = _mm512_and_si512(_mm512_srli_epi16(line, 2), mask);
        digits[2] = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
        digits[3] = _mm512_and_si512(_mm512_srli_epi16(line, 6), mask);
    } else {
        /* 3 q / 256, rounded down, is 1 from 86 on and 2 from 171 on. */
        const __m512i one = _mm512_set1_epi8(1), two = _mm512_set1_epi8(2);
        const __m512i low = _mm512_set1_epi8(85), high = _mm512_set1_epi8((char)170);
#pragma GCC unroll 5
        for (int i = 0; i < 5; i++) {
            digits[i] = _mm512_maskz_mov_epi8(_mm512_cmpgt_epu8_mask(line, low), one);
            digits[i] = _mm512_mask_mov_epi8(digits[i], _mm512_cmpgt_epu8_mask(line, high), two);
            line = triple(line);
        }
    }
}

/* sum[t] = the sum of x * u over a span, for many tokens: digits are made once for all. */
PART void sums_of_many(enum uc_kind kind, const size_t count, const uint8_t *lines, size_t size,
                       const int8_t *x, __m512i *sum) {
    const size_t turn = uc_digits(kind);
#pragma GCC unroll 16
    for (size_t t = 0; t < count; t++)
        sum[t] = _mm512_setzero_si512();
    for (size_t line = 0; line < size; line++, lines += UC_LINE, x += UC_LANE * turn * count) {
        _mm_prefetch((const char *)lines + AHEAD, _MM_HINT_T0);
        __m512i digits[5];
        digits_of(kind, _mm512_loadu_si512(lines), digits);
#pragma GCC unroll 5
        for (size_t i = 0; i < turn; i++)
#pragma GCC unroll 16
            for (size_t t = 0; t < count; t++)
                sum[t] =
                    _mm512_dpbusd_epi32(sum[t], digits[i], four(x + UC_LANE * (i * count + t)));
    }
}

/* One line of what sums_of_few adds up. */
PART void add_line(enum uc_kind kind, const size_t count, const uint8_t *line, const int8_t *x,
                   __m512i now[2][5], __m512i next[2][5]) {
    const size_t turn = uc_digits(kind);
    const int bits = (int)(8 / turn);
    _mm_prefetch((const char *)line + AHEAD, _MM_HINT_T0);
    __m512i bytes = _mm512_loadu_si512(line);
#pragma GCC unroll 5
    for (size_t i = 0; i < turn; i++) {
        __m512i digit = bytes;
        if (kind == UC_INT4 || kind == UC_INT2)
            digit = _mm512_and_si512(
                bytes, _mm512_set1_epi8((char)(((1 << bits) - 1) << ((bits * (int)i) & 7))));
        else if (kind == UC_TRIT5)
            bytes = triple(bytes);
#pragma GCC unroll 2
        for (size_t t = 0; t < count; t++) {
            __m512i own = four(x + UC_LANE * (i * count + t));
            now[t][i] = _mm512_dpbusd_epi32(now[t][i], digit, own);
            if (kind == UC_TRIT5)
                next[t][i] = _mm512_dpbusd_epi32(next[t][i], bytes, own);
        }
    }
}

/* The same for one or two tokens: digits stay where they are, several accumulators a token keep the
 * products of a line, and of two lines, from waiting for each other. */
PART void sums_of_few(enum uc_kind kind, const size_t count, const uint8_t *lines, size_t size,
                      const int8_t *x, __m512i *sum) {
    const size_t turn = uc_digits(kind), step = UC_LANE * turn * count;
    const int bits = (int)(8 / turn);
    __m512i now[2][5], next[2][5]; /* next: the second line's, but for trit5 */
#pragma GCC unroll 2
    for (size_t t = 0; t < count; t++)
#pragma GCC unroll 5
        for (size_t i = 0; i < 5; i++)
            now[t][i] = next[t][i] = _mm512_setzero_si512();
    size_t line = 0;
    for (; line + 2 <= size; line += 2, lines += 2 * UC_LINE, x += 2 * step) {
        add_line(kind, count, lines, x, now, next);
        add_line(kind, count, lines + UC_LINE, x + step, kind == UC_TRIT5 ? now : next, next);
    }
    if (line < size)
        add_line(kind, count, lines, x, now, next);
#pragma GCC unroll 2
    for (size_t t = 0; t < count; t++) {
        if (kind == UC_TRIT5) {
            __m512i all = now[t][0], rest = next[t][0];
#pragma GCC unroll 5
            for (size_t i = 1; i < 5; i++) {
                all = _mm512_add_epi32(all, now[t][i]);
                rest = _mm512_add_epi32(rest, next[t][i]);
            }
            all = _mm512_add_epi32(_mm512_add_epi32(all, all), all);
            sum[t] = _mm512_srai_epi32(_mm512_sub_epi32(all, rest), 8);
        } else {
            sum[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int i = 0; i < (int)turn; i++) {
                __m512i both = _mm512_add_epi32(now[t][i], next[t][i]);
                sum[t] =
                    _mm512_add_epi32(sum[t], _mm512_srai_epi32(both, (unsigned)(bits * i) & 7));
            }
        }
    }
}

PART void dots(enum uc_kind kind, const size_t count, const struct uc_layout *layout,
               const uint8_t *panel, const struct uc_tokens *tokens, float *to) {
    const uint8_t *scales = uc_scales_of(layout, panel), *offsets = uc_offsets_of(layout, panel);
    const size_t wide = UC_ROWS * uc_bytes_of(layout->scale_dtype);
    __m512 total[UC_TOKENS];
    fetch_hole(layout, panel);
#pragma GCC unroll 16
    for (size_t t = 0; t < count; t++)
        total[t] = _mm512_setzero_ps();
    for (size_t span = 0; span < layout->spans; span++) {
        const size_t group = span * layout->scale_step;
        const uint8_t *lines = panel + span * layout->span_lines * UC_LINE;
        const int8_t *own = tokens->codes + span * layout->span_columns * count;
        __m512i sum[UC_TOKENS];
        /* The scales lie behind the lines: those of the next panel, long before it begins. */
        /* The scales lie behind the lines: those of the next panel, long before it begins. */
        _mm_prefetch((const char *)scales + layout->panel_bytes + group * wide, _MM_HINT_T0);
        if (count <= 2)
            sums_of_few(kind, count, lines, uc_lines_of(layout, span), own, sum);
        else
            sums_of_many(kind, count, lines, uc_lines_of(layout, span), own, sum);
        const __m512 scale = scales_at(layout->scale_dtype, scales, group);
        const __m512i offset =
            layout->symmetric ? _mm512_set1_epi32(uc_offset(kind)) : offsets_at(offsets, group);
#pragma GCC unroll 16
        for (size_t t = 0; t < count; t++) {
            size_t at = span * count + t;
            __m512i gone = _mm512_mullo_epi32(offset, _mm512_set1_epi32(tokens->sums[at]));
            __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[t], gone));
            dot = _mm512_mul_ps(_mm512_mul_ps(dot, _mm512_set1_ps(tokens->scales[at])), scale);
            total[t] = _mm512_add_ps(total[t], dot);
        }
    }
#pragma GCC unroll 16
    for (size_t t = 0; t < count; t++)
        _mm512_storeu_ps(to + t * UC_ROWS, total[t]);
}

/* One of the four columns of a lane, as float32 less the offset. */
PART __m512 weights_of(__m512i digits, unsigned column, __m512 offset) {
    __m512i value = _mm512_srli_epi32(digits, 8 * column);
    if (column < 3)
        value = _mm512_and_si512(value, _mm512_set1_epi32(255));
    return _mm512_sub_ps(_mm512_cvtepi32_ps(value), offset);
}

PART void exact(enum uc_kind kind, const size_t count, const struct uc_layout *layout,
                const uint8_t *panel, const struct uc_tokens *tokens, size_t first, float *to) {
    const size_t turn = uc_digits(kind), step = UC_LANE * tokens->count;
    const uint8_t *scales = uc_scales_of(layout, panel), *offsets = uc_offsets_of(layout, panel);
    __m512 total[4];
    fetch_hole(layout, panel);
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
        total[t] = _mm512_setzero_ps();
    for (size_t span = 0; span < layout->spans; span++) {
        const size_t group = span * layout->scale_step, size = uc_lines_of(layout, span);
        const uint8_t *lines = panel + span * layout->span_lines * UC_LINE;
        const float *x = tokens->values + span * layout->span_columns * tokens->count + first;
        const __m512 offset = layout->symmetric ? _mm512_set1_ps((float)uc_offset(kind))
                                                : _mm512_cvtepi32_ps(offsets_at(offsets, group));
        __m512 part[4][4];
#pragma GCC unroll 4
        for (size_t t = 0; t < count; t++)
#pragma GCC unroll 4
            for (size_t j = 0; j < 4; j++)
                part[t][j] = _mm512_setzero_ps();
        for (size_t line = 0; line < size; line++, lines += UC_LINE, x += step * turn) {
            _mm_prefetch((const char *)lines + AHEAD, _MM_HINT_T0);
            __m512i digits[5];
            digits_of(kind, _mm512_loadu_si512(lines), digits);
#pragma GCC unroll 5
            for (size_t i = 0; i < turn; i++)
#pragma GCC unroll 4
                for (unsigned j = 0; j < 4; j++) {
                    const __m512 weight = weights_of(digits[i], j, offset);
#pragma GCC unroll 4
                    for (size_t t = 0; t < count; t++)
                        part[t][j] = _mm512_fmadd_ps(
                            weight, _mm512_set1_ps(x[step * i + tokens->count * j + t]),
                            part[t][j]);
                }
        }
        const __m512 scale = scales_at(layout->scale_dtype, scales, group);
#pragma GCC unroll 4
        for (size_t t = 0; t < count; t++) {
            __m512 sum = _mm512_add_ps(_mm512_add_ps(part[t][0], part[t][1]),
                                       _mm512_add_ps(part[t][2], part[t][3]));
            total[t] = _mm512_add_ps(total[t], _mm512_mul_ps(sum, scale));
        }
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
        _mm512_storeu_ps(to + (first + t) * UC_ROWS, total[t]);
}

/* Both products of a kind, with as many tokens at once as registers hold. */
#define KIND(name, kind)                                                                           \
    static WIDE void uc_dots_##name##_avx512vnni(                                                  \
        const struct uc_layout *layout, const uint8_t *panel, const struct uc_tokens *tokens,      \
        float *restrict to) {                                                                      \
        switch (tokens->count) {                                                                   \
        case 16:                                                                                   \
            dots(kind, 16, layout, panel, tokens, to);                                             \
            break;                                                                                 \
        case 8:                                                                                    \
            dots(kind, 8, layout, panel, tokens, to);                                              \
            break;                                                                                 \
        case 4:                                                                                    \
            dots(kind, 4, layout, panel, tokens, to);                                              \
            break;                                                                                 \
        case 2:                                                                                    \
            dots(kind, 2, layout, panel, tokens, to);                                              \
            break;                                                                                 \
        default:                                                                                   \
            dots(kind, 1, layout, panel, tokens, to);                                              \
        }                                                                                          \
    }                                                                                              \
    static WIDE void uc_exact_##name##_avx512vnni(                                                 \
        const struct uc_layout *layout, const uint8_t *panel, const struct uc_tokens *tokens,      \
        float *restrict to) {                                                                      \
        size_t t = 0;                                                                              \
        for (; tokens->count - t >= 4; t += 4)                                                     \
            exact(kind, 4, layout, panel, tokens, t, to);                                          \
        for (; t < tokens->count; t++)                                                             \
            exact(kind, 1, layout, panel, tokens, t, to);                                          \
    }

KIND(int8, UC_INT8)
KIND(int4, UC_INT4)
KIND(int2, UC_INT2)
KIND(trit5, UC_TRIT5)

static int usable(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("fma") && uc_has_f16c();
}

const struct uc_isa uc_isa_avx512vnni = {
    .name = "avx512vnni",
    .usable = usable,
    .convert = uc_convert_avx512vnni,
    .store = uc_store_avx512vnni,
    .quantize = uc_quantize_avx512vnni,
    .dots = {uc_dots_int8_avx512vnni, uc_dots_int4_avx512vnni, uc_dots_int2_avx512vnni,
             uc_dots_trit5_avx512vnni},
    .exact = {uc_exact_int8_avx512vnni, uc_exact_int4_avx512vnni, uc_exact_int2_avx512vnni,
              uc_exact_trit5_avx512vnni},
};

#endif
