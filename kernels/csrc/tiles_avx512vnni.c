/* Tiles with AVX-512 VNNI: two columns by one multiplication.
 *
 * With many tokens the pipes that multiply are what bounds a product (decision 3). Winograd's
 * identity halves their work: for activations x, digits d and any constants,
 *
 *     (x1 + L + d2)(x2 - H + d1) = x1 d1 + x2 d2 + T + R
 *     T = (x1 + L)(x2 - H) + LH      of the token alone
 *     R = (d2 + L)(d1 - H)           of the weight alone
 *
 * so that two columns take one multiplication and two additions, which other pipes do, and what is
 * of one side alone is worked out once for all partners of the other. With L = uc_most and H = 128
 * - L the first factor fits an unsigned byte and the second a signed one: that is why activations
 * stop at uc_most. Weights of 8 bits have no room in a byte.
 *
 * A step is a pair of lines of digits, eight bytes of a token: four bytes x1 + L, then four x2 - H.
 * 16 sums of two panels by eight tokens stay in registers over a span.
 *
 * Paper: Winograd, A New Algorithm for Inner Product, IEEE Transactions on Computers C-17 (1968).
 */
#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define PART static inline __attribute__((always_inline)) WIDE

enum { TOKENS = 8, PAIR = 2 * UC_LANE };

/* sum + digits * x, four bytes a lane. Spelt out: GCC copies the sum of its builtin around. */
PART __m512i dot(__m512i sum, __m512i unsigned_, __m512i signed_) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_), "v"(signed_));
    return sum;
}

/* Bytes of activations between what is read and what is fetched: they come from the second cache or
 * the third. */
enum { AHEAD = 512 };

PART void fetch(const uint8_t *at) {
    _mm_prefetch((const char *)at, _MM_HINT_T0);
}

/* Four bytes in every lane. */
PART __m512i four(const uint8_t *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}

/* Sum R over every span. */
static WIDE void settle(const struct uc_layout *layout, size_t first, size_t spans, size_t side,
                        struct uc_slab *slab) {
    const int most = uc_most(layout->kind);
    const __m512i up = _mm512_set1_epi8((char)most), down = _mm512_set1_epi8((char)(128 - most));
    const uint8_t *digits = slab->digits[side][0];
    for (size_t span = 0; span < spans; span++) {
        __m512i sum = _mm512_setzero_si512();
        for (size_t pairs = uc_steps_of(layout, first + span, PAIR); pairs; pairs--) {
            sum = dot(sum, _mm512_add_epi8(_mm512_load_si512(digits + UC_LINE), up),
                      _mm512_sub_epi8(_mm512_load_si512(digits), down));
            digits += 2 * UC_LINE;
        }
        _mm512_storeu_si512(slab->taken[span][side], _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }
}

/* Lay pairs out and sum T. */
static WIDE int32_t lay(const int8_t *codes, size_t pairs, int32_t most, size_t stride,
                        uint8_t *to) {
    /* Even words are first ones: + most; odd ones - (128 - most). */
    const uint64_t up = 0x01010101u * (uint64_t)most;
    const uint64_t down = 0x01010101u * (uint64_t)(uint8_t)(most - 128);
    const __m512i change = _mm512_set1_epi64((int64_t)(up | down << 32));
    const __m512i low = _mm512_set1_epi64(0xffffffff);
    __m512i sum = _mm512_setzero_si512();
    size_t pair = 0;
    for (; pair < pairs; pair += 8) {
        const size_t some = pairs - pair < 8 ? pairs - pair : 8;
        const __mmask8 there = (__mmask8)((1u << some) - 1);
        __m512i bytes =
            _mm512_add_epi8(_mm512_maskz_loadu_epi64(there, codes + PAIR * pair), change);
        bytes = _mm512_maskz_mov_epi64(there, bytes);
        sum = dot(sum, _mm512_and_si512(bytes, low), _mm512_srli_epi64(bytes, 32));
        uint64_t words[8];
        _mm512_storeu_si512(words, bytes);
        for (size_t i = 0; i < some; i++, to += stride)
            memcpy(to, words + i, sizeof *words);
    }
    return _mm512_reduce_add_epi32(sum) + (int32_t)pairs * UC_LANE * most * (128 - most);
}

PART void tile_of(const size_t count, const struct uc_layout *layout, const struct uc_slab *slab,
                  size_t first, size_t spans, const struct uc_tile *tile, float *restrict totals) {
    const uint8_t *digits = slab->digits[0][0], *x = tile->codes, *next = tile->next[0];
    const ptrdiff_t far = tile->next[1] - next;
    for (size_t span = 0; span < spans; span++) {
        const size_t pairs = uc_steps_of(layout, first + span, PAIR);
        __m512i sum[TOKENS][UC_SIDES];
#pragma GCC unroll 2
        for (size_t side = 0; side < UC_SIDES; side++) {
            const __m512i taken = _mm512_loadu_si512(slab->taken[span][side]);
#pragma GCC unroll 8
            for (size_t t = 0; t < count; t++)
                sum[t][side] =
                    _mm512_add_epi32(taken, _mm512_set1_epi32(tile->starts[span * count + t]));
        }
        if (!layout->symmetric) {
#pragma GCC unroll 2
            for (size_t side = 0; side < UC_SIDES; side++) {
                const __m512i offsets = _mm512_loadu_si512(slab->offsets[span][side]);
#pragma GCC unroll 8
                for (size_t t = 0; t < count; t++) {
                    const __m512i owed = _mm512_set1_epi32(tile->owed[span * count + t]);
                    sum[t][side] =
                        _mm512_add_epi32(sum[t][side], _mm512_mullo_epi32(offsets, owed));
                }
            }
        }
        for (size_t pair = 0; pair < pairs; pair++) {
            fetch(x + AHEAD);
            fetch(next);
            fetch(next + far);
            next += tile->next_step;
            __m512i digit[UC_SIDES][2];
#pragma GCC unroll 2
            for (size_t side = 0; side < UC_SIDES; side++) {
                digit[side][0] = _mm512_load_si512(digits + sizeof *slab->digits * side);
                digit[side][1] = _mm512_load_si512(digits + sizeof *slab->digits * side + UC_LINE);
            }
#pragma GCC unroll 8
            for (size_t t = 0; t < count; t++) {
                const __m512i one = four(x + PAIR * t), two = four(x + PAIR * t + UC_LANE);
#pragma GCC unroll 2
                for (size_t side = 0; side < UC_SIDES; side++)
                    sum[t][side] = dot(sum[t][side], _mm512_add_epi8(one, digit[side][1]),
                                       _mm512_add_epi8(two, digit[side][0]));
            }
            x += PAIR * count;
            digits += 2 * UC_LINE;
        }
        const __m512 scale[] = {_mm512_loadu_ps(slab->scales[span][0]),
                                _mm512_loadu_ps(slab->scales[span][1])};
#pragma GCC unroll 8
        for (size_t t = 0; t < count; t++) {
            const __m512 one = _mm512_set1_ps(tile->scales[span * count + t]);
#pragma GCC unroll 2
            for (size_t side = 0; side < UC_SIDES; side++) {
                float *total = totals + (t * UC_SIDES + side) * UC_ROWS;
                __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t][side]), one);
                product = _mm512_mul_ps(product, scale[side]);
                _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), product));
            }
            /* GCC 12 would work all products out before it adds one, and spill them. */
            __asm__ volatile("" ::: "memory");
        }
    }
}

static WIDE void multiply(const struct uc_layout *layout, const struct uc_slab *slab, size_t first,
                          size_t spans, const struct uc_tile *tile, float *restrict totals) {
#define CASE(count)                                                                                \
    case count:                                                                                    \
        tile_of(count, layout, slab, first, spans, tile, totals);                                  \
        break
    switch (tile->count) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
    default:
        tile_of(TOKENS, layout, slab, first, spans, tile, totals);
    }
#undef CASE
}

const struct uc_tiling uc_tiling_avx512vnni = {
    .least = UC_TOKENS + 1,
    .tokens = TOKENS,
    .rounding = 1,
    .step = PAIR,
    .settle = settle,
    .lay = lay,
    .multiply = multiply,
};

#endif
