/* A panel with AVX2, without VNNI: 8 rows at a time in the 8 lanes of a register.
 *
 * `vpmaddubsw` saturates at 16 bits, so digits are shifted down first, and some lines are summed in
 * 16 bits before they are widened (avx2.h). int8 has no such room: it is multiplied as a signed
 * weight, its magnitude by the activation with its sign, at most 2 * 128 * 127 = 32512.
 */
#include "isa.h"

#if defined(__x86_64__)

#include "activations.h"
#include "avx2.h"

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

static WIDE void uc_quantize_avx2(const float *from, size_t count, float greatest,
                                  int8_t *restrict codes, float *scale, int32_t *owed) {
    uc_quantize_body(from, count, greatest, codes, scale, owed);
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

/* 16 bytes of a table by the low 4 bits of each byte, whose high bit is not set. */
PART __m256i lookup(const uint8_t *table, __m256i at) {
    const __m128i part = _mm_loadu_si128((const __m128i *)(const void *)table);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(part), at);
}

/* The bytes of trit5's two tables; the sign of a byte chooses in a blend. */
PART void trits_of(__m256i line, __m256i *first, __m256i *second) {
    const __m256i odd = _mm256_slli_epi16(line, 3), high = _mm256_slli_epi16(line, 2);
    __m256i at = _mm256_and_si256(line, _mm256_set1_epi8(15));
    const uint8_t *table = uc_trit5_first;
    __m256i low = _mm256_blendv_epi8(lookup(table, at), lookup(table + 16, at), odd);
    __m256i top = _mm256_blendv_epi8(lookup(table + 32, at), lookup(table + 48, at), odd);
    *first = _mm256_blendv_epi8(low, top, high);
    /* q and the low bit of r; the high one, the sign of the line, chooses the half. */
    at = _mm256_or_si256(_mm256_and_si256(*first, _mm256_set1_epi8(7)),
                         _mm256_and_si256(_mm256_srli_epi16(line, 3), _mm256_set1_epi8(8)));
    table = uc_trit5_second;
    *second = _mm256_blendv_epi8(lookup(table, at), lookup(table + 16, at), line);
}

PART __m256i field(__m256i bytes, int bit, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(bytes, bit), _mm256_set1_epi8((char)mask));
}

/* What digits of half a line are taken from: the line, or trit5's two tables. */
PART void parts_of(enum uc_kind kind, const uint8_t *at, __m256i parts[2]) {
    parts[0] = _mm256_loadu_si256((const __m256i *)(const void *)at);
    if (kind == UC_TRIT5)
        trits_of(parts[0], parts, parts + 1);
    else if (kind == UC_BIT1)
        parts[1] = _mm256_add_epi8(parts[0], parts[0]);
}

/* The line's digits number i, shifted down. */
PART __m256i digits_of(enum uc_kind kind, const __m256i parts[2], size_t i) {
    switch (kind) {
    case UC_INT4:
        return field(parts[0], 4 * (int)i, 15);
    case UC_INT2:
        return field(parts[0], 2 * (int)i, 3);
    case UC_TRIT5:
        return i < 2 ? field(parts[0], 4 + 2 * (int)i, 3) : field(parts[1], 2 * (int)i - 4, 3);
    case UC_BIT1:
        return i == 0 ? field(parts[1], 0, 2) : field(parts[0], (int)i - 1, 2);
    default:
        return parts[0];
    }
}

/* Unpack spans of a panel for tiles, without padding: their step is a line. */
PART void unpack(enum uc_kind kind, const struct uc_layout *layout, const uint8_t *panel,
                 size_t first, size_t spans, size_t side, struct uc_slab *slab) {
    const size_t turn = uc_digits(kind);
    uint8_t *to = slab->digits[side][0];
    for (size_t span = 0; span < spans; span++) {
        const struct uc_span own = uc_span_of(layout, panel, first + span);
        for (size_t line = 0; line < own.count; line++, to += turn * UC_LINE)
#pragma GCC unroll 2
            for (size_t half = 0; half < HALVES; half++) {
                const uint8_t *at = own.lines + line * UC_LINE + half * UC_LINE / 2;
                __m256i parts[2];
                parts_of(kind, at, parts);
#pragma GCC unroll 8
                for (size_t i = 0; i < turn; i++)
                    _mm256_store_si256((__m256i *)(to + i * UC_LINE + half * UC_LINE / 2),
                                       digits_of(kind, parts, i));
            }
#pragma GCC unroll 2
        for (size_t half = 0; half < HALVES; half++) {
            const size_t row = half * HALF;
            _mm256_storeu_ps(slab->scales[span][side] + row,
                             scales_at(layout->scale_dtype, own.scales, row));
            if (!layout->symmetric)
                _mm256_storeu_si256((__m256i *)(slab->offsets[span][side] + row),
                                    offsets_at(own.offsets, row));
        }
    }
}

/* sum[h][t] = the sum of x * u over a span for rows 8h to 8h + 7; of x * (u - 128) for int8. Both
 * halves of the rows share what activations bring. */
PART void sums_of(enum uc_kind kind, const size_t count, const uint8_t *lines, size_t size,
                  const int8_t *x, const struct uc_tokens *tokens, __m256i sum[HALVES][4]) {
    const size_t turn = uc_digits(kind), most = narrow_lines(kind, turn);
    const __m256i ones = _mm256_set1_epi16(1), signs = _mm256_set1_epi8((char)128);
#pragma GCC unroll 2
    for (size_t half = 0; half < HALVES; half++)
#pragma GCC unroll 4
        for (size_t t = 0; t < count; t++)
            sum[half][t] = _mm256_setzero_si256();
    while (size) {
        const size_t some = size < most ? size : most;
        __m256i narrow[HALVES][4];
#pragma GCC unroll 2
        for (size_t half = 0; half < HALVES; half++)
#pragma GCC unroll 4
            for (size_t t = 0; t < count; t++)
                narrow[half][t] = _mm256_setzero_si256();
        for (size_t line = 0; line < some; line++, lines += UC_LINE) {
            __m256i parts[HALVES][2];
            fetch(lines + tokens->ahead);
#pragma GCC unroll 2
            for (size_t half = 0; half < HALVES; half++)
                parts_of(kind, lines + half * UC_LINE / 2, parts[half]);
#pragma GCC unroll 8
            for (size_t i = 0; i < turn; i++) {
                __m256i digits[HALVES];
#pragma GCC unroll 2
                for (size_t half = 0; half < HALVES; half++)
                    digits[half] = digits_of(kind, parts[half], i);
#pragma GCC unroll 4
                for (size_t t = 0; t < count; t++) {
                    const __m256i own = four(x + UC_LANE * (i * tokens->count + t));
#pragma GCC unroll 2
                    for (size_t half = 0; half < HALVES; half++) {
                        __m256i by = own, size = digits[half];
                        if (kind == UC_INT8) {
                            by = _mm256_sign_epi8(own, _mm256_xor_si256(size, signs));
                            size = _mm256_abs_epi8(_mm256_xor_si256(size, signs));
                        }
                        narrow[half][t] = dot(narrow[half][t], size, by);
                    }
                }
            }
            x += UC_LANE * turn * tokens->count;
        }
#pragma GCC unroll 2
        for (size_t half = 0; half < HALVES; half++)
#pragma GCC unroll 4
            for (size_t t = 0; t < count; t++) {
                const __m256i wide = _mm256_madd_epi16(narrow[half][t], ones);
                sum[half][t] = _mm256_add_epi32(sum[half][t], wide);
            }
        size -= some;
    }
}

PART void dots(enum uc_kind kind, const size_t count, const struct uc_layout *layout,
               const uint8_t *panel, const struct uc_tokens *tokens, size_t first, float *to) {
    const __m256i base = _mm256_set1_epi32(kind == UC_INT8 ? 128 : 0);
    __m256 total[HALVES][4];
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
        total[0][t] = total[1][t] = _mm256_setzero_ps();
    for (size_t span = 0; span < layout->spans; span++) {
        const struct uc_span own = uc_span_of(layout, panel, span);
        const int8_t *x =
            tokens->codes + span * layout->span_columns * tokens->count + UC_LANE * first;
        fetch(own.scales + tokens->ahead);
        __m256i sum[HALVES][4];
        sums_of(kind, count, own.lines, own.count, x, tokens, sum);
#pragma GCC unroll 2
        for (size_t half = 0; half < HALVES; half++) {
            const __m256 scale = scales_at(layout->scale_dtype, own.scales, half * HALF);
            __m256i offset = layout->symmetric ? _mm256_set1_epi32(uc_offset(kind))
                                               : offsets_at(own.offsets, half * HALF);
            offset = _mm256_sub_epi32(offset, base);
#pragma GCC unroll 4
            for (size_t t = 0; t < count; t++) {
                size_t at = span * tokens->count + first + t;
                __m256i due = _mm256_mullo_epi32(offset, _mm256_set1_epi32(tokens->owed[at]));
                __m256 own_dot = _mm256_cvtepi32_ps(_mm256_add_epi32(sum[half][t], due));
                own_dot = _mm256_mul_ps(own_dot, _mm256_set1_ps(tokens->scales[at]));
                total[half][t] = _mm256_add_ps(total[half][t], _mm256_mul_ps(own_dot, scale));
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
    const __m256i byte = _mm256_set1_epi32(255);
    __m256 total[2];
#pragma GCC unroll 2
    for (size_t t = 0; t < count; t++)
        total[t] = _mm256_setzero_ps();
    for (size_t span = 0; span < layout->spans; span++) {
        const struct uc_span own = uc_span_of(layout, panel, span);
        const uint8_t *lines = own.lines + half * UC_LINE / 2;
        const float *x = tokens->values + span * layout->span_columns * tokens->count + first;
        const __m256 offset = layout->symmetric
                                  ? _mm256_set1_ps((float)uc_offset(kind))
                                  : _mm256_cvtepi32_ps(offsets_at(own.offsets, half * HALF));
        __m256 part[2][4];
#pragma GCC unroll 2
        for (size_t t = 0; t < count; t++)
#pragma GCC unroll 4
            for (size_t j = 0; j < 4; j++)
                part[t][j] = _mm256_setzero_ps();
        for (size_t line = 0; line < own.count; line++, lines += UC_LINE, x += step * turn) {
            fetch(lines + tokens->ahead);
            __m256i parts[2];
            parts_of(kind, lines, parts);
#pragma GCC unroll 8
            for (size_t i = 0; i < turn; i++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    __m256i value = _mm256_srli_epi32(digits_of(kind, parts, i), 8 * j);
                    value = _mm256_and_si256(value, byte);
                    __m256 weight = _mm256_sub_ps(_mm256_cvtepi32_ps(value), offset);
#pragma GCC unroll 2
                    for (size_t t = 0; t < count; t++)
                        part[t][j] = _mm256_fmadd_ps(
                            weight, _mm256_set1_ps(x[step * i + tokens->count * (size_t)j + t]),
                            part[t][j]);
                }
        }
        const __m256 scale = scales_at(layout->scale_dtype, own.scales, half * HALF);
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

/* Both products of a kind, in blocks of as many tokens as registers hold, and what tiles share. */
#define KIND(name, kind)                                                                           \
    static WIDE void uc_unpack_##name##_avx2(                                                      \
        const struct uc_layout *layout, const uint8_t *panel, size_t first, size_t spans,          \
        size_t lines, size_t side, struct uc_slab *slab) {                                         \
        (void)lines;                                                                               \
        unpack(kind, layout, panel, first, spans, side, slab);                                     \
    }                                                                                              \
    static WIDE void uc_dots_##name##_avx2(const struct uc_layout *layout, const uint8_t *panel,   \
                                           const struct uc_tokens *tokens, float *restrict to) {   \
        size_t t = 0;                                                                              \
        for (; tokens->count - t >= 4; t += 4)                                                     \
            dots(kind, 4, layout, panel, tokens, t, to);                                           \
        for (; tokens->count - t >= 2; t += 2)                                                     \
            dots(kind, 2, layout, panel, tokens, t, to);                                           \
        for (; t < tokens->count; t++)                                                             \
            dots(kind, 1, layout, panel, tokens, t, to);                                           \
    }                                                                                              \
    static WIDE void uc_exact_##name##_avx2(const struct uc_layout *layout, const uint8_t *panel,  \
                                            const struct uc_tokens *tokens, float *restrict to) {  \
        for (size_t half = 0; half < HALVES; half++) {                                             \
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
KIND(bit1, UC_BIT1)

static int usable(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && uc_has_f16c();
}

const struct uc_panels uc_panels_avx2 = {
    .usable = usable,
    .convert = uc_convert_avx2,
    .store = uc_store_avx2,
    .quantize = uc_quantize_avx2,
    .dots = {uc_dots_int8_avx2, uc_dots_int4_avx2, uc_dots_int2_avx2, uc_dots_trit5_avx2,
             uc_dots_bit1_avx2},
    .exact = {uc_exact_int8_avx2, uc_exact_int4_avx2, uc_exact_int2_avx2, uc_exact_trit5_avx2,
              uc_exact_bit1_avx2},
    .unpack = {uc_unpack_int8_avx2, uc_unpack_int4_avx2, uc_unpack_int2_avx2, uc_unpack_trit5_avx2,
               uc_unpack_bit1_avx2},
};

#endif
