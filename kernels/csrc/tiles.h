/* Products of many tokens: weights unpacked to bytes once for all tokens of a chunk.
 *
 * A slab is some spans of two panels, small enough for the first cache. Tiles of tokens meet it one
 * after the other, and a chunk of tokens all slabs. How a tile meets a slab is a tiling: Winograd's
 * identity in tiles_avx512vnni.c, AMX in tiles_amx.c. All of it is exact up to the float tail,
 * which is that of panel.h, and so are the bits.
 */
#ifndef UC_TILES_H
#define UC_TILES_H

#include "layout.h"
#include "product.h"

enum { UC_SIDES = 2, UC_SLAB_COLUMNS = 640, UC_SLAB_SPANS = 16 };

/* Line d of a span has the digits of its columns 4d to 4d + 3, [16 rows][4]. Spans are padded with
 * lines of zeros to whole steps of the tiling. */
struct uc_slab {
    _Alignas(64) uint8_t digits[UC_SIDES][UC_SLAB_COLUMNS / UC_LANE][UC_LINE];
    int32_t taken[UC_SLAB_SPANS][UC_SIDES][UC_ROWS];   /* the tiling's own */
    int32_t offsets[UC_SLAB_SPANS][UC_SIDES][UC_ROWS]; /* of asymmetric weights */
    float scales[UC_SLAB_SPANS][UC_SIDES][UC_ROWS];
};

/* The tokens of a tile, from the first span of a slab on. */
struct uc_tile {
    const uint8_t *codes;  /* [steps][count][columns of a step], as the tiling lays them out */
    const float *scales;   /* [spans][count], and so are the others */
    const int32_t *starts; /* minus what `lay` returned, and minus what a symmetric offset adds */
    const int32_t *owed;   /* minus the sums of the codes */
    size_t count;          /* of tokens */
    /* Weights to fetch meanwhile, and how many bytes further with each step; 0: none. */
    const uint8_t *next[UC_SIDES];
    size_t next_step;
};

/* Unpack spans first..first+spans-1 of a panel into one side of a slab, each padded with zeros to a
 * multiple of `lines` lines. */
typedef void uc_unpack(const struct uc_layout *layout, const uint8_t *panel, size_t first,
                       size_t spans, size_t lines, size_t side, struct uc_slab *slab);

/* Work out once what one side of a slab needs for all tiles. */
typedef void uc_settle(const struct uc_layout *layout, size_t first, size_t spans, size_t side,
                       struct uc_slab *slab);

/* Lay `steps` steps of a token's span of codes out, a step every `stride` bytes; codes are padded
 * with zeros. Returns what of the sums is of the token alone. */
typedef int32_t uc_lay(const int8_t *codes, size_t steps, int32_t most, size_t stride, uint8_t *to);

/* Add the products of a tile with spans first..first+spans-1 to totals [count][UC_SIDES][16]. */
typedef void uc_multiply_tile(const struct uc_layout *layout, const struct uc_slab *slab,
                              size_t first, size_t spans, const struct uc_tile *tile,
                              float *restrict totals);

struct uc_tiling {
    int (*usable)(void); /* NULL: wherever its panels are */
    size_t least;        /* tokens from which on it is faster than panels alone */
    size_t tokens;       /* of a tile, at most */
    size_t rounding;     /* tiles have a multiple of so many */
    size_t step;         /* columns that are multiplied together */
    int bytes;           /* takes digits of 8 bits */
    uc_settle *settle; /* NULL: digits serve as they are */
    uc_lay *lay;
    uc_multiply_tile *multiply;
    void (*begin)(void), (*end)(void); /* around a stretch of work of one thread; may be NULL */
};

/* Steps of a span, the last of a row being shorter. */
static inline size_t uc_steps_of(const struct uc_layout *layout, size_t span, size_t step) {
    size_t lines = span + 1 == layout->spans ? layout->last_lines : layout->span_lines;
    return (lines * uc_digits(layout->kind) * UC_LANE + step - 1) / step;
}

/* Can a product be worked out in tiles, and is that faster? */
int uc_tiles_fit(const struct uc_layout *layout, const struct uc_product *product);

/* The product, whose sizes were checked; UC_OK or UC_NO_MEMORY. */
enum uc_status uc_tiles(const struct uc_layout *layout, const struct uc_product *product);

#endif
