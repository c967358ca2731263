/* Tiles with AVX2: a panel by four tokens, summed in 16 bits.
 *
 * `vpmaddubsw` makes 32 products of one instruction and adds pairs of them, another one adds those
 * up: half the 16 registers hold such sums, and each line of digits that is read meets four tokens,
 * each word of a token two halves of a line. Before 16 bits could overflow, sums are widened and
 * added to those in memory.
 *
 * Weights of 8 bits have no room in 16: they go by panels (panel_avx2.c).
 */
#include "isa.h"

#if defined(__x86_64__)

#include "avx2.h"

enum { TOKENS = 4 };

static int32_t lay(const int8_t *codes, size_t steps, int32_t most, size_t stride, uint8_t *to) {
    (void)most;
    for (size_t step = 0; step < steps; step++, codes += UC_LANE, to += stride)
        memcpy(to, codes, UC_LANE);
    return 0;
}

/* Add the products of some lines with the tokens to their sums. */
PART void add_lines(const size_t count, const uint8_t *lines, size_t some, const uint8_t *x,
                    __m256i sum[TOKENS][HALVES]) {
    __m256i narrow[TOKENS][HALVES];
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
#pragma GCC unroll 2
        for (size_t half = 0; half < HALVES; half++)
            narrow[t][half] = _mm256_setzero_si256();
    for (; some; some--, lines += UC_LINE, x += UC_LANE * count) {
        const __m256i *line = (const __m256i *)(const void *)lines;
        const __m256i digits[] = {_mm256_load_si256(line), _mm256_load_si256(line + 1)};
#pragma GCC unroll 4
        for (size_t t = 0; t < count; t++) {
            const __m256i own = four(x + UC_LANE * t);
#pragma GCC unroll 2
            for (size_t half = 0; half < HALVES; half++)
                narrow[t][half] = dot(narrow[t][half], digits[half], own);
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (size_t t = 0; t < count; t++)
#pragma GCC unroll 2
        for (size_t half = 0; half < HALVES; half++)
            sum[t][half] =
                _mm256_add_epi32(sum[t][half], _mm256_madd_epi16(narrow[t][half], ones));
}

PART void side_of(const size_t count, const struct uc_layout *layout, const struct uc_slab *slab,
                  size_t first, size_t spans, size_t side, const struct uc_tile *tile,
                  float *restrict totals) {
    const size_t most = narrow_lines(layout->kind, 1);
    const uint8_t *digits = slab->digits[side][0], *x = tile->codes, *next = tile->next[side];
    for (size_t span = 0; span < spans; span++) {
        __m256i sum[TOKENS][HALVES];
#pragma GCC unroll 4
        for (size_t t = 0; t < count; t++) {
            const size_t at = span * count + t;
#pragma GCC unroll 2
            for (size_t half = 0; half < HALVES; half++) {
                sum[t][half] = _mm256_set1_epi32(tile->starts[at]);
                if (!layout->symmetric) {
                    const int32_t *offsets = slab->offsets[span][side] + half * HALF;
                    const __m256i own = _mm256_loadu_si256((const __m256i *)(const void *)offsets);
                    sum[t][half] = _mm256_add_epi32(
                        sum[t][half], _mm256_mullo_epi32(own, _mm256_set1_epi32(tile->owed[at])));
                }
            }
        }
        for (size_t left = uc_steps_of(layout, first + span, UC_LANE), some; left; left -= some) {
            some = left < most ? left : most;
            for (size_t ahead = 0; ahead < some * tile->next_step; ahead += UC_LINE)
                fetch(next + ahead);
            next += some * tile->next_step;
            add_lines(count, digits, some, x, sum);
            digits += some * UC_LINE;
            x += some * UC_LANE * count;
        }
#pragma GCC unroll 2
        for (size_t half = 0; half < HALVES; half++) {
            const __m256 scale = _mm256_loadu_ps(slab->scales[span][side] + half * HALF);
#pragma GCC unroll 4
            for (size_t t = 0; t < count; t++) {
                float *total = totals + (t * UC_SIDES + side) * UC_ROWS + half * HALF;
                __m256 product = _mm256_cvtepi32_ps(sum[t][half]);
                product = _mm256_mul_ps(product, _mm256_set1_ps(tile->scales[span * count + t]));
                product = _mm256_mul_ps(product, scale);
                _mm256_storeu_ps(total, _mm256_add_ps(_mm256_loadu_ps(total), product));
            }
        }
    }
}

PART void tile_of(const size_t count, const struct uc_layout *layout, const struct uc_slab *slab,
                  size_t first, size_t spans, const struct uc_tile *tile, float *restrict totals) {
    for (size_t side = 0; side < UC_SIDES; side++)
        side_of(count, layout, slab, first, spans, side, tile, totals);
}

static WIDE void multiply(const struct uc_layout *layout, const struct uc_slab *slab, size_t first,
                          size_t spans, const struct uc_tile *tile, float *restrict totals) {
    switch (tile->count) {
    case 1:
        tile_of(1, layout, slab, first, spans, tile, totals);
        break;
    case 2:
        tile_of(2, layout, slab, first, spans, tile, totals);
        break;
    case 3:
        tile_of(3, layout, slab, first, spans, tile, totals);
        break;
    default:
        tile_of(TOKENS, layout, slab, first, spans, tile, totals);
    }
}

const struct uc_tiling uc_tiling_avx2 = {
    .least = 2 * UC_TOKENS,
    .tokens = TOKENS,
    .rounding = 1,
    .step = UC_LANE,
    .lay = lay,
    .multiply = multiply,
};

#endif
