/* What an instruction set must compute: one panel times some tokens.
 *
 * compute="int8". For token t, span s and row r, with digits u of the panel and activations x:
 *
 *     dot   = sum over the span of x * (u - offset)       int32, exact
 *     total = total + ((float)dot * x_scale) * w_scale    float32, spans in order, no fused step
 *
 * The offset is that of the kind, or the group's where the weight is asymmetric. Kernels sum x * u
 * and take offset * sum(x) away. Sums wrap modulo 2^32 and the last one fits: |x| <= 127, |u -
 * offset| <= 255 and 16384 columns make 531 million. Digits that a kernel leaves shifted make at
 * most 16 times 15, 64 times 3 or 256 times 2 of the digit: 1065 million.
 *
 * compute="exact". For each j of the four columns of a lane, in the order of columns:
 *
 *     part[j] = fma((float)(u - offset), x, part[j])      float32
 *     total   = total + ((part[0] + part[1]) + (part[2] + part[3])) * w_scale
 *
 * So every instruction set gives the same bits, for any number of tokens at once. Scales that are
 * not finite make totals that are not.
 *
 * trit5 without digits: a byte is q[0] = ceil(v * 256 / 243), and with q[i+1] = 3 q[i] mod 256 the
 * i-th digit is (3 q[i] - q[i+1]) / 256. Hence
 *
 *     sum x[i] u[i] = (3 sum x[i] q[i] - sum x[i] q[i+1]) / 256
 *
 * exactly, and two sums of products of bytes do for the price of no shift, mask or comparison. With
 * more than two tokens it is cheaper to make the digits once.
 *
 * Weights and activations may lie on any address; nothing is read behind their ends (lines ahead
 * are only prefetched).
 */
#ifndef UC_PANEL_H
#define UC_PANEL_H

#include "layout.h"

/* Activations of 1, 2, 4, 8 or 16 tokens, side by side: what one line of weights meets lies in one
 * place, and no token's row falls into the same sets of the cache as another's. With T tokens,
 * column c of token t is
 *
 *     codes[(c / 4 * T + t) * 4 + c % 4]      int8
 *     values[c * T + t]                       exact
 *
 * where c counts the padding of spans, which is zero; scales and sums (of codes) are [spans][T].
 */
struct uc_tokens {
    const int8_t *codes;
    const float *values;
    const float *scales;
    const int32_t *sums;
    size_t count;
};

enum { UC_TOKENS = 16 }; /* at most at once */

/* Multiply a panel with tokens; to: [tokens][16]. */
typedef void uc_multiply(const struct uc_layout *layout, const uint8_t *panel,
                         const struct uc_tokens *tokens, float *restrict to);

/* Read `count` values of a dtype as float32. */
typedef void uc_convert(enum uc_dtype dtype, const uint8_t *from, size_t count, float *restrict to);

/* Write `count` float32, rounded to the nearest even, as a dtype. */
typedef void uc_store(enum uc_dtype dtype, const float *from, size_t count, uint8_t *restrict to);

/* Round one span of one token to int8, as kernels/blocked.py quantize_activations says. */
typedef void uc_quantize(const float *from, size_t count, int8_t *restrict codes, float *scale,
                         int32_t *sum);

/* Parts of a panel. */
static inline const uint8_t *uc_scales_of(const struct uc_layout *layout, const uint8_t *panel) {
    return panel + UC_LINE * layout->panel_lines;
}

static inline const uint8_t *uc_offsets_of(const struct uc_layout *layout, const uint8_t *panel) {
    return uc_scales_of(layout, panel) +
           layout->groups * UC_ROWS * uc_bytes_of(layout->scale_dtype);
}

static inline size_t uc_lines_of(const struct uc_layout *layout, size_t span) {
    return span + 1 == layout->spans ? layout->last_lines : layout->span_lines;
}

#endif
