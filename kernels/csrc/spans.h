/* The scale of every group of a weight, by least squares over a few spans (compress/grid.py).
 *
 * For a span s of a group, codes are c = nearest even of w / s within the range less the zero
 * point; `sum u w c / sum u c c` is the scale that fits them best, u what a column's error costs,
 * and `(sum u w c)^2 / sum u c c` what it takes off the error. The span that takes most wins, the
 * first of equals, and is polished: once more with the scale that it gave.
 *
 * Sums are float32: lane l of sixteen adds columns l, l + 16, ..., then the lanes are added in
 * order. Nothing is fused, so every instruction set gives the same bits.
 */
#ifndef UC_SPANS_H
#define UC_SPANS_H

#include <stddef.h>

enum { UC_SPANS = 8 };

struct uc_spans {
    size_t rows, columns, group; /* columns of a group; the last may be shorter */
    const float *weight;         /* [rows][columns] */
    const float *cost;           /* [columns] */
    const float *shares;         /* [UC_SPANS], of the span from extreme to extreme */
    int polish;                  /* how often */
    int symmetric;
    float low, high; /* the least and the greatest code */
    float *scale;    /* [rows][groups], written */
    float *zero;     /* [rows][groups], written unless symmetric */
};

void uc_spans(const struct uc_spans *spans, unsigned threads);

#endif
