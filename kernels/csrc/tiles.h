/* Products of many tokens: two columns by one multiplication.
 *
 * With many tokens the pipes that multiply are what bounds a product (decision 3). Winograd's
 * identity halves their work: for activations x, digits d and any constants,
 *
 *     (x1 + L + d2)(x2 - H + d1) = x1 d1 + x2 d2 + T + R
 *     T = (x1 + L)(x2 - H) + LH      of the token alone
 *     R = (d2 + L)(d1 - H)           of the weight alone
 *
 * so that two columns take one multiplication and two additions, which other pipes do, and what is
 * of one side alone is worked out once for all partners of the other. With L = uc_most and H = 128
 * - L the first factor fits an unsigned byte and the second a signed one: that is why activations
 * stop at uc_most. All of it is exact, so the sums are those of panel.h, and so are the bits.
 * Weights of 8 bits have no room in a byte.
 *
 * A tile is up to 8 tokens by two panels. A slab is some spans of two panels, unpacked once for all
 * tokens of a chunk and small enough for the first cache.
 *
 * Paper: Winograd, A New Algorithm for Inner Product, IEEE Transactions on Computers C-17 (1968).
 */
#ifndef UC_TILES_H
#define UC_TILES_H

#include "layout.h"
#include "product.h"

enum { UC_TILE = 8, UC_SIDES = 2, UC_PAIR = 2 * UC_LANE };
enum { UC_SLAB_PAIRS = 80, UC_SLAB_SPANS = 16 };

/* Line 2k of a span's digits is the first of its pair k, line 2k + 1 the second (zeros where there
 * is none); padded spans start new pairs. */
struct uc_slab {
    _Alignas(64) uint8_t digits[UC_SLAB_PAIRS][UC_SIDES][2][UC_LINE];
    int32_t taken[UC_SLAB_SPANS][UC_SIDES][UC_ROWS];   /* minus the sum of R over the span */
    int32_t offsets[UC_SLAB_SPANS][UC_SIDES][UC_ROWS]; /* of asymmetric weights */
    float scales[UC_SLAB_SPANS][UC_SIDES][UC_ROWS];
};

/* The tokens of a tile, from the first span of a slab on. */
struct uc_tile {
    const uint8_t *codes;  /* [pairs][count][8]: four bytes x1 + L, then four x2 - H */
    const float *scales;   /* [spans][count], and so are the others */
    const int32_t *starts; /* minus the sums of T, and minus what a symmetric offset adds */
    const int32_t *owed;   /* minus the sums of the codes */
    size_t count;          /* of tokens, 1 to UC_TILE */
    /* Weights to fetch meanwhile, and how many bytes further with each pair. */
    const uint8_t *next[UC_SIDES];
    size_t next_step;
};

/* Unpack spans first..first+spans-1 of a panel into one side of a slab. */
typedef void uc_unpack(const struct uc_layout *layout, const uint8_t *panel, size_t first,
                       size_t spans, size_t side, struct uc_slab *slab);

/* Add the products of a tile with spans first..first+spans-1 to totals [count][UC_SIDES][16]. */
typedef void uc_multiply_tile(const struct uc_layout *layout, const struct uc_slab *slab,
                              size_t first, size_t spans, const struct uc_tile *tile,
                              float *restrict totals);

/* Lay `pairs` pairs of a token's span of codes out for tiles, 8 bytes every `step` bytes; codes are
 * padded with zeros. Returns the sum of T. */
typedef int32_t uc_lay(const int8_t *codes, size_t pairs, int32_t most, size_t step, uint8_t *to);

/* Pairs of a span, the last of a row being shorter. */
static inline size_t uc_pairs_of(const struct uc_layout *layout, size_t span) {
    size_t lines = span + 1 == layout->spans ? layout->last_lines : layout->span_lines;
    return (lines * uc_digits(layout->kind) + 1) / 2;
}

/* Can a product be worked out in tiles, and is that faster? */
int uc_tiles_fit(const struct uc_layout *layout, const struct uc_product *product);

/* The product, whose sizes were checked; UC_OK or UC_NO_MEMORY. */
enum uc_status uc_tiles(const struct uc_layout *layout, const struct uc_product *product);

#endif
