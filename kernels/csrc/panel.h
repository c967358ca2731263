/* What an instruction set must compute: one panel times some tokens.
 *
 * compute="int8". For token t, span s and row r, with digits u of the panel and activations x:
 *
 *     dot   = sum over the span of x * (u - offset)       int32, exact
 *     total = total + ((float)dot * x_scale) * w_scale    float32, spans in order, no fused step
 *
 * The offset is that of the kind, or the group's where the weight is asymmetric. Kernels sum x * u
 * and take offset * sum(x) away. Every sum fits 32 bits: |x| <= 127, |u - offset| <= 255 and 16384
 * columns make 531 million, and digits that a kernel leaves shifted stay below 256.
 *
 * compute="exact". For each j of the four columns of a lane, in the order of columns:
 *
 *     part[j] = fma((float)(u - offset), x, part[j])      float32
 *     total   = total + ((part[0] + part[1]) + (part[2] + part[3])) * w_scale
 *
 * So every instruction set gives the same bits, for any number of tokens at once. Scales that are
 * not finite make totals that are not.
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
 * where c counts the padding of spans, which is zero; scales and owed are [spans][T].
 */
struct uc_tokens {
    const int8_t *codes;
    const float *values;
    const float *scales;
    const int32_t *owed; /* minus the sum of a span's codes */
    size_t count;
    size_t ahead; /* bytes from a line to the one to fetch with it; 0: the processor sees to it */
};

enum { UC_TOKENS = 16 }; /* at most at once */

/* A byte of trit5 by table: by its low 6 bits 7p + q, where p = 3 u0 + u1 and 4q + r = 9 u2 + 3 u3
 * + u4, to q | u0 << 4 | u1 << 6; then by q | r << 3, whatever the bit above, to u2 | u3 << 2 | u4
 * <<
 * 4. r is the byte's two high bits. */
extern const uint8_t uc_trit5_first[64], uc_trit5_second[64];

/* Multiply a panel with tokens; to: [tokens][16]. */
typedef void uc_multiply(const struct uc_layout *layout, const uint8_t *panel,
                         const struct uc_tokens *tokens, float *restrict to);

/* Read `count` values of a dtype as float32. */
typedef void uc_convert(enum uc_dtype dtype, const uint8_t *from, size_t count, float *restrict to);

/* Write `count` float32, rounded to the nearest even, as a dtype. */
typedef void uc_store(enum uc_dtype dtype, const float *from, size_t count, uint8_t *restrict to);

/* Round one span of one token to int8, as kernels/blocked.py quantize_activations says; `greatest`
 * is uc_most of the kind, `owed` is minus the sum of the codes. */
typedef void uc_quantize(const float *from, size_t count, float greatest, int8_t *restrict codes,
                         float *scale, int32_t *owed);

static inline size_t uc_lines_of(const struct uc_layout *layout, size_t span) {
    return span + 1 == layout->spans ? layout->last_lines : layout->span_lines;
}

/* Where a span's parts lie in its panel. */
struct uc_span {
    const uint8_t *scales, *offsets; /* of its group: [16] each */
    const uint8_t *lines;
    size_t count; /* of lines */
};

static inline struct uc_span uc_span_of(const struct uc_layout *layout, const uint8_t *panel,
                                        size_t span) {
    const size_t group = span * layout->scale_step, stretch = group / UC_STRETCH;
    const size_t own = group - stretch * UC_STRETCH, wide = uc_bytes_of(layout->scale_dtype);
    const int last = stretch + 1 == layout->stretches;
    const size_t groups = last ? layout->last_groups : UC_STRETCH;
    const size_t header = last ? layout->last_header : layout->header_bytes;
    const uint8_t *scales = panel + stretch * layout->stretch_bytes;
    return (struct uc_span){.scales = scales + own * UC_ROWS * wide,
                            .offsets = scales + (groups * wide + own) * UC_ROWS,
                            .lines = scales + header +
                                     (span - stretch * UC_STRETCH) * layout->span_lines * UC_LINE,
                            .count = uc_lines_of(layout, span)};
}

#endif
