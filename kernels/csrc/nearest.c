#include "nearest.h"

#include <string.h>

#include "pool.h"

enum { LANES = 16, TILE = 64 };

/* Vectors of sixteen floats; each instruction set cuts them into what it has. */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

/* Adding and taking away 1.5 * 2^23 rounds to the nearest even what is below 2^22. */
static const float ROUND = 12582912.0f, FAR = 4096.0f;

#define INLINE static inline __attribute__((always_inline))

/* Vectors go by address: their calling convention depends on the instruction set. */
INLINE void within(floats *value, float low, float high) {
    const floats least = low - (floats){0}, most = high - (floats){0};
    ints mask = *value > least; /* NaN becomes the least */
    *value = (floats)(((ints)*value & mask) | ((ints)least & ~mask));
    mask = *value < most;
    *value = (floats)(((ints)*value & mask) | ((ints)most & ~mask));
}

/* Round `count` times sixteen rows, from `row` on. */
INLINE void many(const struct uc_nearest *own, size_t row, const int count) {
    const size_t rows = own->rows;
    ints clipped[TILE / LANES] = {0};
    for (size_t i = 0; i < own->steps; i++) {
        const float *unit = own->unit + i * own->stride;
        const size_t here = i * rows + row, at = (size_t)own->group[i] * rows + row;
        floats sum[TILE / LANES];
        for (int v = 0; v < count; v++)
            memcpy(&sum[v], own->goal + here + v * LANES, sizeof sum[v]);
        for (size_t j = 0; j < i; j++)
            for (int v = 0; v < count; v++) {
                floats error;
                memcpy(&error, own->block + j * rows + row + v * LANES, sizeof error);
                sum[v] += unit[j] * error;
            }
        for (int v = 0; v < count; v++) {
            const size_t lane = v * LANES;
            memcpy(own->goal + here + lane, &sum[v], sizeof sum[v]);
            floats scale, zero = {0}, weight;
            memcpy(&scale, own->scale + at + lane, sizeof scale);
            if (own->zero)
                memcpy(&zero, own->zero + at + lane, sizeof zero);
            memcpy(&weight, own->block + here + lane, sizeof weight);
            floats raw = sum[v] / scale + zero;
            within(&raw, -FAR, FAR);
            raw = (raw + ROUND) - ROUND;
            floats code = raw;
            within(&code, own->low, own->high);
            clipped[v] -= raw != code;
            weight -= (code - zero) * scale;
            memcpy(own->block + here + lane, &weight, sizeof weight);
            const ints wide = __builtin_convertvector(code, ints);
            const bytes narrow = __builtin_convertvector(wide, bytes);
            memcpy(own->codes + here + lane, &narrow, sizeof narrow);
        }
    }
    for (int v = 0; v < count; v++)
        for (size_t r = 0; r < LANES; r++)
            own->clipped[row + v * LANES + r] += clipped[v][r];
}

/* The same for one row. */
static void one(const struct uc_nearest *own, size_t row) {
    const size_t rows = own->rows;
    for (size_t i = 0; i < own->steps; i++) {
        float sum = own->goal[i * rows + row];
        for (size_t j = 0; j < i; j++)
            sum += own->unit[i * own->stride + j] * own->block[j * rows + row];
        own->goal[i * rows + row] = sum;
        const size_t at = (size_t)own->group[i] * rows + row;
        const float scale = own->scale[at], zero = own->zero ? own->zero[at] : 0;
        float raw = sum / scale + zero;
        raw = raw > -FAR ? raw : -FAR;
        raw = raw < FAR ? raw : FAR;
        raw = (raw + ROUND) - ROUND;
        float code = raw > own->low ? raw : own->low;
        code = code < own->high ? code : own->high;
        own->clipped[row] += raw != code;
        own->block[i * rows + row] -= (code - zero) * scale;
        own->codes[i * rows + row] = (int8_t)code;
    }
}

INLINE void tiles(const struct uc_nearest *own, size_t first, size_t end) {
    size_t row = first * TILE, stop = end * TILE < own->rows ? end * TILE : own->rows;
    for (; row + TILE <= stop; row += TILE)
        many(own, row, TILE / LANES);
    for (; row + LANES <= stop; row += LANES)
        many(own, row, 1);
    for (; row < stop; row++)
        one(own, row);
}

static void work_plain(void *context, size_t first, size_t end) {
    tiles(context, first, end);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void work_avx2(void *context, size_t first, size_t end) {
    tiles(context, first, end);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) static void work_avx512(void *context, size_t first, size_t end) {
    tiles(context, first, end);
}
#endif

static uc_work *best(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return work_avx512;
    if (__builtin_cpu_supports("avx2"))
        return work_avx2;
#endif
    return work_plain;
}

int uc_nearest(const struct uc_nearest *block, unsigned threads) {
    for (size_t i = 0; i < block->steps; i++)
        if (block->group[i] < 0 || (size_t)block->group[i] >= block->groups)
            return 0;
    uc_run(threads, (block->rows + TILE - 1) / TILE, 1, best(), (void *)block);
    return 1;
}
