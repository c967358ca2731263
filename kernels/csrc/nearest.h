/* One block of nearest plane: columns of a weight rounded one after the other, each for the errors
 * of those before it (compress/babai.py). Rows do not depend on each other, so sixteen go side by
 * side and tiles of them to the threads. Products and sums are float32, in one order and unfused:
 * every instruction set gives the same bits.
 *
 *     for i in 0..steps-1, all r:
 *         goal[i][r] += sum over j < i of unit[i][j] * block[j][r]
 *         raw         = nearest even of (goal[i][r] / scale[group[i]][r] + zero[group[i]][r])
 *         code[i][r]  = raw, at least low and at most high
 *         block[i][r] -= (code[i][r] - zero[group[i]][r]) * scale[group[i]][r]
 *         clipped[r] += raw is not the code
 */
#ifndef UC_NEAREST_H
#define UC_NEAREST_H

#include <stddef.h>
#include <stdint.h>

struct uc_nearest {
    size_t steps, rows, groups;
    float *goal;          /* [steps][rows], what the columns should be, but for each other's errors */
    float *block;         /* [steps][rows], weights in, weights minus rounded ones out */
    const float *unit;    /* [steps][stride], read below the diagonal */
    size_t stride;
    const float *scale;   /* [groups][rows] */
    const float *zero;    /* [groups][rows], or NULL */
    const int32_t *group; /* [steps], each below `groups` */
    float low, high;      /* within -128..127 */
    int8_t *codes;        /* [steps][rows] */
    int64_t *clipped;     /* [rows], counted on */
};

/* Round a block. Returns 0 where a group is out of range; nothing is written then. */
int uc_nearest(const struct uc_nearest *block, unsigned threads);

#endif
