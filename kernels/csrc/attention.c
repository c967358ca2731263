#include "attention.h"

#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

/* Six queries by 64 keys, and by 64 numbers of a value, are summed in registers. */
enum { LANES = 16, WIDE = 4, PANEL = LANES * WIDE, TALL = 6 };

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET

struct task {
    const struct uc_attention *own;
    size_t keys, widths; /* tokens and width, padded to whole panels */
    uint32_t *key;       /* [batch][key_heads][width / 2][keys], pairs of neighbours in a head */
    uint32_t *value;     /* [batch][key_heads][keys / 2][widths], pairs of neighbouring tokens */
    float *scores;       /* [batch][heads][TALL][keys], a thread's first head is its place */
};

static size_t whole(size_t count) {
    return (count + PANEL - 1) / PANEL * PANEL;
}

static void pack(void *context, size_t first, size_t end) {
    const struct task *task = context;
    const struct uc_attention *own = task->own;
    for (size_t item = first; item < end; item++) {
        const size_t batch = item / own->key_heads, head = item % own->key_heads;
        const uint16_t *key = own->key.data + batch * own->key.batch + head * own->key.head;
        const uint16_t *value = own->value.data + batch * own->value.batch + head * own->value.head;
        uint32_t *keys = task->key + item * own->width / 2 * task->keys;
        for (size_t block = 0; block < task->keys; block += LANES)
            for (size_t pair = 0; pair < own->width / 2; pair++)
                for (size_t k = block; k < block + LANES; k++) {
                    const uint16_t *two = key + k * own->key.token + 2 * pair;
                    keys[pair * task->keys + k] =
                        k < own->tokens ? two[0] | (uint32_t)two[1] << 16 : 0;
                }
        uint32_t *values = task->value + item * task->keys / 2 * task->widths;
        for (size_t pair = 0; pair < task->keys / 2; pair++) {
            const uint16_t *even = value + 2 * pair * own->value.token;
            const uint16_t *odd = even + own->value.token;
            const int none = 2 * pair >= own->tokens, half = 2 * pair + 1 >= own->tokens;
            for (size_t d = 0; d < task->widths; d++) {
                const uint32_t low = none || d >= own->width ? 0 : even[d];
                const uint32_t high = half || d >= own->width ? 0 : odd[d];
                values[pair * task->widths + d] = low | high << 16;
            }
        }
    }
}

/* Two to the power of numbers that are not positive; within 3 units of the last place. */
INLINE __m512 power(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.333355814e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618129107e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550410866e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402265069e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931471806e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* TALL rows by one panel: sums over pairs, a row's pairs side by side. */
INLINE void multiply(const void *const rows[TALL], const uint32_t *panel, size_t stride,
                     size_t pairs, __m512 sum[TALL][WIDE]) {
    for (int r = 0; r < TALL; r++)
        for (int v = 0; v < WIDE; v++)
            sum[r][v] = _mm512_setzero_ps();
    for (size_t pair = 0; pair < pairs; pair++, panel += stride) {
        __m512bh across[WIDE];
        for (int v = 0; v < WIDE; v++)
            across[v] = (__m512bh)_mm512_loadu_si512(panel + v * LANES);
        for (int r = 0; r < TALL; r++) {
            int two;
            memcpy(&two, (const char *)rows[r] + pair * sizeof two, sizeof two);
            const __m512bh down = (__m512bh)_mm512_set1_epi32(two);
            for (int v = 0; v < WIDE; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], down, across[v]);
        }
    }
}

/* Turn the scores of a query into weights in place, bfloat16; return one over their sum. */
INLINE float weigh(float *scores, size_t place, size_t keys, float scale) {
    const __m512 by = _mm512_set1_ps(scale * 1.442695041f);
    __m512 most = _mm512_set1_ps(-3e38f), total = _mm512_setzero_ps();
    for (size_t k = 0; k < keys; k += LANES) {
        const __mmask16 seen = place >= k + LANES - 1 ? 0xFFFF
                               : place < k            ? 0
                                                      : (__mmask16)((2u << (place - k)) - 1);
        const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + k), by);
        _mm512_storeu_ps(scores + k, score);
        most = _mm512_mask_max_ps(most, seen, most, score);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    uint16_t *weights = (uint16_t *)scores; /* behind what is read */
    for (size_t k = 0; k < keys; k += LANES) {
        const __mmask16 seen = place >= k + LANES - 1 ? 0xFFFF
                               : place < k            ? 0
                                                      : (__mmask16)((2u << (place - k)) - 1);
        const __m512 weight =
            _mm512_maskz_mov_ps(seen, power(_mm512_sub_ps(_mm512_loadu_ps(scores + k), top)));
        total = _mm512_add_ps(total, weight);
        _mm256_storeu_si256((__m256i *)(weights + k), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    return 1 / _mm512_reduce_add_ps(total);
}

INLINE void tile(const struct task *task, size_t item, size_t first, float *scores) {
    const struct uc_attention *own = task->own;
    const size_t batch = item / own->heads, here = item % own->heads;
    const size_t from = batch * own->key_heads + here / (own->heads / own->key_heads);
    const uint32_t *key = task->key + from * own->width / 2 * task->keys;
    const uint32_t *value = task->value + from * task->keys / 2 * task->widths;
    const size_t last = first + TALL < own->tokens ? first + TALL - 1 : own->tokens - 1;
    const size_t keys = whole(last + 1);
    const void *rows[TALL];
    for (size_t r = 0; r < TALL; r++) {
        const size_t token = first + r < last ? first + r : last;
        rows[r] = own->query.data + batch * own->query.batch + here * own->query.head +
                  token * own->query.token;
    }
    __m512 sum[TALL][WIDE];
    for (size_t k = 0; k < keys; k += PANEL) {
        multiply(rows, key + k, task->keys, own->width / 2, sum);
        for (int r = 0; r < TALL; r++)
            for (int v = 0; v < WIDE; v++)
                _mm512_storeu_ps(scores + r * task->keys + k + v * LANES, sum[r][v]);
    }
    __m512 share[TALL];
    for (size_t r = 0; r < TALL; r++) {
        const size_t place = first + r < last ? first + r : last;
        share[r] = _mm512_set1_ps(weigh(scores + r * task->keys, place, keys, own->scale));
        rows[r] = scores + r * task->keys;
    }
    for (size_t d = 0; d < own->width; d += PANEL) {
        multiply(rows, value + d, task->widths, keys / 2, sum);
        for (size_t r = 0; r < TALL && first + r <= last; r++) {
            uint16_t *to =
                own->out + ((batch * own->tokens + first + r) * own->heads + here) * own->width + d;
            for (size_t v = 0; v < WIDE && d + v * LANES < own->width; v++)
                _mm256_storeu_si256(
                    (__m256i *)(to + v * LANES),
                    (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum[r][v], share[r])));
        }
    }
}

TARGET static void attend(void *context, size_t first, size_t end) {
    const struct task *task = context;
    float *scores = task->scores + first * TALL * task->keys;
    for (size_t item = first; item < end; item++)
        for (size_t query = 0; query < task->own->tokens; query += TALL)
            tile(task, item, query, scores);
}

int uc_attention(const struct uc_attention *own, unsigned threads) {
    if (!own->batch || !own->tokens || !own->heads || !own->width)
        return 1;
    struct task task = {.own = own, .keys = whole(own->tokens), .widths = whole(own->width)};
    const size_t pairs = own->batch * own->key_heads, heads = own->batch * own->heads;
    const size_t keys = pairs * own->width / 2 * task.keys;
    const size_t values = pairs * task.keys / 2 * task.widths;
    uint32_t *room = aligned_alloc(64, (keys + values + heads * TALL * task.keys) * sizeof *room);
    if (!room)
        return 0;
    task.key = room;
    task.value = room + keys;
    task.scores = (float *)(task.value + values);
    uc_run(threads, pairs, 1, pack, &task);
    uc_run(threads, heads, 1, attend, &task);
    free(room);
    return 1;
}
#else
int uc_attention(const struct uc_attention *own, unsigned threads) {
    (void)own, (void)threads;
    return 0;
}
#endif
