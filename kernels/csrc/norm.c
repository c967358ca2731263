#include "norm.h"

#include <math.h>

#include "activations.h"
#include "isa.h"

enum { STREAMS = 4, LEVELS = 4, ROUNDS = 16, WIDEST = 16, BLOCK = 512 };

UC_INLINE void add_squares(float *restrict to, const float *from, size_t count) {
    for (size_t i = 0; i < count; i++)
        to[i] += from[i] * from[i];
}

UC_INLINE void add(float *restrict to, const float *from, size_t count) {
    for (size_t i = 0; i < count; i++)
        to[i] += from[i];
}

/* `lanes` is a number that the compiler sees. */
UC_INLINE float sum_of_squares(const float *x, size_t width, const size_t lanes) {
    const size_t round = STREAMS * lanes, rounds = width / round;
    float sums[LEVELS][STREAMS * WIDEST] = {{0}};
    for (size_t i = 0; i < rounds;) {
        add_squares(sums[0], x + i++ * round, round);
        for (size_t level = 1, whole = ROUNDS; level < LEVELS && i % whole == 0; level++) {
            add(sums[level], sums[level - 1], round);
            memset(sums[level - 1], 0, sizeof sums[0]);
            whole *= ROUNDS;
        }
    }
    for (size_t level = 1; level < LEVELS; level++)
        add(sums[0], sums[level], round);
    size_t at = rounds * round;
    for (; at + lanes <= width; at += lanes)
        add_squares(sums[0], x + at, lanes);
    for (size_t stream = 1; stream < STREAMS; stream++)
        add(sums[0], sums[0] + stream * lanes, lanes);
    float total = 0.0f;
    for (; at < width; at++)
        total += x[at] * x[at];
    for (size_t lane = 0; lane < lanes; lane++)
        total += sums[0][lane];
    return total;
}

void uc_norm(const struct uc_norm *norm) {
    const struct uc_panels *panels = uc_isa_live()->panels;
    const size_t wide = uc_bytes_of(norm->dtype);
    float values[UC_SPAN_MAX], weight[BLOCK];
    for (size_t row = 0; row < norm->rows; row++) {
        const uint8_t *from = norm->x + row * norm->width * wide;
        uint8_t *to = norm->out + row * norm->width * wide;
        panels->convert(norm->dtype, from, norm->width, values);
        const float total = norm->lanes == 4   ? sum_of_squares(values, norm->width, 4)
                            : norm->lanes == 8 ? sum_of_squares(values, norm->width, 8)
                                               : sum_of_squares(values, norm->width, 16);
        const float scale = 1.0f / sqrtf(total / (float)norm->width + norm->eps);
        for (size_t at = 0; at < norm->width; at += BLOCK) {
            const size_t left = norm->width - at, count = left < BLOCK ? left : BLOCK;
            for (size_t i = 0; i < count; i++)
                values[at + i] *= scale;
            /* Rounded once before the weight, by way of the output. */
            panels->store(norm->dtype, values + at, count, to + at * wide);
            panels->convert(norm->dtype, to + at * wide, count, values + at);
            panels->convert(norm->dtype, norm->weight + at * wide, count, weight);
            for (size_t i = 0; i < count; i++)
                values[at + i] *= weight[i];
            panels->store(norm->dtype, values + at, count, to + at * wide);
        }
    }
}
