#include "attention.h"

#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>

#include "activations.h"
#include "isa.h"

/* Eight keys at once: a query's numbers meet each of them while they are in a register. */
enum { LANES = 8, KEYS = 8 };

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

struct task {
    const struct uc_attention *own;
    size_t share; /* heads that read the same keys and values */
    size_t keys;  /* tokens, padded to whole blocks */
    float *room;  /* [batch][key_heads][share][width + keys + width]: query, weights, answer */
};

/* Eight tokens' numbers in float32; zeros for those that are not there. */
INLINE void widen(const uint16_t *from, size_t stride, size_t there, size_t width, float *to) {
    for (size_t k = 0; k < KEYS; k++, from += stride)
        for (size_t d = 0; d < width; d += LANES, to += LANES) {
            const __m128i half =
                k < there ? _mm_loadu_si128((const __m128i *)(from + d)) : _mm_setzero_si128();
            const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
            _mm256_storeu_ps(to, _mm256_castsi256_ps(bits));
        }
}

/* The sum of each of eight registers. */
INLINE __m256 sums(const __m256 of[KEYS]) {
    const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
    const __m256 last = _mm256_hadd_ps(_mm256_hadd_ps(of[4], of[5]), _mm256_hadd_ps(of[6], of[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(first, last, 0x20),
                         _mm256_permute2f128_ps(first, last, 0x31));
}

/* Two to the power of numbers that are not positive; within 3 units of the last place, and from
 * 2^-126 down that. NaN stays NaN. */
INLINE __m256 power(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);
    const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(x, n);
    __m256 p = _mm256_set1_ps(1.333355814e-3f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.618129107e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.550410866e-2f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.402265069e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.931471806e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

/* Turn a head's scores, those of no token at the end among them, into weights in place; return one
 * over their sum. */
INLINE float weigh(float *scores, size_t tokens, size_t keys) {
    __m256 most = _mm256_set1_ps(-INFINITY), total = _mm256_setzero_ps();
    for (size_t k = tokens; k < keys; k++)
        scores[k] = -INFINITY;
    for (size_t k = 0; k < keys; k += LANES)
        most = _mm256_max_ps(most, _mm256_loadu_ps(scores + k));
    float lanes[LANES], top = -INFINITY, sum = 0.0f;
    _mm256_storeu_ps(lanes, most);
    for (int j = 0; j < LANES; j++)
        top = lanes[j] > top ? lanes[j] : top;
    for (size_t k = 0; k < keys; k += LANES) {
        const __m256 score = _mm256_loadu_ps(scores + k);
        const __m256 weight = power(_mm256_sub_ps(score, _mm256_set1_ps(top)));
        total = _mm256_add_ps(total, weight);
        _mm256_storeu_ps(scores + k, weight);
    }
    _mm256_storeu_ps(lanes, total);
    for (int j = 0; j < LANES; j++)
        sum += lanes[j];
    return 1 / sum;
}

/* All heads of one item, the keys and values of which they share. */
TARGET static void item(const struct task *task, size_t index) {
    const struct uc_attention *own = task->own;
    const size_t width = own->width, batch = index / own->key_heads, from = index % own->key_heads;
    const size_t wide = width + task->keys + width;
    const uint16_t *key = own->key.data + batch * own->key.batch + from * own->key.head;
    const uint16_t *value = own->value.data + batch * own->value.batch + from * own->value.head;
    float *room = task->room + index * task->share * wide, block[KEYS * UC_WIDTH_MAX];
    const float scale = own->scale * 1.442695041f;
    for (size_t h = 0; h < task->share; h++) {
        float *query = room + h * wide, *answer = query + width + task->keys;
        const uint16_t *given = own->query.data + batch * own->query.batch +
                                (from * task->share + h) * own->query.head;
        uc_from_bfloat16((const uint8_t *)given, width, query);
        for (size_t d = 0; d < width; d++) {
            query[d] *= scale;
            answer[d] = 0.0f;
        }
    }
    for (size_t k = 0; k < own->tokens; k += KEYS) {
        widen(key + k * own->key.token, own->key.token, own->tokens - k, width, block);
        for (size_t h = 0; h < task->share; h++) {
            const float *query = room + h * wide;
            __m256 sum[KEYS];
            for (int j = 0; j < KEYS; j++)
                sum[j] = _mm256_setzero_ps();
            for (size_t d = 0; d < width; d += LANES) {
                const __m256 q = _mm256_loadu_ps(query + d);
                for (int j = 0; j < KEYS; j++)
                    sum[j] = _mm256_fmadd_ps(q, _mm256_loadu_ps(block + j * width + d), sum[j]);
            }
            _mm256_storeu_ps(room + h * wide + width + k, sums(sum));
        }
    }
    for (size_t h = 0; h < task->share; h++) /* the query is not needed any more */
        room[h * wide] = weigh(room + h * wide + width, own->tokens, task->keys);
    for (size_t k = 0; k < own->tokens; k += KEYS) {
        widen(value + k * own->value.token, own->value.token, own->tokens - k, width, block);
        for (size_t h = 0; h < task->share; h++) {
            const float *weights = room + h * wide + width + k;
            float *answer = room + h * wide + width + task->keys;
            __m256 weight[KEYS];
            for (int j = 0; j < KEYS; j++)
                weight[j] = _mm256_set1_ps(weights[j]);
            for (size_t d = 0; d < width; d += LANES) {
                __m256 sum = _mm256_loadu_ps(answer + d);
                for (int j = 0; j < KEYS; j++)
                    sum = _mm256_fmadd_ps(weight[j], _mm256_loadu_ps(block + j * width + d), sum);
                _mm256_storeu_ps(answer + d, sum);
            }
        }
    }
    for (size_t h = 0; h < task->share; h++) {
        uint16_t *out = own->out + (batch * own->heads + from * task->share + h) * width;
        float *answer = room + h * wide + width + task->keys;
        for (size_t d = 0; d < width; d++)
            answer[d] *= room[h * wide];
        uc_to_bfloat16(answer, width, (uint8_t *)out);
    }
}

static void items(void *context, size_t first, size_t end) {
    for (size_t index = first; index < end; index++)
        item(context, index);
}

int uc_attention_newest_usable(void) {
    return uc_panels_avx2.usable();
}

int uc_attention_newest(const struct uc_attention *own, unsigned threads) {
    if (!own->batch || !own->tokens || !own->heads)
        return 1;
    struct task task = {.own = own, .share = own->heads / own->key_heads};
    task.keys = (own->tokens + KEYS - 1) / KEYS * KEYS;
    task.room = malloc(own->batch * own->heads * (own->width * 2 + task.keys) * sizeof *task.room);
    if (!task.room)
        return 0;
    uc_run(threads, own->batch * own->key_heads, 1, items, &task);
    free(task.room);
    return 1;
}
#else
int uc_attention_newest_usable(void) {
    return 0;
}

int uc_attention_newest(const struct uc_attention *own, unsigned threads) {
    (void)own, (void)threads;
    return 0;
}
#endif
