/* The instructions of AMX that tiles use, spelt out: eight tiles of 16 rows of 64 bytes.
 *
 * Tiles are named by number in the text of the program, so these are macros. Nothing here needs a
 * flag or an attribute, and the compiler itself never touches a tile. tests/kernels/csrc_driver
 * has a model of the same names in C.
 */
#ifndef UC_AMX_H
#define UC_AMX_H

#include <stdint.h>

/* What LDTILECFG reads. */
struct uc_amx_shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t columns[16]; /* bytes of a row, by tile */
    uint8_t rows[16];
};

_Static_assert(sizeof(struct uc_amx_shape) == 64, "LDTILECFG reads 64 bytes");

/* Give the tiles of this thread their shapes; all become zero. */
#define UC_AMX_CONFIGURE(shape) __asm__ volatile("ldtilecfg %0" : : "m"(*(shape)))

/* Forget all tiles, so that nobody has to save them. */
#define UC_AMX_RELEASE() __asm__ volatile("tilerelease")

#define UC_AMX_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : :)

/* Rows from memory, one every `stride` bytes. */
#define UC_AMX_LOAD(tile, from, stride)                                                            \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile                                            \
                     :                                                                             \
                     : "r"(from), "r"((int64_t)(stride))                                           \
                     : "memory")

#define UC_AMX_STORE(tile, to, stride)                                                             \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)"                                        \
                     :                                                                             \
                     : "r"(to), "r"((int64_t)(stride))                                             \
                     : "memory")

/* sums[m][n] += left[m][4k + i] * right[k][4n + i], summed over k and i: signed bytes into int32,
 * which wrap around. Operands are in the order of AT&T, last first. */
#define UC_AMX_MULTIPLY(sums, left, right)                                                         \
    __asm__ volatile("tdpbssd %%tmm" #right ", %%tmm" #left ", %%tmm" #sums : :)

#endif
