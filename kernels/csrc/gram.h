/* Products of activations with activations, summed over tokens: what second moments are made of.
 *
 *     total[i][j] += sum over t of left[t][i] * right[t][j]
 *
 * Inputs are bfloat16, sums float32: a product of two bfloat16 is exact in float32, so nothing is
 * rounded but the sums, token pair after token pair. Numbers below 2^-126 count as zero.
 */
#ifndef UC_GRAM_H
#define UC_GRAM_H

#include <stddef.h>
#include <stdint.h>

struct uc_gram {
    size_t tokens, rows, columns;
    const uint16_t *left;  /* [tokens][rows] */
    const uint16_t *right; /* [tokens][columns] */
    float *total;          /* [rows][columns] */
    int upper;             /* only what stands on or above the diagonal has to be right */
};

/* Does this processor have the instructions? There is no other version. */
int uc_gram_usable(void);

/* Add to the total. Returns 0 where there is no memory for a copy; nothing is written then. */
int uc_gram(const struct uc_gram *gram, unsigned threads);

#endif
