#include "product.h"

#include <stdlib.h>
#include <string.h>

#include "isa.h"
#include "pool.h"
#include "tiles.h"

enum {
    CHUNK_BYTES = 768 << 10, /* of activations at once: they stay in the second cache */
    CHUNK_TOKENS = 2 * UC_TOKENS
};

struct run {
    const struct uc_layout *layout;
    const struct uc_product *product;
    const struct uc_panels *panels;
    size_t start; /* first token of the chunk */
    size_t count; /* tokens of the chunk */
    int8_t *codes;
    float *values, *scales;
    int32_t *owed;
};

/* How many tokens go together when `left` are left: 16, 8, 4, 2 or 1. */
static size_t together(size_t left) {
    size_t count = UC_TOKENS;
    while (count > left)
        count /= 2;
    return count;
}

/* The tokens of the chunk from t on that go together. */
static struct uc_tokens tokens_at(const struct run *run, size_t t) {
    size_t at = t * run->layout->padded, span = t * run->layout->spans;
    const size_t count = together(run->count - t);
    struct uc_tokens tokens = {.count = count, .ahead = uc_ahead(count)};
    if (run->product->exact) {
        tokens.values = run->values + at;
    } else {
        tokens.codes = run->codes + at;
        tokens.scales = run->scales + span;
        tokens.owed = run->owed + span;
    }
    return tokens;
}

/* Lay one token's span out beside those of its `count` - 1 neighbours; `to` is its first value. */
static void spread_codes(const int8_t *from, size_t columns, size_t count, int8_t *to) {
    for (size_t i = 0; i < columns; i += UC_LANE, to += UC_LANE * count)
        memcpy(to, from + i, UC_LANE);
}

static void spread_values(const float *from, size_t columns, size_t count, float *to) {
    for (size_t i = 0; i < columns; i++)
        to[i * count] = from[i];
}

/* Lay tokens first..end-1 of the chunk out in spans, as int8 or float32. */
static void prepare(void *context, size_t first, size_t end) {
    const struct run *run = context;
    const struct uc_layout *layout = run->layout;
    const enum uc_dtype dtype = (enum uc_dtype)run->product->dtype;
    const size_t wide = uc_bytes_of(dtype);
    float values[UC_SPAN_MAX + UC_LINE];
    int8_t codes[UC_SPAN_MAX + UC_LINE];
    for (size_t t = first; t < end; t++) {
        const uint8_t *row = run->product->x + (run->start + t) * layout->columns * wide;
        /* Those before it in the chunk went together in the same way. */
        size_t block = t / UC_TOKENS * UC_TOKENS, count;
        while (block + (count = together(run->count - block)) <= t)
            block += count;
        for (size_t span = 0; span < layout->spans; span++) {
            size_t from = span * layout->span, left = layout->columns - from;
            size_t own = left < layout->span ? left : layout->span;
            size_t padded = uc_lines_of(layout, span) * UC_LANE * uc_digits(layout->kind);
            size_t at = block * layout->padded + span * layout->span_columns * count;
            run->panels->convert(dtype, row + from * wide, own, values);
            if (run->product->exact) {
                memset(values + own, 0, (padded - own) * sizeof(float));
                spread_values(values, padded, count, run->values + at + (t - block));
            } else {
                size_t index = block * layout->spans + span * count + (t - block);
                run->panels->quantize(values, own, (float)uc_most(layout->kind), codes,
                                      run->scales + index, run->owed + index);
                memset(codes + own, 0, padded - own);
                spread_codes(codes, padded, count, run->codes + at + UC_LANE * (t - block));
            }
        }
    }
}

void uc_put(const struct uc_layout *layout, const struct uc_product *product, size_t token,
            size_t row, size_t rows, float *values) {
    const enum uc_dtype dtype = (enum uc_dtype)product->dtype;
    for (size_t r = 0; product->bias && r < rows; r++) {
        float bias;
        memcpy(&bias, product->bias + (row + r) * sizeof bias, sizeof bias);
        values[r] += bias;
    }
    const size_t at = token * layout->rows + row;
    uc_isa_live()->panels->store(dtype, values, rows, product->out + at * uc_bytes_of(dtype));
}

/* Multiply panels first..end-1 with all tokens of the chunk. */
static void multiply(void *context, size_t first, size_t end) {
    const struct run *run = context;
    const struct uc_layout *layout = run->layout;
    const struct uc_product *product = run->product;
    uc_multiply *const own =
        (product->exact ? run->panels->exact : run->panels->dots)[layout->kind];
    float tile[UC_TOKENS * UC_ROWS];
    for (size_t panel = first; panel < end; panel++) {
        const uint8_t *data = product->weight + panel * layout->panel_bytes;
        size_t row = panel * UC_ROWS, left = layout->rows - row;
        size_t rows = left < UC_ROWS ? left : UC_ROWS;
        for (size_t t = 0; t < run->count;) {
            const struct uc_tokens tokens = tokens_at(run, t);
            own(layout, data, &tokens, tile);
            for (size_t i = 0; i < tokens.count; i++, t++) {
                uc_put(layout, product, run->start + t, row, rows, tile + i * UC_ROWS);
            }
        }
    }
}

static enum uc_status check(const struct uc_layout *layout, const struct uc_product *product) {
    if (product->dtype < 0 || product->dtype >= UC_DTYPES)
        return UC_BAD_DTYPE;
    size_t wide = uc_bytes_of((enum uc_dtype)product->dtype);
    if (product->weight_bytes != layout->bytes)
        return UC_BAD_WEIGHT_BYTES;
    if (product->tokens > SIZE_MAX / wide / layout->columns ||
        product->x_bytes != product->tokens * layout->columns * wide)
        return UC_BAD_INPUT_BYTES;
    if (product->tokens > SIZE_MAX / wide / layout->rows ||
        product->out_bytes != product->tokens * layout->rows * wide)
        return UC_BAD_OUTPUT_BYTES;
    if (product->bias && product->bias_bytes != layout->rows * sizeof(float))
        return UC_BAD_BIAS_BYTES;
    return UC_OK;
}

enum uc_status uc_linear(const struct uc_layout *layout, const struct uc_product *product) {
    enum uc_status status = check(layout, product);
    if (status != UC_OK || product->tokens == 0)
        return status;
    if (uc_tiles_fit(layout, product))
        return uc_tiles(layout, product);
    struct run run = {.layout = layout, .product = product, .panels = uc_isa_live()->panels};
    size_t row = layout->padded * (product->exact ? sizeof(float) : 1);
    size_t chunk = CHUNK_BYTES / row / UC_TOKENS * UC_TOKENS;
    chunk = chunk > CHUNK_TOKENS ? chunk : CHUNK_TOKENS;
    chunk = chunk < product->tokens ? chunk : product->tokens;
    size_t rows_bytes = (chunk * row + UC_LINE - 1) / UC_LINE * UC_LINE;
    size_t scales = chunk * layout->spans;
    uint8_t *memory = aligned_alloc(UC_LINE, rows_bytes + (scales * 8 / UC_LINE + 1) * UC_LINE);
    if (!memory)
        return UC_NO_MEMORY;
    if (product->exact) {
        run.values = (float *)(void *)memory;
    } else {
        run.codes = (int8_t *)memory;
        run.scales = (float *)(void *)(memory + rows_bytes);
        run.owed = (int32_t *)(void *)(run.scales + scales);
    }
    for (run.start = 0; run.start < product->tokens; run.start += chunk) {
        size_t left = product->tokens - run.start;
        run.count = left < chunk ? left : chunk;
        uc_run(product->threads, run.count, uc_grain_of(UC_GRAIN_VALUES, layout->columns), prepare,
               &run);
        uc_run(product->threads, layout->panels, uc_grain_of(UC_GRAIN_BYTES, layout->panel_bytes),
               multiply, &run);
    }
    free(memory);
    return UC_OK;
}
