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

/* Check all sizes, then multiply with the instruction set in use. */
enum uc_status uc_linear(const struct uc_layout *layout, const struct uc_product *product);

#endif
