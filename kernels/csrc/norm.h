/* Root-mean-square norms of rows as Llama defines them, to the bits that torch gives.
 *
 *     mean   = sum over i of x[i] * x[i], divided by the width       float32
 *     out[i] = weight[i] * rounded(x[i] * (1 / sqrt(mean + eps)))    both products rounded to dtype
 *
 * torch sums in `lanes` lanes, as wide as its registers: squares go round four streams of them,
 * sixteen rounds make a sum of a higher level, sixteen of those one of the next. At the end, levels
 * are added to the lowest, streams to the first, and the lanes one by one to the squares that did
 * not fill a vector.
 */
#ifndef UC_NORM_H
#define UC_NORM_H

#include "layout.h"

struct uc_norm {
    const uint8_t *x;      /* [rows][width] of dtype */
    const uint8_t *weight; /* [width] of dtype */
    uint8_t *out;          /* [rows][width] of dtype */
    size_t rows;
    size_t width; /* 1..UC_SPAN_MAX */
    enum uc_dtype dtype;
    float eps;
    unsigned lanes; /* 4, 8 or 16 */
};

/* Compute all rows, in this thread. */
void uc_norm(const struct uc_norm *norm);

#endif
