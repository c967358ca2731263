/* The definition, in plain loops. */
#include <math.h>
#include <string.h>

#include "activations.h"
#include "isa.h"

static float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31;
    uint32_t fraction = half & 1023, bits;
    float value;
    if (exponent == 0) {
        value = (float)fraction * 0x1p-24f;
        memcpy(&bits, &value, 4);
    } else {
        bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    }
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

static uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000u) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000u) { /* below 2^-14: a multiple of 2^-24 */
        float magnitude;
        memcpy(&magnitude, &rest, 4);
        magnitude += 0.5f; /* 0.5 has steps of 2^-24 */
        memcpy(&rest, &magnitude, 4);
        return (uint16_t)(sign | (rest - 0x3f000000u));
    }
    rest += 0xfffu + (rest >> 13 & 1);
    return (uint16_t)(sign | (rest - 0x38000000u) >> 13);
}

static void uc_convert_scalar(enum uc_dtype dtype, const uint8_t *from, size_t count,
                              float *restrict to) {
    if (dtype == UC_FLOAT32) {
        memcpy(to, from, 4 * count);
    } else if (dtype == UC_BFLOAT16) {
        uc_from_bfloat16(from, count, to);
    } else {
        for (size_t i = 0; i < count; i++) {
            uint16_t half;
            memcpy(&half, from + 2 * i, 2);
            to[i] = half_to_float(half);
        }
    }
}

static void uc_store_scalar(enum uc_dtype dtype, const float *from, size_t count,
                            uint8_t *restrict to) {
    if (dtype == UC_FLOAT32) {
        memcpy(to, from, 4 * count);
    } else if (dtype == UC_BFLOAT16) {
        uc_to_bfloat16(from, count, to);
    } else {
        for (size_t i = 0; i < count; i++) {
            uint16_t half = float_to_half(from[i]);
            memcpy(to + 2 * i, &half, 2);
        }
    }
}

static void uc_quantize_scalar(const float *from, size_t count, float greatest,
                               int8_t *restrict codes, float *scale, int32_t *owed) {
    uc_quantize_body(from, count, greatest, codes, scale, owed);
}

/* The digits of one byte, in the order of columns. */
static void digits_of(enum uc_kind kind, uint32_t byte, int32_t digits[8]) {
    if (kind == UC_TRIT5) {
        uint32_t value = byte % 64 * 4 + byte / 64, pair = value / 28, rest = value % 28;
        const uint32_t all[5] = {pair / 3, pair % 3, rest / 9, rest / 3 % 3, rest % 3};
        for (size_t i = 0; i < 5; i++)
            digits[i] = (int32_t)all[i];
        return;
    }
    for (size_t i = 0; i < uc_digits(kind); i++) {
        size_t bits = 8 / uc_digits(kind);
        digits[i] = (int32_t)(byte >> bits * i & ((1u << bits) - 1)) << (kind == UC_BIT1);
    }
}

/* One row of one span: the lane of a row is 4 bytes of each line. */
static int32_t dot_of(enum uc_kind kind, const uint8_t *lane, size_t lines, const int8_t *x,
                      size_t tokens, int32_t offset) {
    const size_t step = UC_LANE * tokens;
    int32_t dot = 0, digits[8];
    for (size_t line = 0; line < lines; line++, lane += UC_LINE, x += step * uc_digits(kind))
        for (size_t j = 0; j < UC_LANE; j++) {
            digits_of(kind, lane[j], digits);
            for (size_t i = 0; i < uc_digits(kind); i++)
                dot += x[step * i + j] * (digits[i] - offset);
        }
    return dot;
}

static float exact_of(enum uc_kind kind, const uint8_t *lane, size_t lines, const float *x,
                      size_t tokens, int32_t offset) {
    const size_t step = UC_LANE * tokens;
    float part[UC_LANE] = {0};
    int32_t digits[8];
    for (size_t line = 0; line < lines; line++, lane += UC_LINE, x += step * uc_digits(kind))
        for (size_t j = 0; j < UC_LANE; j++) {
            digits_of(kind, lane[j], digits);
            for (size_t i = 0; i < uc_digits(kind); i++)
                part[j] = fmaf((float)(digits[i] - offset), x[step * i + tokens * j], part[j]);
        }
    return (part[0] + part[1]) + (part[2] + part[3]);
}

static void multiply(const struct uc_layout *layout, const uint8_t *panel,
                     const struct uc_tokens *tokens, float *restrict to, int exact) {
    const size_t count = tokens->count;
    memset(to, 0, sizeof(float) * UC_ROWS * count);
    for (size_t span = 0; span < layout->spans; span++) {
        const struct uc_span own = uc_span_of(layout, panel, span);
        float scale[UC_ROWS];
        uc_convert_scalar(layout->scale_dtype, own.scales, UC_ROWS, scale);
        for (size_t t = 0; t < count; t++) {
            const size_t at = span * layout->span_columns * count;
            for (size_t r = 0; r < UC_ROWS; r++) {
                const uint8_t *lane = own.lines + UC_LANE * r;
                int32_t offset = layout->symmetric ? uc_offset(layout->kind) : own.offsets[r];
                float *total = to + UC_ROWS * t + r;
                if (exact) {
                    const float *x = tokens->values + at + t;
                    *total += exact_of(layout->kind, lane, own.count, x, count, offset) * scale[r];
                } else {
                    const int8_t *x = tokens->codes + at + UC_LANE * t;
                    int32_t dot = dot_of(layout->kind, lane, own.count, x, count, offset);
                    *total += (float)dot * tokens->scales[span * count + t] * scale[r];
                }
            }
        }
    }
}

static void uc_dots_scalar(const struct uc_layout *layout, const uint8_t *panel,
                           const struct uc_tokens *tokens, float *restrict to) {
    multiply(layout, panel, tokens, to, 0);
}

static void uc_exact_scalar(const struct uc_layout *layout, const uint8_t *panel,
                            const struct uc_tokens *tokens, float *restrict to) {
    multiply(layout, panel, tokens, to, 1);
}

/* Unpack spans of a panel for tiles. No tiling here needs it; tests give it to the others'. */
static void uc_unpack_scalar(const struct uc_layout *layout, const uint8_t *panel, size_t first,
                             size_t spans, size_t lines, size_t side, struct uc_slab *slab) {
    const size_t turn = uc_digits(layout->kind);
    uint8_t (*to)[UC_LINE] = slab->digits[side];
    for (size_t span = 0; span < spans; span++) {
        const struct uc_span own = uc_span_of(layout, panel, first + span);
        const size_t padded = (own.count * turn + lines - 1) / lines * lines;
        memset(to, 0, padded * UC_LINE);
        for (size_t at = 0; at < own.count * UC_LINE; at++) {
            int32_t digits[8];
            digits_of(layout->kind, own.lines[at], digits);
            for (size_t i = 0; i < turn; i++)
                to[at / UC_LINE * turn + i][at % UC_LINE] = (uint8_t)digits[i];
        }
        to += padded;
        uc_convert_scalar(layout->scale_dtype, own.scales, UC_ROWS, slab->scales[span][side]);
        for (size_t r = 0; !layout->symmetric && r < UC_ROWS; r++)
            slab->offsets[span][side][r] = own.offsets[r];
    }
}

static int usable(void) {
    return 1;
}

const struct uc_panels uc_panels_scalar = {
    .usable = usable,
    .convert = uc_convert_scalar,
    .store = uc_store_scalar,
    .quantize = uc_quantize_scalar,
    .dots = {uc_dots_scalar, uc_dots_scalar, uc_dots_scalar, uc_dots_scalar, uc_dots_scalar},
    .exact = {uc_exact_scalar, uc_exact_scalar, uc_exact_scalar, uc_exact_scalar, uc_exact_scalar},
    .unpack = {uc_unpack_scalar, uc_unpack_scalar, uc_unpack_scalar, uc_unpack_scalar,
               uc_unpack_scalar},
};
