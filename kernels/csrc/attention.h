/* Attention in bfloat16: causally of whole windows, where no query sees a key behind its own place,
 * and of the newest token of a window, which sees all.
 *
 *     weight[q][k] = softmax over k <= q of scale * sum over d of query[q][d] * key[k][d]
 *     out[q][d]    = sum over k of weight[q][k] * value[k][d]
 *
 * Products are of bfloat16 numbers, summed in float32. Of whole windows, weights are float32 until
 * they are rounded to bfloat16 for the second product, and their sum is taken before; of the newest
 * token they stay float32. Several heads may read one head of keys and values.
 */
#ifndef UC_ATTENTION_H
#define UC_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

enum { UC_WIDTH_STEP = 16, UC_WIDTH_MAX = 256 }; /* widths of a head: multiples of the step */

struct uc_heads {
    const uint16_t *data;
    size_t batch, head, token; /* strides, in numbers; a head's own numbers lie side by side */
};

struct uc_attention {
    size_t batch, heads, key_heads, tokens, width;
    struct uc_heads query, key, value;
    float scale;
    uint16_t *out; /* [batch][tokens][heads][width] */
};

/* Where uc_gram_usable. Returns 0 where there is no memory for a copy of keys and values. */
int uc_attention(const struct uc_attention *attention, unsigned threads);

/* The same of one query a head, the newest: what it is in `own` is the last of `tokens`, and out is
 * [batch][heads][width]. Where uc_attention_newest_usable. Returns 0 where there is no memory for
 * its weights. */
int uc_attention_newest_usable(void);
int uc_attention_newest(const struct uc_attention *attention, unsigned threads);

#endif
