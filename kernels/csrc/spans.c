#include "spans.h"

#include <stdint.h>
#include <string.h>

#include "pool.h"

enum { LANES = 16 };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* Adding and taking away 1.5 * 2^23 rounds to the nearest even what is below 2^22. */
static const float ROUND = 12582912.0f;

#define INLINE static inline __attribute__((always_inline))

struct tried {
    float inverse, least, most; /* codes less their zero point stay within the two */
};

struct fit {
    float along, own;
};

/* Some of the last numbers stand for none: zero, which adds nothing. */
INLINE void load(floats *to, const float *from, size_t have) {
    if (have >= LANES) {
        memcpy(to, from, sizeof *to);
    } else {
        float some[LANES] = {0};
        memcpy(some, from, have * sizeof *some);
        memcpy(to, some, sizeof *to);
    }
}

INLINE void within(floats *value, float low, float high) {
    const floats least = low - (floats){0}, most = high - (floats){0};
    ints mask = *value > least; /* NaN becomes the least */
    *value = (floats)(((ints)*value & mask) | ((ints)least & ~mask));
    mask = *value < most;
    *value = (floats)(((ints)*value & mask) | ((ints)most & ~mask));
}

INLINE float sum(const floats *lanes) {
    float total = 0;
    for (int l = 0; l < LANES; l++)
        total += (*lanes)[l];
    return total;
}

INLINE void fits(const float *weight, const float *cost, size_t size, const struct tried *tried,
                 struct fit *fit, const int count) {
    floats along[UC_SPANS] = {{0}}, own[UC_SPANS] = {{0}};
    for (size_t at = 0; at < size; at += LANES) {
        floats w, u;
        load(&w, weight + at, size - at);
        load(&u, cost + at, size - at);
        const floats costly = w * u;
        for (int s = 0; s < count; s++) {
            floats code = w * tried[s].inverse;
            within(&code, tried[s].least, tried[s].most);
            code = (code + ROUND) - ROUND;
            along[s] += code * costly;
            own[s] += code * code * u;
        }
    }
    for (int s = 0; s < count; s++)
        fit[s] = (struct fit){sum(&along[s]), sum(&own[s])};
}

INLINE float zero_of(const struct uc_spans *own, float least, float scale) {
    float zero = own->low - least / scale;
    zero = zero > own->low ? zero : own->low;
    zero = zero < own->high ? zero : own->high;
    return (zero + ROUND) - ROUND;
}

INLINE void one(const struct uc_spans *own, size_t row, size_t group, size_t groups) {
    const size_t first = group * own->group;
    const size_t size = own->columns - first < own->group ? own->columns - first : own->group;
    const float *weight = own->weight + row * own->columns + first, *cost = own->cost + first;
    floats down = {0}, up = {0};
    for (size_t at = 0; at < size; at += LANES) {
        floats w;
        load(&w, weight + at, size - at);
        ints mask = w < down;
        down = (floats)(((ints)w & mask) | ((ints)down & ~mask));
        mask = w > up;
        up = (floats)(((ints)w & mask) | ((ints)up & ~mask));
    }
    float least = 0, most = 0;
    for (int l = 0; l < LANES; l++) {
        least = down[l] < least ? down[l] : least;
        most = up[l] > most ? up[l] : most;
    }
    if (own->symmetric) {
        most = -least > most ? -least : most;
        least = -most;
    }
    float span = (most - least) / (own->high - own->low);
    span = span > 0 ? span : 1;
    struct tried tried[UC_SPANS];
    struct fit fit[UC_SPANS];
    float zeros[UC_SPANS];
    for (int s = 0; s < UC_SPANS; s++) {
        const float scale = span * own->shares[s];
        zeros[s] = own->symmetric ? 0 : zero_of(own, least * own->shares[s], scale);
        tried[s] = (struct tried){1 / scale, own->low - zeros[s], own->high - zeros[s]};
    }
    fits(weight, cost, size, tried, fit, UC_SPANS);
    float best = -1, scale = span, zero = 0;
    for (int s = 0; s < UC_SPANS; s++) {
        const float fitted = fit[s].along / fit[s].own, gain = fit[s].along * fitted;
        if (gain > best && fitted > 0)
            best = gain, scale = fitted, zero = zeros[s];
    }
    for (int p = 0; p < own->polish; p++) {
        tried[0] = (struct tried){1 / scale, own->low - zero, own->high - zero};
        fits(weight, cost, size, tried, fit, 1);
        const float fitted = fit[0].along / fit[0].own, gain = fit[0].along * fitted;
        if (gain > best && fitted > 0)
            best = gain, scale = fitted;
    }
    own->scale[row * groups + group] = scale;
    if (!own->symmetric)
        own->zero[row * groups + group] = zero;
}

INLINE void some_rows(const struct uc_spans *own, size_t first, size_t end) {
    const size_t groups = (own->columns + own->group - 1) / own->group;
    for (size_t row = first; row < end; row++)
        for (size_t group = 0; group < groups; group++)
            one(own, row, group, groups);
}

static void work_plain(void *context, size_t first, size_t end) {
    some_rows(context, first, end);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void work_avx2(void *context, size_t first, size_t end) {
    some_rows(context, first, end);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) static void
work_avx512(void *context, size_t first, size_t end) {
    some_rows(context, first, end);
}
#endif

static uc_work *best(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return work_avx512;
    if (__builtin_cpu_supports("avx2"))
        return work_avx2;
#endif
    return work_plain;
}

void uc_spans(const struct uc_spans *spans, unsigned threads) {
    if (spans->columns && spans->group)
        uc_run(threads, spans->rows, 8, best(), (void *)spans);
}
