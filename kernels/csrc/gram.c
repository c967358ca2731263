#include "gram.h"

#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

/* A panel is 64 columns of the pairs of SPAN tokens: 128 KiB, which stay in a core's second cache
 * while REACH panels of rows go by; six rows of one by the whole other are summed in registers. On
 * Zen 4 that is 95% of what the instruction can do; with twice or half the tokens it is 75%. */
enum { LANES = 16, WIDE = 4, PANEL = LANES * WIDE, TALL = 6, SPAN = 1024, REACH = 4 };

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET

struct packed {
    const uint16_t *from; /* [tokens][columns] */
    size_t columns;
    uint32_t *pairs; /* [panels][tokens / 2][PANEL], the even token's number in the lower half */
};

struct task {
    struct packed left, right;
    size_t tokens, pairs, panels, strips;
    float *total;
    int upper;
};

static size_t panels_of(size_t columns) {
    return (columns + PANEL - 1) / PANEL;
}

TARGET static void pack(void *context, size_t first, size_t end) {
    const struct task *own = context;
    const size_t left = panels_of(own->left.columns);
    for (size_t item = first; item < end; item++) {
        const struct packed *side = item < left ? &own->left : &own->right;
        const size_t panel = item < left ? item : item - left, column = panel * PANEL;
        uint32_t *to = side->pairs + panel * own->pairs * PANEL;
        for (size_t pair = 0; pair < own->pairs; pair++) {
            const uint16_t *even = side->from + 2 * pair * side->columns,
                           *odd = even + side->columns;
            const int whole = 2 * pair + 1 < own->tokens;
            for (size_t at = column; at < column + PANEL; at += LANES, to += LANES) {
                const size_t have = at < side->columns ? side->columns - at : 0;
                const __mmask16 some = have < LANES ? (__mmask16)((1u << have) - 1) : 0xFFFF;
                const __m512i low =
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, even + at));
                const __m512i high =
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(whole ? some : 0, odd + at));
                _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
    }
}

/* Some rows of the total by one panel: rows of the left panel from `at` on. */
INLINE void tile(const struct task *own, const uint32_t *left, const uint32_t *right, float *total,
                 size_t have, const int rows) {
    __m512 sum[TALL][WIDE];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < WIDE; v++)
            sum[r][v] = _mm512_setzero_ps();
    for (size_t pair = 0; pair < own->pairs; pair++, left += PANEL, right += PANEL) {
        __m512bh across[WIDE];
        for (int v = 0; v < WIDE; v++)
            across[v] = (__m512bh)_mm512_loadu_si512(right + v * LANES);
        for (int r = 0; r < rows; r++) {
            const __m512bh down = (__m512bh)_mm512_set1_epi32((int)left[r]);
            for (int v = 0; v < WIDE; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], down, across[v]);
        }
    }
    for (int r = 0; r < rows; r++, total += own->right.columns)
        for (int v = 0; v < WIDE; v++) {
            const size_t rest = have > (size_t)v * LANES ? have - v * LANES : 0;
            const __mmask16 some = rest < LANES ? (__mmask16)((1u << rest) - 1) : 0xFFFF;
            float *to = total + v * LANES;
            _mm512_mask_storeu_ps(to, some,
                                  _mm512_add_ps(_mm512_maskz_loadu_ps(some, to), sum[r][v]));
        }
}

TARGET static void multiply(void *context, size_t first, size_t end) {
    const struct task *own = context;
    for (size_t item = first; item < end; item++) {
        const size_t across = own->panels - 1 - item / own->strips, strip = item % own->strips;
        const uint32_t *right = own->right.pairs + across * own->pairs * PANEL;
        const size_t have = own->right.columns - across * PANEL;
        for (size_t down = strip * REACH; down < (strip + 1) * REACH; down++) {
            if (down >= panels_of(own->left.columns) || (own->upper && down > across))
                break;
            const uint32_t *left = own->left.pairs + down * own->pairs * PANEL;
            const size_t stop =
                own->left.columns - down * PANEL < PANEL ? own->left.columns - down * PANEL : PANEL;
            float *total = own->total + down * PANEL * own->right.columns + across * PANEL;
            size_t row = 0;
            for (; row + TALL <= stop; row += TALL)
                tile(own, left + row, right, total + row * own->right.columns, have, TALL);
            for (; row + 4 <= stop; row += 4)
                tile(own, left + row, right, total + row * own->right.columns, have, 4);
            for (; row < stop; row++)
                tile(own, left + row, right, total + row * own->right.columns, have, 1);
        }
    }
}

int uc_gram_usable(void) {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
           (a & (1u << 5));
}

int uc_gram(const struct uc_gram *gram, unsigned threads) {
    const int same = gram->left == gram->right;
    const size_t most = gram->tokens < SPAN ? gram->tokens : SPAN;
    const size_t left = panels_of(gram->rows), right = panels_of(gram->columns);
    const size_t each = (most + 1) / 2 * PANEL;
    uint32_t *pairs = aligned_alloc(64, ((same ? 0 : left) + right) * each * sizeof *pairs + 64);
    if (!pairs)
        return 0;
    for (size_t at = 0; at < gram->tokens; at += SPAN) {
        const size_t tokens = gram->tokens - at < SPAN ? gram->tokens - at : SPAN;
        struct task task = {
            .left = {gram->left + at * gram->rows, gram->rows, same ? pairs : pairs + right * each},
            .right = {gram->right + at * gram->columns, gram->columns, pairs},
            .tokens = tokens,
            .pairs = (tokens + 1) / 2,
            .panels = right,
            .strips = (left + REACH - 1) / REACH,
            .total = gram->total,
            .upper = gram->upper,
        };
        uc_run(threads, same ? left : left + right, 1, pack, &task);
        uc_run(threads, task.panels * task.strips, 1, multiply, &task);
    }
    free(pairs);
    return 1;
}
#else
int uc_gram_usable(void) {
    return 0;
}

int uc_gram(const struct uc_gram *gram, unsigned threads) {
    (void)gram, (void)threads;
    return 0;
}
#endif
