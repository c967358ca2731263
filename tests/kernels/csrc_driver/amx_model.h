/* The instructions of kernels/csrc/amx.h in C, to run tiles_amx.c where there is no AMX.
 *
 * Written from the operations and the exceptions that the manual lists for each instruction
 * (palette 1: eight tiles of up to 16 rows of 64 bytes). What would be a fault there ends the
 * process here. Every thread has tiles of its own, and a stretch of work that leaves some
 * configured is a fault of the next.
 *
 * UC_AMX_WRONG in the environment makes one mistake, so that tests can show that they would notice:
 *
 *     1   digits are read as unsigned
 *     2   the operands change places
 *     3   sums of four products stop at 16 bits
 *     4   a multiplication begins anew
 *
 * Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
 */
#ifndef UC_AMX_MODEL_H
#define UC_AMX_MODEL_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef UC_AMX_PART
#define UC_AMX_PART static inline
#endif

enum { UC_AMX_TILES = 8, UC_AMX_ROWS = 16, UC_AMX_COLUMNS = 64 };

struct uc_amx_shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t columns[16];
    uint8_t rows[16];
};

static _Thread_local struct {
    int wrong;
    struct uc_amx_shape shape; /* palette 0: not configured */
    uint8_t tile[UC_AMX_TILES][UC_AMX_ROWS][UC_AMX_COLUMNS];
} uc_amx;

UC_AMX_PART void uc_amx_require(int holds, const char *instruction, const char *what) {
    if (!holds) {
        fprintf(stderr, "%s: fault: %s\n", instruction, what);
        abort();
    }
}

/* A tile that an instruction names: there, configured, not empty. */
UC_AMX_PART void uc_amx_named(int tile, const char *instruction) {
    uc_amx_require(uc_amx.shape.palette == 1, instruction, "no tiles are configured");
    uc_amx_require(tile >= 0 && tile < UC_AMX_TILES, instruction, "no such tile");
    uc_amx_require(uc_amx.shape.rows[tile] && uc_amx.shape.columns[tile], instruction,
                   "the tile is not configured");
}

UC_AMX_PART void uc_amx_release(void) {
    memset(&uc_amx, 0, sizeof uc_amx);
}

UC_AMX_PART void uc_amx_configure(const void *from) {
    static const char own[] = "ldtilecfg";
    struct uc_amx_shape shape;
    memcpy(&shape, from, sizeof shape);
    uc_amx_require(uc_amx.shape.palette == 0, own, "tiles were left configured");
    uc_amx_require(shape.palette <= 1, own, "no such palette");
    for (size_t i = 0; i < sizeof shape.reserved; i++)
        uc_amx_require(shape.reserved[i] == 0, own, "reserved bytes");
    for (int tile = 0; tile < 16; tile++) {
        const int there = tile < UC_AMX_TILES, rows = shape.rows[tile],
                  columns = shape.columns[tile];
        uc_amx_require(rows <= (there ? UC_AMX_ROWS : 0), own, "too many rows");
        uc_amx_require(columns <= (there ? UC_AMX_COLUMNS : 0), own, "too many columns");
        uc_amx_require(!rows == !columns, own, "rows without columns");
    }
    uc_amx_release();
    uc_amx.shape = shape;
    const char *wrong = getenv("UC_AMX_WRONG");
    uc_amx.wrong = wrong ? atoi(wrong) : 0;
}

UC_AMX_PART void uc_amx_zero(int tile) {
    uc_amx_named(tile, "tilezero");
    memset(uc_amx.tile[tile], 0, sizeof uc_amx.tile[tile]);
}

UC_AMX_PART void uc_amx_load(int tile, const void *from, int64_t stride) {
    uc_amx_named(tile, "tileloadd");
    memset(uc_amx.tile[tile], 0, sizeof uc_amx.tile[tile]);
    for (int row = uc_amx.shape.start_row; row < uc_amx.shape.rows[tile]; row++)
        memcpy(uc_amx.tile[tile][row], (const uint8_t *)from + row * stride,
               uc_amx.shape.columns[tile]);
    uc_amx.shape.start_row = 0;
}

UC_AMX_PART void uc_amx_store(int tile, void *to, int64_t stride) {
    uc_amx_named(tile, "tilestored");
    for (int row = uc_amx.shape.start_row; row < uc_amx.shape.rows[tile]; row++)
        memcpy((uint8_t *)to + row * stride, uc_amx.tile[tile][row], uc_amx.shape.columns[tile]);
    uc_amx.shape.start_row = 0;
}

/* The four products of a pair of lanes. */
UC_AMX_PART int32_t uc_amx_lane(const uint8_t *left, const uint8_t *right) {
    int32_t part[4];
    for (int i = 0; i < 4; i++)
        part[i] = (int8_t)left[i] * (uc_amx.wrong == 1 ? (int32_t)right[i] : (int8_t)right[i]);
    int32_t sum = part[0] + part[1] + part[2] + part[3];
    if (uc_amx.wrong == 3)
        sum = sum > INT16_MAX ? INT16_MAX : sum < INT16_MIN ? INT16_MIN : sum;
    return sum;
}

/* TDPBSSD. */
UC_AMX_PART void uc_amx_multiply(int sums, int left, int right) {
    static const char own[] = "tdpbssd";
    if (uc_amx.wrong == 2) {
        int other = left;
        left = right;
        right = other;
    }
    uc_amx_named(sums, own);
    uc_amx_named(left, own);
    uc_amx_named(right, own);
    uc_amx_require(sums != left && sums != right && left != right, own, "a tile is named twice");
    const int rows = uc_amx.shape.rows[sums], lanes = uc_amx.shape.columns[sums] / 4,
              depth = uc_amx.shape.columns[left] / 4;
    uc_amx_require(uc_amx.shape.columns[sums] % 4 == 0 && uc_amx.shape.columns[left] % 4 == 0 &&
                       uc_amx.shape.columns[right] % 4 == 0,
                   own, "a row is not whole lanes");
    uc_amx_require(uc_amx.shape.rows[left] == rows, own, "sums have other rows than the first");
    uc_amx_require(uc_amx.shape.rows[right] == depth, own, "the second has another depth");
    uc_amx_require(uc_amx.shape.columns[right] == 4 * lanes, own,
                   "sums have other columns than the second");
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < lanes; n++) {
            uint32_t sum = 0;
            if (uc_amx.wrong != 4)
                memcpy(&sum, uc_amx.tile[sums][m] + 4 * n, sizeof sum);
            for (int k = 0; k < depth; k++)
                sum += (uint32_t)uc_amx_lane(uc_amx.tile[left][m] + 4 * k,
                                             uc_amx.tile[right][k] + 4 * n);
            memcpy(uc_amx.tile[sums][m] + 4 * n, &sum, sizeof sum);
        }
    uc_amx.shape.start_row = 0;
}

#define UC_AMX_CONFIGURE(shape) uc_amx_configure(shape)
#define UC_AMX_RELEASE() uc_amx_release()
#define UC_AMX_ZERO(tile) uc_amx_zero(tile)
#define UC_AMX_LOAD(tile, from, stride) uc_amx_load(tile, from, (int64_t)(stride))
#define UC_AMX_STORE(tile, to, stride) uc_amx_store(tile, to, (int64_t)(stride))
#define UC_AMX_MULTIPLY(sums, left, right) uc_amx_multiply(sums, left, right)

#endif
