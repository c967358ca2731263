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

static WIDE void uc_quantize_avx512vnni(const float *from, size_t count, float greatest,
                                        int8_t *restrict codes, float *scale, int32_t *owed) {
    uc_quantize_body(from, count, greatest, codes, scale, owed);
}

/* The 16 scales of a group. */
PART __m512 scales_at(enum uc_dtype dtype, const uint8_t *scales) {
    if (dtype == UC_FLOAT32)
        return _mm512_loadu_ps(scales);
    __m256i half = _mm256_loadu_si256((const __m256i *)scales);
    if (dtype == UC_FLOAT16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

PART __m512i offsets_at(const uint8_t *offsets) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)offsets));
}

PART void fetch(const uint8_t *at) {
    _mm_prefetch((const char *)at, _MM_HINT_T0);
}

/* Four activations in every lane. */
PART __m512i four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}

/* trit5 where the processor looks 64 bytes up at once (VBMI): to the templates here, one kind more.
 * The instruction is spelt out, since functions of other features would not be inlined. */
enum { TRIT5_VBMI = UC_KINDS };

PART size_t turn_of(int kind) {
    return kind == TRIT5_VBMI ? 5 : uc_digits((enum uc_kind)kind);
}

PART int32_t offset_of(int kind) {
    return kind == TRIT5_VBMI ? 1 : uc_offset((enum uc_kind)kind);
}

/* 64 bytes of a table by the low 6 bits of each byte of `at`. */
PART __m512i lookup(int kind, const uint8_t *table, __m512i at) {
    if (kind == TRIT5_VBMI) {
        __m512i found;
        __asm__("vpermb %2, %1, %0" : "=v"(found) : "v"(at), "v"(_mm512_loadu_si512(table)));
        return found;
    }
    const __mmask64 odd = _mm512_test_epi8_mask(at, _mm512_set1_epi8(16));
    const __mmask64 high = _mm512_test_epi8_mask(at, _mm512_set1_epi8(32));
    __m512i part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        part[i] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(table + 16 * i)));
    at = _mm512_and_si512(at, _mm512_set1_epi8(15));
    __m512i low = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(part[0], at), odd, part[1], at);
    __m512i top = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(part[2], at), odd, part[3], at);
    return _mm512_mask_blend_epi8(high, low, top);
}

/* A line of trit5: its first two digits lie in bits 4 and 6 of `first`, the others in bits 0, 2 and
 * 4 of `second`. */
PART void trits_of(int kind, __m512i line, __m512i *first, __m512i *second) {
    *first = lookup(kind, uc_trit5_first, line);
    /* Three bits of the one, the rest of the other: (a & mask) | (b & ~mask). */
    __m512i at =
        _mm512_ternarylogic_epi32(_mm512_set1_epi8(7), *first, _mm512_srli_epi16(line, 3), 0xca);
    *second = lookup(kind, uc_trit5_second, at);
}

PART __m512i field(__m512i bytes, int bit, int mask) {
    bytes = bit ? _mm512_srli_epi16(bytes, (unsigned)bit) : bytes;
    return _mm512_and_si512(bytes, _mm512_set1_epi8((char)mask));
}

/* sum + digits * x, four bytes a lane. Spelt out: GCC copies the sum of its builtin around. */
PART __m512i dot(__m512i sum, __m512i digits, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(digits), "v"(x));
    return sum;
}

/* The same with four activations in memory, which the product brings to all lanes by itself: where
 * one token or two meet them once, bringing them to a register first is a step more. */
PART __m512i dot_at(__m512i sum, __m512i digits, const int8_t *x) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0"
            : "+v"(sum)
            : "v"(digits), "m"(*(const int8_t(*)[UC_LANE])x));
    return sum;
}

/* The digits of a line, shifted down. */
PART void digits_of(int kind, __m512i line, __m512i digits[8]) {
    if (kind == UC_INT8) {
        digits[0] = line;
    } else if (kind == UC_INT4) {
        digits[0] = field(line, 0, 15);
        digits[1] = field(line, 4, 15);
    } else if (kind == UC_INT2) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            digits[i] = field(line, 2 * i, 3);
    } else if (kind == UC_BIT1) {
        digits[0] = field(_mm512_add_epi8(line, line), 0, 2);
#pragma GCC unroll 7
        for (int i = 1; i < 8; i++)
            digits[i] = field(line, i - 1, 2);
    } else {
        __m512i first, second;
        trits_of(kind, line, &first, &second);
        digits[0] = field(first, 4, 3);
        digits[1] = field(first, 6, 3);
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++)
            digits[2 + i] = field(second, 2 * i, 3);
    }
}

/* What a span's offsets take away, for one token. */
PART __m512i due(int kind, const struct uc_layout *layout, const struct uc_span *span,
                 int32_t owed) {
    if (layout->symmetric)
        return _mm512_set1_epi32(offset_of(kind) * owed);
    return _mm512_mullo_epi32(offsets_at(span->offsets), _mm512_set1_epi32(owed));
}

/* sum[t] += the sum of x * u over a span, for many tokens: digits are made once for all. */
PART void sums_of_many(int kind, const size_t count, const struct uc_span *span, const int8_t *x,
                       size_t ahead, __m512i *sum) {
    const size_t turn = turn_of(kind);
    const uint8_t *line = span->lines, *end = line + span->count * UC_LINE;
    for (; line < end; line += UC_LINE, x += UC_LANE * turn * count) {
        fetch(line + ahead);
        __m512i digits[8];
        digits_of(kind, _mm512_loadu_si512(line), digits);
#pragma GCC unroll 8
        for (size_t i = 0; i < turn; i++)
#pragma GCC unroll 16
            for (size_t t = 0; t < count; t++)
                sum[t] = dot(sum[t], digits[i], four(x + UC_LANE * (i * count + t)));
    }
}

/* The bit at which digit i lies in a byte (of trit5: of the byte that it is found in). */
PART int bit_of(int kind, size_t i) {
    static const unsigned char trits[5] = {4, 6, 0, 2, 4};
    const size_t turn = turn_of(kind);
    return turn == 5 ? trits[i] : (int)(8 / turn * i);
}

/* One line of what sums_of_few adds up; sum: [tokens][bit of the digit]. */
PART void add_line(int kind, const size_t count, const uint8_t *line, const int8_t *x, size_t ahead,
                   __m512i sum[2][8]) {
    const size_t turn = turn_of(kind);
    const int mask = turn == 5 ? 3 : (1 << 8 / turn) - 1;
    fetch(line + ahead);
    __m512i bytes = _mm512_loadu_si512(line), first = bytes, second = bytes;
    if (turn == 5)
        trits_of(kind, bytes, &first, &second);
#pragma GCC unroll 8
    for (size_t i = 0; i < turn; i++) {
        const int bit = bit_of(kind, i);
        __m512i digit = field(turn == 5 && i < 2 ? first : second, 0, mask << bit);
#pragma GCC unroll 2
        for (size_t t = 0; t < count; t++)
            sum[t][bit] = dot_at(sum[t][bit], digit, x + UC_LANE * (i * count + t));
    }
}

/* The same as sums_of_many for one or two tokens: digits stay where they are in the byte, with a
 * sum for each place, and two lines at once do not wait for each other. */
PART void sums_of_few(int kind, const size_t count, const struct uc_span *span, const int8_t *x,
                      size_t ahead, __m512i *sum) {
    const size_t turn = turn_of(kind), step = UC_LANE * turn * count;
    const uint8_t *line = span->lines, *end = line + span->count * UC_LINE;
    __m512i one[2][8], two[2][8];
#pragma GCC unroll 2
    for (size_t t = 0; t < count; t++)
#pragma GCC unroll 8
        for (size_t i = 0; i < 8; i++)
            one[t][i] = two[t][i] = _mm512_setzero_si512();
    for (; end - line >= 2 * UC_LINE; line += 2 * UC_LINE, x += 2 * step) {
        add_line(kind, count, line, x, ahead, one);
        add_line(kind, count, line + UC_LINE, x + step, ahead, turn == 8 ? one : two);
    }
    if (line < end)
        add_line(kind, count, line, x, ahead, one);
#pragma GCC unroll 2
    for (size_t t = 0; t < count; t++) {
        __m512i all = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (unsigned bit = 0; bit < 8; bit++)
            all = _mm512_add_epi32(
                all, _mm512_srai_epi32(_mm512_add_epi32(one[t][bit], two[t][bit]), bit));
        sum[t] = _mm512_add_epi32(sum[t], kind == UC_BIT1 ? _mm512_add_epi32(all, all) : all);
    }
}

PART void dots(int kind, const size_t count, const struct uc_layout *layout, const uint8_t *panel,
               const struct uc_tokens *tokens, float *to) {
    __m512 total[UC_TOKENS];
#pragma GCC unroll 16
    for (size_t t = 0; t < count; t++)
        total[t] = _mm512_setzero_ps();
    for (size_t span = 0; span < layout->spans; span++) {
        const struct uc_span own = uc_span_of(layout, panel, span);
        const int8_t *x = tokens->codes + span * layout->span_columns * count;
        __m512i sum[UC_TOKENS];
        fetch(own.scales + tokens->ahead);
#pragma GCC unroll 16
        for (size_t t = 0; t < count; t++)
            sum[t] = due(kind, layout, &own, tokens->owed[span * count + t]);
        if (count <= 2)
            sums_of_few(kind, count, &own, x, tokens->ahead, sum);
        else
            sums_of_many(kind, count, &own, x, tokens->ahead, sum);
        const __m512 scale = scales_at(layout->scale_dtype, own.scales);
#pragma GCC unroll 16
        for (size_t t = 0; t < count; t++) {
            const float one = tokens->scales[span * count + t];
            __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t]), _mm512_set1_ps(one));
            total[t] = _mm512_add_ps(total[t], _mm512_mul_ps(product, scale));
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

PART void exact(int kind, const size_t count, const struct uc_layout *layout, const uint8_t *panel,
                const struct uc_tokens *tokens, size_t first, float *to) {
    const size_t turn = turn_of(kind), step = UC_LANE * tokens->count;
    __m512 total[4];
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
        total[t] = _mm512_setzero_ps();
    for (size_t span = 0; span < layout->spans; span++) {
        const struct uc_span own = uc_span_of(layout, panel, span);
        const uint8_t *line = own.lines, *end = line + own.count * UC_LINE;
        const float *x = tokens->values + span * layout->span_columns * tokens->count + first;
        const __m512 offset = layout->symmetric ? _mm512_set1_ps((float)offset_of(kind))
                                                : _mm512_cvtepi32_ps(offsets_at(own.offsets));
        __m512 part[4][4];
#pragma GCC unroll 4
        for (size_t t = 0; t < count; t++)
#pragma GCC unroll 4
            for (size_t j = 0; j < 4; j++)
                part[t][j] = _mm512_setzero_ps();
        for (; line < end; line += UC_LINE, x += step * turn) {
            fetch(line + tokens->ahead);
            __m512i digits[8];
            digits_of(kind, _mm512_loadu_si512(line), digits);
#pragma GCC unroll 8
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
        const __m512 scale = scales_at(layout->scale_dtype, own.scales);
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

/* Unpack spans of a panel for tiles. */
PART void unpack(int kind, const struct uc_layout *layout, const uint8_t *panel, size_t first,
                 size_t spans, size_t lines, size_t side, struct uc_slab *slab) {
    const size_t turn = turn_of(kind);
    uint8_t *to = slab->digits[side][0];
    for (size_t span = 0; span < spans; span++) {
        const struct uc_span own = uc_span_of(layout, panel, first + span);
        const uint8_t *line = own.lines, *end = line + own.count * UC_LINE;
        for (; line < end; line += UC_LINE) {
            __m512i digits[8];
            digits_of(kind, _mm512_loadu_si512(line), digits);
#pragma GCC unroll 8
            for (size_t i = 0; i < turn; i++, to += UC_LINE)
                _mm512_store_si512(to, digits[i]);
        }
        for (size_t more = own.count * turn; more % lines; more++, to += UC_LINE)
            _mm512_store_si512(to, _mm512_setzero_si512());
        _mm512_storeu_ps(slab->scales[span][side], scales_at(layout->scale_dtype, own.scales));
        if (!layout->symmetric)
            _mm512_storeu_si512(slab->offsets[span][side], offsets_at(own.offsets));
    }
}

#define UNPACK(name, kind)                                                                         \
    static WIDE void uc_unpack_##name##_avx512vnni(                                                \
        const struct uc_layout *layout, const uint8_t *panel, size_t first, size_t spans,          \
        size_t lines, size_t side, struct uc_slab *slab) {                                         \
        unpack(kind, layout, panel, first, spans, lines, side, slab);                              \
    }

UNPACK(int8, UC_INT8)
UNPACK(int4, UC_INT4)
UNPACK(int2, UC_INT2)
UNPACK(bit1, UC_BIT1)
UNPACK(trit5_avx512, UC_TRIT5)
UNPACK(trit5_vbmi, TRIT5_VBMI)

static void uc_unpack_trit5_avx512vnni(const struct uc_layout *layout, const uint8_t *panel,
                                       size_t first, size_t spans, size_t lines, size_t side,
                                       struct uc_slab *slab) {
    if (__builtin_cpu_supports("avx512vbmi"))
        uc_unpack_trit5_vbmi_avx512vnni(layout, panel, first, spans, lines, side, slab);
    else
        uc_unpack_trit5_avx512_avx512vnni(layout, panel, first, spans, lines, side, slab);
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
KIND(bit1, UC_BIT1)
KIND(trit5_avx512, UC_TRIT5)
KIND(trit5_vbmi, TRIT5_VBMI)

static void uc_dots_trit5_avx512vnni(const struct uc_layout *layout, const uint8_t *panel,
                                     const struct uc_tokens *tokens, float *restrict to) {
    if (__builtin_cpu_supports("avx512vbmi"))
        uc_dots_trit5_vbmi_avx512vnni(layout, panel, tokens, to);
    else
        uc_dots_trit5_avx512_avx512vnni(layout, panel, tokens, to);
}

static void uc_exact_trit5_avx512vnni(const struct uc_layout *layout, const uint8_t *panel,
                                      const struct uc_tokens *tokens, float *restrict to) {
    if (__builtin_cpu_supports("avx512vbmi"))
        uc_exact_trit5_vbmi_avx512vnni(layout, panel, tokens, to);
    else
        uc_exact_trit5_avx512_avx512vnni(layout, panel, tokens, to);
}

static int usable(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("fma") && uc_has_f16c();
}

const struct uc_panels uc_panels_avx512vnni = {
    .usable = usable,
    .convert = uc_convert_avx512vnni,
    .store = uc_store_avx512vnni,
    .quantize = uc_quantize_avx512vnni,
    .dots = {uc_dots_int8_avx512vnni, uc_dots_int4_avx512vnni, uc_dots_int2_avx512vnni,
             uc_dots_trit5_avx512vnni, uc_dots_bit1_avx512vnni},
    .exact = {uc_exact_int8_avx512vnni, uc_exact_int4_avx512vnni, uc_exact_int2_avx512vnni,
              uc_exact_trit5_avx512vnni, uc_exact_bit1_avx512vnni},
    .unpack = {uc_unpack_int8_avx512vnni, uc_unpack_int4_avx512vnni, uc_unpack_int2_avx512vnni,
               uc_unpack_trit5_avx512vnni, uc_unpack_bit1_avx512vnni},
};

#endif
