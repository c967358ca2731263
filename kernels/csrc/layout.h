/* A quantized weight in panels of 16 output rows: where everything lies.
 *
 * The picture, kind by kind, is in kernels/blocked.py, which is the contract. In short, a panel is
 * a row of stretches of up to UC_STRETCH groups, each of
 *
 *     scales   [groups][16] in the dtype of the file
 *     offsets  [groups][16] uint8, asymmetric weights only
 *     zeros    up to a multiple of 64 bytes
 *     lines    64 bytes each, group by group; byte 4r+j holds, for row r, the columns k+j, k+4+j...
 *
 * so that whoever multiplies reads one stream from the first byte to the last.
 *
 * A span is the columns whose activations share a scale: a group, or UC_SPAN columns where a row
 * has one scale. Spans start on lines. Activations are laid out to match: each span is padded with
 * zeros to whole lines, so column c of span s lies at s * span_columns + c.
 *
 * All sizes are checked by uc_layout_of, so that no product or sum of them overflows: rows and
 * columns are at most 2^28, and a span at most 2^14 columns, for which no 32-bit sum overflows (see
 * panel.h).
 */
#ifndef UC_LAYOUT_H
#define UC_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

enum { UC_ROWS = 16, UC_LANE = 4, UC_LINE = 64, UC_STRETCH = 4, UC_SPAN = 320 };
enum { UC_SPAN_MAX = 16384 };
enum uc_kind { UC_INT8, UC_INT4, UC_INT2, UC_TRIT5, UC_BIT1, UC_KINDS };
enum uc_dtype { UC_FLOAT32, UC_FLOAT16, UC_BFLOAT16, UC_DTYPES };

/* What can be wrong; uc_sentence says it in words. */
enum uc_status {
    UC_OK,
    UC_BAD_KIND,
    UC_BAD_DTYPE,
    UC_BAD_SHAPE,
    UC_BAD_GROUP,
    UC_LONG_SPAN,
    UC_BAD_WEIGHT_BYTES,
    UC_BAD_INPUT_BYTES,
    UC_BAD_OUTPUT_BYTES,
    UC_BAD_BIAS_BYTES,
    UC_BAD_CODES,
    UC_NO_MEMORY,
    UC_NO_ISA
};

struct uc_layout {
    enum uc_kind kind;
    enum uc_dtype scale_dtype;
    size_t rows, columns, groups, panels;
    size_t group;         /* columns of a group; the last may have fewer */
    size_t span;          /* columns of a span; the last may have fewer */
    size_t spans;         /* of a row */
    size_t span_lines;    /* of every span but the last */
    size_t last_lines;    /* of the last span */
    size_t span_columns;  /* of a span with its padding */
    size_t padded;        /* columns of a row of activations with the padding of all spans */
    size_t scale_step;    /* 1: a span is a group; 0: all spans share the one group's scale */
    size_t stretches;     /* of a panel */
    size_t last_groups;   /* of the last stretch */
    size_t header_bytes;  /* before the lines of every stretch but the last */
    size_t last_header;   /* before those of the last */
    size_t stretch_bytes; /* of every stretch but the last */
    size_t panel_lines, panel_bytes, bytes;
    int symmetric;
};

/* Columns of a digit's turn and what is added to a code to make its digit, by kind. */
static inline size_t uc_digits(enum uc_kind kind) {
    static const unsigned char digits[UC_KINDS] = {1, 2, 4, 5, 8};
    return digits[kind];
}

static inline int32_t uc_offset(enum uc_kind kind) {
    static const unsigned char offset[UC_KINDS] = {128, 8, 2, 1, 1};
    return offset[kind];
}

/* The greatest activation: such that a sum with a digit is a byte, see tiles_avx512vnni.c. */
static inline int32_t uc_most(enum uc_kind kind) {
    static const unsigned char most[UC_KINDS] = {127, 120, 126, 126, 126};
    return most[kind];
}

static inline size_t uc_bytes_of(enum uc_dtype dtype) {
    return dtype == UC_FLOAT32 ? 4 : 2;
}

/* Work a layout out. group: columns, or -1 for one scale a row. Returns UC_OK or what is wrong. */
enum uc_status uc_layout_of(struct uc_layout *to, int kind, long long rows, long long columns,
                            long long group, int symmetric, int scale_dtype);

/* Lay codes int8 [rows][columns], scales [rows][groups] and, for asymmetric weights, zero points
 * int8 [rows][groups] out in panels; data has `bytes` bytes. UC_BAD_CODES where a code or a zero
 * point does not fit the kind; data is then partly written. */
enum uc_status uc_block(const struct uc_layout *layout, const int8_t *codes, const uint8_t *scales,
                        const int8_t *zeros, uint8_t *data, unsigned threads);

const char *uc_sentence(enum uc_status status);

#endif
