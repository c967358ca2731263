#include "tiles.h"

#include <stdlib.h>
#include <string.h>

#include "isa.h"
#include "pool.h"

enum {
    CHUNK_BYTES = 768 << 10, /* of activations at once: they stay in the second cache ... */
    CHUNK_LEAST = 128,       /* ... unless that were so few that unpacking would show */
    CHUNK_MOST = 256
};

struct run {
    const struct uc_layout *layout;
    const struct uc_product *product;
    const struct uc_panels *panels;
    const struct uc_tiling *tiling;
    size_t start, count; /* first token of the chunk, and how many it has */
    size_t room;         /* for them, filled up to whole tiles of the least size */
    size_t spans;        /* of a slab */
    uint8_t *codes;
    float *scales;
    int32_t *starts, *owed;
};

/* The tokens of the tile that begins with token t of the chunk. */
static size_t tile_of(const struct run *run, size_t t) {
    size_t left = run->room - t;
    return left < run->tiling->tokens ? left : run->tiling->tokens;
}

/* Spans of the slab that begins with a span. */
static size_t slab_of(const struct run *run, size_t span) {
    size_t left = run->layout->spans - span;
    return left < run->spans ? left : run->spans;
}

static size_t steps_of(const struct run *run, size_t span) {
    return uc_steps_of(run->layout, span, run->tiling->step);
}

/* Where the codes of a tile's tokens begin that meet a slab: slab after slab, each of them tile
 * after tile, as they are read. */
static size_t codes_at(const struct run *run, size_t t, size_t span) {
    const size_t own = slab_of(run, span), whole = steps_of(run, 0);
    const size_t steps = (own - 1) * whole + steps_of(run, span + own - 1);
    return run->tiling->step * (span * whole * run->room + t * steps);
}

/* Lay tokens first..end-1 of the chunk's room out. */
static void prepare(void *context, size_t first, size_t end) {
    const struct run *run = context;
    const struct uc_layout *layout = run->layout;
    const enum uc_dtype dtype = (enum uc_dtype)run->product->dtype;
    const int32_t most = uc_most(layout->kind);
    const size_t wide = uc_bytes_of(dtype), step = run->tiling->step;
    float values[UC_SLAB_COLUMNS];
    int8_t codes[UC_SLAB_COLUMNS + UC_LINE] = {0};
    for (size_t t = first; t < end; t++) {
        /* Those that only fill a tile are the first once more, and nobody looks. */
        const size_t token = run->start + (t < run->count ? t : 0);
        const uint8_t *row = run->product->x + token * layout->columns * wide;
        const size_t block = t / run->tiling->tokens * run->tiling->tokens;
        const size_t count = tile_of(run, block), stride = step * count;
        uint8_t *to = NULL;
        for (size_t span = 0; span < layout->spans; span++) {
            size_t from = span * layout->span, left = layout->columns - from;
            size_t own = left < layout->span ? left : layout->span;
            size_t steps = steps_of(run, span);
            if (span % run->spans == 0)
                to = run->codes + codes_at(run, block, span) + step * (t - block);
            size_t index = block * layout->spans + span * count + (t - block);
            run->panels->convert(dtype, row + from * wide, own, values);
            run->panels->quantize(values, own, (float)most, codes, run->scales + index,
                                  run->owed + index);
            memset(codes + own, 0, steps * step - own);
            int32_t sum = run->tiling->lay(codes, steps, most, stride, to);
            int32_t offset = layout->symmetric ? uc_offset(layout->kind) : 0;
            run->starts[index] = offset * run->owed[index] - sum;
            to += steps * stride;
        }
    }
}

/* The panel of a side; where the second is missing, the first is there twice and nobody looks. */
static const uint8_t *panel_at(const struct run *run, size_t pair, size_t side) {
    const size_t last = run->layout->panels - 1, panel = UC_SIDES * pair + side;
    return run->product->weight + (panel < last ? panel : last) * run->layout->panel_bytes;
}

/* Where the lines of the slab behind the one that begins with `span` lie. */
static const uint8_t *after(const struct run *run, size_t pair, size_t side, size_t span) {
    const size_t next = span + slab_of(run, span), more = next < run->layout->spans;
    return uc_span_of(run->layout, panel_at(run, pair + !more, side), more ? next : 0).lines;
}

/* Unpack the slab that begins with a span. */
static void unpack(const struct run *run, size_t pair, size_t span, struct uc_slab *slab) {
    const struct uc_layout *layout = run->layout;
    const size_t own = slab_of(run, span), lines = run->tiling->step / UC_LANE;
    for (size_t side = 0; side < UC_SIDES; side++) {
        run->panels->unpack[layout->kind](layout, panel_at(run, pair, side), span, own, lines, side,
                                          slab);
        if (run->tiling->settle)
            run->tiling->settle(layout, span, own, side, slab);
    }
}

/* Multiply pairs of panels first..end-1 with all tokens of the chunk. */
static void multiply(void *context, size_t first, size_t end) {
    const struct run *run = context;
    const struct uc_layout *layout = run->layout;
    struct uc_slab slab;
    _Alignas(64) float totals[CHUNK_MOST * UC_SIDES * UC_ROWS];
    if (run->tiling->begin)
        run->tiling->begin();
    for (size_t pair = first; pair < end; pair++) {
        memset(totals, 0, run->room * UC_SIDES * UC_ROWS * sizeof *totals);
        for (size_t span = 0; span < layout->spans; span += run->spans) {
            const size_t own = slab_of(run, span);
            unpack(run, pair, span, &slab);
            for (size_t t = 0, count; t < run->room; t += count) {
                count = tile_of(run, t);
                const size_t index = t * layout->spans + span * count;
                struct uc_tile tile = {.codes = run->codes + codes_at(run, t, span),
                                       .scales = run->scales + index,
                                       .starts = run->starts + index,
                                       .owed = run->owed + index,
                                       .count = count,
                                       .next = {slab.digits[0][0], slab.digits[0][0]}};
                if (t == 0) {
                    tile.next[0] = after(run, pair, 0, span);
                    tile.next[1] = after(run, pair, 1, span);
                    tile.next_step = run->tiling->step * UC_ROWS / uc_digits(layout->kind);
                }
                run->tiling->multiply(layout, &slab, span, own, &tile,
                                      totals + t * UC_SIDES * UC_ROWS);
            }
        }
        const size_t row = pair * UC_SIDES * UC_ROWS, rows = layout->rows - row;
        for (size_t t = 0; t < run->count; t++)
            uc_put(layout, run->product, run->start + t, row,
                   rows < UC_SIDES * UC_ROWS ? rows : UC_SIDES * UC_ROWS,
                   totals + t * UC_SIDES * UC_ROWS);
    }
    if (run->tiling->end)
        run->tiling->end();
}

int uc_tiles_fit(const struct uc_layout *layout, const struct uc_product *product) {
    const struct uc_tiling *tiling = uc_isa_live()->tiling;
    return tiling && !product->exact && product->tokens >= tiling->least &&
           (tiling->bytes || uc_digits(layout->kind) > 1) &&
           uc_steps_of(layout, 0, tiling->step) * tiling->step <= UC_SLAB_COLUMNS;
}

enum uc_status uc_tiles(const struct uc_layout *layout, const struct uc_product *product) {
    const struct uc_isa *isa = uc_isa_live();
    const struct uc_tiling *tiling = isa->tiling;
    struct run run = {
        .layout = layout, .product = product, .panels = isa->panels, .tiling = tiling};
    const size_t whole = steps_of(&run, 0) * tiling->step;
    const size_t row =
        (layout->spans - 1) * whole + steps_of(&run, layout->spans - 1) * tiling->step;
    const size_t spans = UC_SLAB_COLUMNS / whole;
    run.spans = spans < UC_SLAB_SPANS ? spans : UC_SLAB_SPANS;
    size_t chunk = CHUNK_BYTES / row / tiling->tokens * tiling->tokens;
    chunk = chunk > CHUNK_LEAST ? chunk : CHUNK_LEAST;
    chunk = chunk < CHUNK_MOST ? chunk : CHUNK_MOST;
    /* Equal chunks of whole tiles: a short last one would unpack all weights for little. */
    const size_t chunks = (product->tokens + chunk - 1) / chunk;
    chunk = (product->tokens + chunks - 1) / chunks;
    chunk = (chunk + tiling->tokens - 1) / tiling->tokens * tiling->tokens;
    const size_t codes = (chunk * row + UC_LINE - 1) / UC_LINE * UC_LINE;
    const size_t scales = chunk * layout->spans;
    uint8_t *memory = aligned_alloc(UC_LINE, codes + (scales * 12 / UC_LINE + 1) * UC_LINE);
    if (!memory)
        return UC_NO_MEMORY;
    run.codes = memory;
    run.scales = (float *)(void *)(memory + codes);
    run.starts = (int32_t *)(void *)(run.scales + scales);
    run.owed = run.starts + scales;
    for (run.start = 0; run.start < product->tokens; run.start += chunk) {
        size_t left = product->tokens - run.start;
        run.count = left < chunk ? left : chunk;
        run.room = (run.count + tiling->rounding - 1) / tiling->rounding * tiling->rounding;
        uc_run(product->threads, run.room, uc_grain_of(UC_GRAIN_VALUES, layout->columns), prepare,
               &run);
        uc_run(product->threads, (layout->panels + UC_SIDES - 1) / UC_SIDES,
               uc_grain_of(UC_GRAIN_BYTES, UC_SIDES * layout->panel_bytes), multiply, &run);
    }
    free(memory);
    return UC_OK;
}
