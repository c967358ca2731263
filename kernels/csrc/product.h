/* Activations times a weight in panels: any number of tokens, any dtypes, several threads. */
#ifndef UC_PRODUCT_H
#define UC_PRODUCT_H

#include "layout.h"

struct uc_product {
    const uint8_t *x; /* [tokens][columns] of dtype */
    size_t x_bytes;
    const uint8_t *weight; /* panels */
    size_t weight_bytes;
    const uint8_t *bias; /* float32 [rows], or NULL */
    size_t bias_bytes;
    uint8_t *out; /* [tokens][rows] of dtype */
    size_t out_bytes;
    size_t tokens; /* 0 is fine */
    int dtype;
    int exact;
    unsigned threads; /* at least 1 */
};

/* Work between two looks at the pool. */
enum { UC_GRAIN_BYTES = 64 << 10 /* of weights */, UC_GRAIN_VALUES = 16 << 10 /* activations */ };

/* How many of a size fit in some bytes, at least one. */
static inline size_t uc_grain_of(size_t most, size_t size) {
    return size < most ? most / size : 1;
}

/* Add the bias to a token's results of rows row..row+rows-1, and write them. */
void uc_put(const struct uc_layout *layout, const struct uc_product *product, size_t token,
            size_t row, size_t rows, float *values);

/* Check all sizes, then multiply with the instruction set in use. */
enum uc_status uc_linear(const struct uc_layout *layout, const struct uc_product *product);

#endif
