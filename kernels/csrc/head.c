#include "head.h"

#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <stdlib.h>

#include "activations.h"
#include "isa.h"

/* Rows at once: four sums or more, so that none waits for another; eight, and they stay in
 * registers. */
enum { LANES = 8, ROWS = 4, ROWS_OF_MANY = 2 };

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

struct task {
    const struct uc_head *own;
    const float *x; /* [tokens][columns] */
};

INLINE float sum_of(__m256 lanes) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* `tokens` and `rows` are numbers that the compiler sees; of rows behind the last, the last is
 * computed again. */
INLINE void multiply(const struct task *task, size_t row, const size_t tokens, const size_t rows) {
    const struct uc_head *own = task->own;
    const size_t columns = own->columns;
    const uint16_t *weight[ROWS];
    __m256 sums[ROWS][UC_HEAD_TOKENS];
    for (size_t r = 0; r < rows; r++) {
        weight[r] = own->weight + (row + r < own->rows ? row + r : own->rows - 1) * columns;
        for (size_t t = 0; t < tokens; t++)
            sums[r][t] = _mm256_setzero_ps();
    }
    for (size_t c = 0; c < columns; c += UC_HEAD_STEP) {
        for (size_t r = 0; r < rows; r++) /* the line that the next rows will want */
            _mm_prefetch((const char *)(weight[r] + rows * columns + c), _MM_HINT_T0);
        for (size_t d = c; d < c + UC_HEAD_STEP; d += LANES)
            for (size_t r = 0; r < rows; r++) {
                const __m128i half = _mm_loadu_si128((const __m128i *)(weight[r] + d));
                const __m256 wide =
                    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
                for (size_t t = 0; t < tokens; t++)
                    sums[r][t] = _mm256_fmadd_ps(wide, _mm256_loadu_ps(task->x + t * columns + d),
                                                 sums[r][t]);
            }
    }
    for (size_t r = 0; r < rows && row + r < own->rows; r++)
        for (size_t t = 0; t < tokens; t++) {
            const float sum = sum_of(sums[r][t]);
            uc_to_bfloat16(&sum, 1, (uint8_t *)(own->out + t * own->rows + row + r));
        }
}

/* Blocks of ROWS rows. */
TARGET static void blocks(void *context, size_t first, size_t end) {
    const struct task *task = context;
    const size_t tokens = task->own->tokens;
    for (size_t row = first * ROWS; row < end * ROWS && row < task->own->rows; row += ROWS) {
        if (tokens == 1)
            multiply(task, row, 1, ROWS);
        else if (tokens == 2)
            multiply(task, row, 2, ROWS);
        else
            for (size_t r = row; r < row + ROWS && r < task->own->rows; r += ROWS_OF_MANY)
                if (tokens == 3)
                    multiply(task, r, 3, ROWS_OF_MANY);
                else
                    multiply(task, r, 4, ROWS_OF_MANY);
    }
}

int uc_head_usable(void) {
    return uc_panels_avx2.usable();
}

int uc_head(const struct uc_head *own, unsigned threads) {
    if (!own->tokens || !own->rows)
        return 1;
    float *x = malloc(own->tokens * own->columns * sizeof *x);
    if (!x)
        return 0;
    uc_from_bfloat16((const uint8_t *)own->x, own->tokens * own->columns, x);
    struct task task = {own, x};
    uc_run(threads, (own->rows + ROWS - 1) / ROWS, 8, blocks, &task);
    free(x);
    return 1;
}
#else
int uc_head_usable(void) {
    return 0;
}

int uc_head(const struct uc_head *own, unsigned threads) {
    (void)own, (void)threads;
    return 0;
}
#endif
