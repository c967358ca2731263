/* A few tokens times a dense weight in bfloat16, which is mostly a model's head.
 *
 *     out[t][r] = sum over c of x[t][c] * weight[r][c]
 *
 * Products of two bfloat16 are exact in float32, where they are summed, in an order that depends on
 * the columns alone; the sum is rounded to bfloat16.
 */
#ifndef UC_HEAD_H
#define UC_HEAD_H

#include <stddef.h>
#include <stdint.h>

enum { UC_HEAD_TOKENS = 4 /* at most at once */, UC_HEAD_STEP = 32 /* divides the columns */ };

struct uc_head {
    const uint16_t *x;      /* [tokens][columns] */
    const uint16_t *weight; /* [rows][columns] */
    uint16_t *out;          /* [tokens][rows] */
    size_t tokens, rows, columns;
};

/* Does this processor have AVX2? There is no other version. */
int uc_head_usable(void);

/* Returns 0 where there is no memory for the tokens in float32; nothing is written then. */
int uc_head(const struct uc_head *head, unsigned threads);

#endif
