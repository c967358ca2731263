#include "layout.h"

#include <stdatomic.h>
#include <string.h>

#include "pool.h"

enum { MOST = 1 << 28 };

static size_t lines_of(const struct uc_layout *layout, size_t columns) {
    size_t line = UC_LANE * uc_digits(layout->kind);
    return (columns + line - 1) / line;
}

/* Bytes before the lines of a stretch. */
static size_t header_of(const struct uc_layout *layout, size_t groups) {
    size_t bytes = groups * UC_ROWS * (uc_bytes_of(layout->scale_dtype) + !layout->symmetric);
    return (bytes + UC_LINE - 1) / UC_LINE * UC_LINE;
}

enum uc_status uc_layout_of(struct uc_layout *to, int kind, long long rows, long long columns,
                            long long group, int symmetric, int scale_dtype) {
    if (kind < 0 || kind >= UC_KINDS)
        return UC_BAD_KIND;
    if (scale_dtype < 0 || scale_dtype >= UC_DTYPES)
        return UC_BAD_DTYPE;
    if (rows < 1 || rows > MOST || columns < 1 || columns > MOST)
        return UC_BAD_SHAPE;
    if (group != -1 && (group < 1 || group > MOST))
        return UC_BAD_GROUP;
    if (group > UC_SPAN_MAX)
        return UC_LONG_SPAN;
    struct uc_layout layout = {.kind = (enum uc_kind)kind,
                               .scale_dtype = (enum uc_dtype)scale_dtype,
                               .rows = (size_t)rows,
                               .columns = (size_t)columns,
                               .group = group == -1 ? (size_t)columns : (size_t)group,
                               .span = group == -1 ? UC_SPAN : (size_t)group,
                               .scale_step = group != -1,
                               .symmetric = symmetric != 0};
    layout.groups = (layout.columns + layout.group - 1) / layout.group;
    layout.spans = (layout.columns + layout.span - 1) / layout.span;
    layout.panels = (layout.rows + UC_ROWS - 1) / UC_ROWS;
    layout.span_lines = lines_of(&layout, layout.span);
    layout.last_lines = lines_of(&layout, layout.columns - (layout.spans - 1) * layout.span);
    layout.span_columns = layout.span_lines * UC_LANE * uc_digits(layout.kind);
    layout.panel_lines = (layout.spans - 1) * layout.span_lines + layout.last_lines;
    layout.padded = layout.panel_lines * UC_LANE * uc_digits(layout.kind);
    layout.stretches = (layout.groups + UC_STRETCH - 1) / UC_STRETCH;
    layout.last_groups = layout.groups - (layout.stretches - 1) * UC_STRETCH;
    layout.header_bytes = header_of(&layout, UC_STRETCH);
    layout.last_header = header_of(&layout, layout.last_groups);
    layout.stretch_bytes = layout.header_bytes + UC_STRETCH * layout.span_lines * UC_LINE;
    layout.panel_bytes = (layout.stretches - 1) * layout.header_bytes + layout.last_header +
                         layout.panel_lines * UC_LINE;
    layout.bytes = layout.panels * layout.panel_bytes;
    *to = layout;
    return UC_OK;
}

struct blocking {
    const struct uc_layout *layout;
    const int8_t *codes;
    const uint8_t *scales;
    const int8_t *zeros;
    uint8_t *data;
    atomic_int wrong;
};

/* The digit of a code; `*spilled` gets a bit where it does not fit. */
static inline uint32_t digit_of(int8_t code, enum uc_kind kind, uint32_t *spilled) {
    static const uint32_t radix[UC_KINDS] = {256, 16, 4, 3, 3};
    uint32_t digit = (uint32_t)((int32_t)code + uc_offset(kind));
    *spilled |= digit >= radix[kind];
    return digit;
}

/* Pack one row's columns of one group; `to` is byte 4r of its first line. */
static inline __attribute__((always_inline)) uint32_t pack_row(const int8_t *from, size_t columns,
                                                               enum uc_kind kind, uint8_t *to) {
    const size_t digits = uc_digits(kind), line = UC_LANE * digits;
    uint32_t spilled = 0;
    for (size_t at = 0; at < columns; at += line, to += UC_LINE) {
        int8_t part[32] = {0};
        const int8_t *own = from + at;
        if (columns - at < line) {
            /* Digits of columns that pad a group are 0, as in kernels/blocked.py. */
            memset(part, -uc_offset(kind), sizeof part);
            memcpy(part, own, columns - at);
            own = part;
        }
        for (size_t j = 0; j < UC_LANE; j++) {
            uint32_t byte = 0;
            if (kind == UC_TRIT5) {
                uint32_t trit[5];
                for (size_t i = 0; i < 5; i++)
                    trit[i] = digit_of(own[4 * i + j], kind, &spilled);
                uint32_t pair = 3 * trit[0] + trit[1];
                uint32_t rest = 9 * trit[2] + 3 * trit[3] + trit[4];
                byte = 7 * pair + rest / 4 + rest % 4 * 64;
            } else if (kind == UC_BIT1) {
                for (size_t i = 0; i < 8; i++) {
                    uint32_t digit = digit_of(own[4 * i + j], kind, &spilled);
                    spilled |= digit & 1;
                    byte |= digit >> 1 << i;
                }
            } else {
                for (size_t i = 0; i < digits; i++)
                    byte |= digit_of(own[4 * i + j], kind, &spilled) << (8 / digits * i);
            }
            to[j] = (uint8_t)byte;
        }
    }
    return spilled;
}

static uint32_t pack_group(const int8_t *from, size_t columns, enum uc_kind kind, uint8_t *to) {
    switch (kind) {
    case UC_INT8:
        return pack_row(from, columns, UC_INT8, to);
    case UC_INT4:
        return pack_row(from, columns, UC_INT4, to);
    case UC_INT2:
        return pack_row(from, columns, UC_INT2, to);
    case UC_TRIT5:
        return pack_row(from, columns, UC_TRIT5, to);
    default:
        return pack_row(from, columns, UC_BIT1, to);
    }
}

/* Lay the groups of one stretch of a panel out; rows that pad the panel are zeros. */
static uint32_t block_stretch(const struct blocking *own, size_t panel, size_t stretch,
                              uint8_t *data) {
    const struct uc_layout *layout = own->layout;
    const size_t wide = uc_bytes_of(layout->scale_dtype), first = stretch * UC_STRETCH;
    const int last = stretch + 1 == layout->stretches;
    const size_t groups = last ? layout->last_groups : UC_STRETCH;
    const size_t header = last ? layout->last_header : layout->header_bytes;
    uint8_t *scales = data + stretch * layout->stretch_bytes;
    uint8_t *offsets = scales + groups * UC_ROWS * wide, *lines = scales + header;
    size_t rows = layout->rows - panel * UC_ROWS;
    rows = rows < UC_ROWS ? rows : UC_ROWS;
    uint32_t spilled = 0;
    memset(scales, 0, header);
    for (size_t i = 0; i < groups; i++) {
        size_t group = first + i, start = group * layout->group, left = layout->columns - start;
        size_t columns = left < layout->group ? left : layout->group;
        size_t size = lines_of(layout, columns) * UC_LINE;
        if (rows < UC_ROWS)
            memset(lines, 0, size);
        for (size_t r = 0; r < rows; r++) {
            size_t row = panel * UC_ROWS + r, at = row * layout->groups + group;
            spilled |= pack_group(own->codes + row * layout->columns + start, columns, layout->kind,
                                  lines + UC_LANE * r);
            memcpy(scales + (i * UC_ROWS + r) * wide, own->scales + at * wide, wide);
            if (!layout->symmetric)
                offsets[i * UC_ROWS + r] =
                    (uint8_t)digit_of(own->zeros[at], layout->kind, &spilled);
        }
        lines += size;
    }
    return spilled;
}

static void block_panels(void *context, size_t first, size_t end) {
    struct blocking *own = context;
    uint32_t spilled = 0;
    for (size_t panel = first; panel < end; panel++)
        for (size_t stretch = 0; stretch < own->layout->stretches; stretch++)
            spilled |=
                block_stretch(own, panel, stretch, own->data + panel * own->layout->panel_bytes);
    if (spilled)
        atomic_store(&own->wrong, 1);
}

enum uc_status uc_block(const struct uc_layout *layout, const int8_t *codes, const uint8_t *scales,
                        const int8_t *zeros, uint8_t *data, unsigned threads) {
    struct blocking own = {layout, codes, scales, zeros, data, 0};
    uc_run(threads, layout->panels, 1, block_panels, &own);
    return atomic_load(&own.wrong) ? UC_BAD_CODES : UC_OK;
}

const char *uc_sentence(enum uc_status status) {
    switch (status) {
    case UC_OK:
        return "nothing is wrong";
    case UC_BAD_KIND:
        return "no such kind of weight";
    case UC_BAD_DTYPE:
        return "no such dtype";
    case UC_BAD_SHAPE:
        return "rows and columns must be between 1 and 2^28";
    case UC_BAD_GROUP:
        return "a group is 1 to 2^28 columns, or -1";
    case UC_LONG_SPAN:
        return "a group is longer than the 16384 columns that 32-bit sums hold";
    case UC_BAD_WEIGHT_BYTES:
        return "the weight does not have the bytes that its sizes say";
    case UC_BAD_INPUT_BYTES:
        return "the input does not have the bytes that its sizes say";
    case UC_BAD_OUTPUT_BYTES:
        return "the output does not have the bytes that its sizes say";
    case UC_BAD_BIAS_BYTES:
        return "the bias does not have the bytes that its sizes say";
    case UC_BAD_CODES:
        return "codes or zero points do not fit the kind";
    case UC_NO_MEMORY:
        return "no memory for the activations";
    case UC_NO_ISA:
        return "no such instruction set, or not on this machine";
    }
    return "unknown";
}
