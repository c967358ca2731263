/* A panel with Arm's dot product: 4 rows at a time in the 4 lanes of a register.
 *
 * `sdot` multiplies signed bytes. Digits of up to 4 bits are their own signed values; those of int8
 * become signed by one bit, and their offset less by 128.
 */
#include "isa.h"

#if defined(__aarch64__)

#include <arm_neon.h>
#include <string.h>

#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "activations.h"

#if defined(__clang__)
#define WIDE __attribute__((target("dotprod")))
#else
#define WIDE __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define PART static inline __attribute__((always_inline)) WIDE

enum { QUARTER = UC_ROWS / 4, QUARTER_LINE = UC_LINE / 4 };

static WIDE void uc_convert_neon_dotprod(enum uc_dtype dtype, const uint8_t *from, size_t count,
                                         float *restrict to) {
    if (dtype == UC_FLOAT32) {
        memcpy(to, from, 4 * count);
    } else if (dtype == UC_BFLOAT16) {
        uc_from_bfloat16(from, count, to);
    } else {
        for (size_t i = 0; i < count; i++) {
            __fp16 half;
            memcpy(&half, from + 2 * i, 2);
            to[i] = (float)half;
        }
    }
}

static WIDE void uc_store_neon_dotprod(enum uc_dtype dtype, const float *from, size_t count,
                                       uint8_t *restrict to) {
    if (dtype == UC_FLOAT32) {
        memcpy(to, from, 4 * count);
    } else if (dtype == UC_BFLOAT16) {
        uc_to_bfloat16(from, count, to);
    } else {
        for (size_t i = 0; i < count; i++) {
            __fp16 half = (__fp16)from[i];
            memcpy(to + 2 * i, &half, 2);
        }
    }
}

static WIDE void uc_quantize_neon_dotprod(const float *from, size_t count, float greatest,
                                          int8_t *restrict codes, float *scale, int32_t *owed) {
    uc_quantize_body(from, count, greatest, codes, scale, owed);
}

PART float32x4_t scales_at(enum uc_dtype dtype, const uint8_t *scales, size_t row) {
    const uint8_t *at = scales + row * uc_bytes_of(dtype);
    if (dtype == UC_FLOAT32)
        return vreinterpretq_f32_u8(vld1q_u8(at));
    uint16x4_t half = vreinterpret_u16_u8(vld1_u8(at));
    if (dtype == UC_FLOAT16)
        return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

PART int32x4_t offsets_at(const uint8_t *offsets, size_t row) {
    uint8_t four[8] = {0};
    memcpy(four, offsets + row, 4);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vld1_u8(four)))));
}

/* Four activations in every lane. */
PART int8x16_t four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

/* 64 bytes of a table by the low 6 bits of each byte. */
PART uint8x16_t lookup(const uint8_t *table, uint8x16_t at) {
    return vqtbl4q_u8(vld1q_u8_x4(table), vandq_u8(at, vdupq_n_u8(63)));
}

/* The digits of a quarter of a line, shifted down. */
PART void digits_of(enum uc_kind kind, uint8x16_t line, uint8x16_t digits[8]) {
    if (kind == UC_INT8) {
        digits[0] = line;
    } else if (kind == UC_INT4) {
        digits[0] = vandq_u8(line, vdupq_n_u8(15));
        digits[1] = vshrq_n_u8(line, 4);
    } else if (kind == UC_INT2) {
        const uint8x16_t mask = vdupq_n_u8(3);
        digits[0] = vandq_u8(line, mask);
        digits[1] = vandq_u8(vshrq_n_u8(line, 2), mask);
        digits[2] = vandq_u8(vshrq_n_u8(line, 4), mask);
        digits[3] = vshrq_n_u8(line, 6);
    } else if (kind == UC_BIT1) {
        const uint8x16_t two = vdupq_n_u8(2);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) /* all ones where the bit is set */
            digits[i] = vandq_u8(vtstq_u8(line, vdupq_n_u8((uint8_t)(1 << i))), two);
    } else {
        const uint8x16_t mask = vdupq_n_u8(3);
        const uint8x16_t first = lookup(uc_trit5_first, line);
        const uint8x16_t at =
            vorrq_u8(vandq_u8(first, vdupq_n_u8(7)), vshlq_n_u8(vshrq_n_u8(line, 6), 3));
        const uint8x16_t second = lookup(uc_trit5_second, at);
        digits[0] = vandq_u8(vshrq_n_u8(first, 4), mask);
        digits[1] = vshrq_n_u8(first, 6);
        digits[2] = vandq_u8(second, mask);
        digits[3] = vandq_u8(vshrq_n_u8(second, 2), mask);
        digits[4] = vshrq_n_u8(second, 4);
    }
}

/* sum[t] = the sum of x * u over a quarter of a span; of x * (u - 128) for int8. */
PART void sums_of(enum uc_kind kind, const size_t count, const uint8_t *lines, size_t size,
                  const int8_t *x, size_t tokens, int32x4_t *sum) {
    const size_t turn = uc_digits(kind);
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
        sum[t] = vdupq_n_s32(0);
    for (size_t line = 0; line < size; line++, lines += UC_LINE) {
        uint8x16_t digits[8], bytes = vld1q_u8(lines);
        digits_of(kind, kind == UC_INT8 ? veorq_u8(bytes, vdupq_n_u8(128)) : bytes, digits);
#pragma GCC unroll 8
        for (size_t i = 0; i < turn; i++)
#pragma GCC unroll 4
            for (size_t t = 0; t < count; t++)
                sum[t] = vdotq_s32(sum[t], vreinterpretq_s8_u8(digits[i]),
                                   four(x + UC_LANE * (i * tokens + t)));
        x += UC_LANE * turn * tokens;
    }
}

PART void dots(enum uc_kind kind, const size_t count, const struct uc_layout *layout,
               const uint8_t *panel, const struct uc_tokens *tokens, size_t first, float *to) {
    const int32x4_t base = vdupq_n_s32(kind == UC_INT8 ? 128 : 0);
    float32x4_t total[4][4];
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
#pragma GCC unroll 4
        for (size_t quarter = 0; quarter < 4; quarter++)
            total[t][quarter] = vdupq_n_f32(0);
    for (size_t span = 0; span < layout->spans; span++) {
        const struct uc_span own = uc_span_of(layout, panel, span);
        const int8_t *x =
            tokens->codes + span * layout->span_columns * tokens->count + UC_LANE * first;
#pragma GCC unroll 4
        for (size_t quarter = 0; quarter < 4; quarter++) {
            const size_t row = quarter * QUARTER;
            int32x4_t sum[4];
            sums_of(kind, count, own.lines + quarter * QUARTER_LINE, own.count, x, tokens->count,
                    sum);
            const float32x4_t scale = scales_at(layout->scale_dtype, own.scales, row);
            int32x4_t offset =
                layout->symmetric ? vdupq_n_s32(uc_offset(kind)) : offsets_at(own.offsets, row);
            offset = vsubq_s32(offset, base);
#pragma GCC unroll 4
            for (size_t t = 0; t < count; t++) {
                size_t at = span * tokens->count + first + t;
                int32x4_t due = vmulq_s32(offset, vdupq_n_s32(tokens->owed[at]));
                float32x4_t dot = vcvtq_f32_s32(vaddq_s32(sum[t], due));
                dot = vmulq_f32(vmulq_f32(dot, vdupq_n_f32(tokens->scales[at])), scale);
                total[t][quarter] = vaddq_f32(total[t][quarter], dot);
            }
        }
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
#pragma GCC unroll 4
        for (size_t quarter = 0; quarter < 4; quarter++)
            vst1q_f32(to + (first + t) * UC_ROWS + quarter * QUARTER, total[t][quarter]);
}

PART void exact(enum uc_kind kind, const size_t count, const struct uc_layout *layout,
                const uint8_t *panel, const struct uc_tokens *tokens, size_t first, size_t quarter,
                float *to) {
    const size_t turn = uc_digits(kind);
    const uint32x4_t byte = vdupq_n_u32(255);
    float32x4_t total[2];
#pragma GCC unroll 2
    for (size_t t = 0; t < count; t++)
        total[t] = vdupq_n_f32(0);
    for (size_t span = 0; span < layout->spans; span++) {
        const struct uc_span own = uc_span_of(layout, panel, span);
        const size_t row = quarter * QUARTER;
        const uint8_t *lines = own.lines + quarter * QUARTER_LINE;
        const float *x = tokens->values + span * layout->span_columns * tokens->count + first;
        const float32x4_t offset = layout->symmetric ? vdupq_n_f32((float)uc_offset(kind))
                                                     : vcvtq_f32_s32(offsets_at(own.offsets, row));
        float32x4_t part[2][4];
#pragma GCC unroll 2
        for (size_t t = 0; t < count; t++)
#pragma GCC unroll 4
            for (size_t j = 0; j < 4; j++)
                part[t][j] = vdupq_n_f32(0);
        for (size_t line = 0; line < own.count; line++, lines += UC_LINE) {
            uint8x16_t digits[8];
            digits_of(kind, vld1q_u8(lines), digits);
#pragma GCC unroll 8
            for (size_t i = 0; i < turn; i++) {
                uint32x4_t lane = vreinterpretq_u32_u8(digits[i]);
#pragma GCC unroll 4
                for (size_t j = 0; j < 4; j++, lane = vshrq_n_u32(lane, 8)) {
                    float32x4_t weight = vsubq_f32(vcvtq_f32_u32(vandq_u32(lane, byte)), offset);
#pragma GCC unroll 2
                    for (size_t t = 0; t < count; t++)
                        part[t][j] = vfmaq_n_f32(part[t][j], weight,
                                                 x[(UC_LANE * i + j) * tokens->count + t]);
                }
            }
            x += UC_LANE * turn * tokens->count;
        }
        const float32x4_t scale = scales_at(layout->scale_dtype, own.scales, row);
#pragma GCC unroll 2
        for (size_t t = 0; t < count; t++) {
            float32x4_t sum =
                vaddq_f32(vaddq_f32(part[t][0], part[t][1]), vaddq_f32(part[t][2], part[t][3]));
            total[t] = vaddq_f32(total[t], vmulq_f32(sum, scale));
        }
    }
#pragma GCC unroll 2
    for (size_t t = 0; t < count; t++)
        vst1q_f32(to + (first + t) * UC_ROWS + quarter * QUARTER, total[t]);
}

/* Both products of a kind, with as many tokens at once as registers hold. */
#define KIND(name, kind)                                                                           \
    static WIDE void uc_dots_##name##_neon_dotprod(                                                \
        const struct uc_layout *layout, const uint8_t *panel, const struct uc_tokens *tokens,      \
        float *restrict to) {                                                                      \
        size_t t = 0;                                                                              \
        for (; tokens->count - t >= 4; t += 4)                                                     \
            dots(kind, 4, layout, panel, tokens, t, to);                                           \
        for (; t < tokens->count; t++)                                                             \
            dots(kind, 1, layout, panel, tokens, t, to);                                           \
    }                                                                                              \
    static WIDE void uc_exact_##name##_neon_dotprod(                                               \
        const struct uc_layout *layout, const uint8_t *panel, const struct uc_tokens *tokens,      \
        float *restrict to) {                                                                      \
        for (size_t quarter = 0; quarter < 4; quarter++) {                                         \
            size_t t = 0;                                                                          \
            for (; tokens->count - t >= 2; t += 2)                                                 \
                exact(kind, 2, layout, panel, tokens, t, quarter, to);                             \
            if (t < tokens->count)                                                                 \
                exact(kind, 1, layout, panel, tokens, t, quarter, to);                             \
        }                                                                                          \
    }

KIND(int8, UC_INT8)
KIND(int4, UC_INT4)
KIND(int2, UC_INT2)
KIND(trit5, UC_TRIT5)
KIND(bit1, UC_BIT1)

static int usable(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1; /* every 64-bit Apple processor that runs this Python has it */
#endif
}

const struct uc_panels uc_panels_neon_dotprod = {
    .usable = usable,
    .convert = uc_convert_neon_dotprod,
    .store = uc_store_neon_dotprod,
    .quantize = uc_quantize_neon_dotprod,
    .dots = {uc_dots_int8_neon_dotprod, uc_dots_int4_neon_dotprod, uc_dots_int2_neon_dotprod,
             uc_dots_trit5_neon_dotprod, uc_dots_bit1_neon_dotprod},
    .exact = {uc_exact_int8_neon_dotprod, uc_exact_int4_neon_dotprod, uc_exact_int2_neon_dotprod,
              uc_exact_trit5_neon_dotprod, uc_exact_bit1_neon_dotprod},
};

#endif
