/* Tiles with AMX: 64 columns of 16 rows by 16 tokens, one instruction.
 *
 * Sixteen lines of a slab are a tile as they lie: line k has, for each of 16 rows, the digits of
 * four columns. Sixteen tokens by 64 columns are the other operand. Two panels by 32 tokens are
 * four tiles of sums, and with two of either operand that is all eight there are: each tile that is
 * read meets two others.
 *
 * Digits are made signed by taking the offset away, once for all tokens; only 8-bit weights with
 * offsets of their own do not fit then, and pay for the rest of theirs at the end of a span.
 *
 * The sums of a span go through memory to the registers that scale them (panel.h). That takes about
 * as long as the products of 128 columns do, so a span is scaled while the next one multiplies.
 *
 * Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18, volume
 * 2 (TDPBSSD and the others); Linux, Documentation/arch/x86/xstate.rst (the permission).
 */
#define _GNU_SOURCE /* syscall */

#include "isa.h"

#if defined(__x86_64__) || defined(UC_AMX_MODEL)

#include <string.h>

#if defined(UC_AMX_MODEL)
#include "amx_model.h"
#define WIDE
#else
#include <cpuid.h>

#include "amx.h"
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define PART static inline __attribute__((always_inline)) WIDE

/* A register of 16 rows, in the compiler's own terms: the model runs without AVX-512. */
typedef int32_t words __attribute__((vector_size(64), may_alias));
typedef uint32_t lanes __attribute__((vector_size(64), may_alias));
typedef float floats __attribute__((vector_size(64), may_alias));
typedef uint8_t octets __attribute__((vector_size(64), may_alias));

enum { HALF = 16, TOKENS = 2 * HALF, STEP = 64, TILE_BYTES = HALF * STEP };

static int usable(void) {
#if defined(UC_AMX_MODEL)
    return 1;
#elif defined(__linux__)
    enum { LEAF_1_OSXSAVE = 1 << 27, LEAF_7_TILE = 1 << 24, LEAF_7_INT8 = 1 << 25 };
    enum { STATE = 3 << 17, DATA = 18, REQUEST = 0x1023 }; /* ARCH_REQ_XCOMP_PERM */
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & LEAF_1_OSXSAVE))
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & LEAF_7_TILE) || !(d & LEAF_7_INT8))
        return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    /* The system keeps tiles of a thread only for processes that asked. */
    return (low & STATE) == STATE && syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
#else
    return 0; /* nobody to ask for the state */
#endif
}

static void begin(void) {
    static const struct uc_amx_shape shape = {
        .palette = 1,
        .columns = {STEP, STEP, STEP, STEP, STEP, STEP, STEP, STEP},
        .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    UC_AMX_CONFIGURE(&shape);
}

static void end(void) {
    UC_AMX_RELEASE();
}

/* Take the offsets off the digits of a slab's side. */
static WIDE void settle(const struct uc_layout *layout, size_t first, size_t spans, size_t side,
                        struct uc_slab *slab) {
    const int32_t common = uc_offset(layout->kind);
    octets *line = (octets *)slab->digits[side][0];
    for (size_t span = 0; span < spans; span++) {
        words *offsets = (words *)slab->offsets[span][side], less = {0};
        if (layout->symmetric || layout->kind == UC_INT8)
            less += common;
        else
            less = *offsets;
        if (!layout->symmetric)
            *offsets -= less;
        const octets bytes = (octets)((lanes)less * 0x01010101u); /* in all four of a lane */
        const octets *end = line + uc_steps_of(layout, first + span, STEP) * (STEP / UC_LANE);
        for (; line < end; line++)
            *line -= bytes;
    }
}

static int32_t lay(const int8_t *codes, size_t steps, int32_t most, size_t stride, uint8_t *to) {
    (void)most;
    for (size_t i = 0; i < steps; i++)
        memcpy(to + i * stride, codes + i * STEP, STEP);
    return 0;
}

/* Scale the sums of a span and add them to the totals; both are [tokens][UC_SIDES][16]. */
PART void scale(const int rest, const struct uc_slab *slab, const struct uc_tile *tile, size_t span,
                const int32_t *sums, float *restrict totals) {
    const words *sum = (const words *)sums, *offsets = (const words *)slab->offsets[span][0];
    const floats *scales = (const floats *)slab->scales[span][0];
    floats *total = (floats *)totals;
    for (size_t t = span * tile->count, last = t + tile->count; t < last; t++)
#pragma GCC unroll 2
        for (size_t side = 0; side < UC_SIDES; side++) {
            words own = *sum++;
            if (rest)
                own += offsets[side] * tile->owed[t];
            *total++ += __builtin_convertvector(own, floats) * tile->scales[t] * scales[side];
        }
}

/* Tiles 0 and 1 are the sums of the first 16 tokens by both panels, 2 and 3 those of the other 16;
 * 4 and 5 are tokens, 6 and 7 weights. */
PART void tile_of(const int both, const int rest, const struct uc_layout *layout,
                  const struct uc_slab *slab, size_t first, size_t spans,
                  const struct uc_tile *tile, float *restrict totals) {
    enum { ROW = UC_SIDES * UC_ROWS };
    _Alignas(64) int32_t sums[TOKENS * ROW];
    const uint8_t *digits = slab->digits[0][0], *x = tile->codes, *next = tile->next[0];
    const ptrdiff_t far = tile->next[1] - next;
    for (size_t span = 0; span < spans; span++) {
        UC_AMX_ZERO(0);
        UC_AMX_ZERO(1);
        if (both) {
            UC_AMX_ZERO(2);
            UC_AMX_ZERO(3);
        }
        for (size_t steps = uc_steps_of(layout, first + span, STEP); steps; steps--) {
            UC_AMX_LOAD(6, digits, UC_LINE);
            UC_AMX_LOAD(4, x, STEP);
            UC_AMX_MULTIPLY(0, 4, 6);
            UC_AMX_LOAD(7, digits + sizeof *slab->digits, UC_LINE);
            UC_AMX_MULTIPLY(1, 4, 7);
            if (both) {
                UC_AMX_LOAD(5, x + TILE_BYTES, STEP);
                UC_AMX_MULTIPLY(2, 5, 6);
                UC_AMX_MULTIPLY(3, 5, 7);
            }
            for (size_t at = 0; at < tile->next_step; at += UC_LINE) {
                __builtin_prefetch(next + at);
                __builtin_prefetch(next + far + at);
            }
            next += tile->next_step;
            digits += TILE_BYTES;
            x += tile->count * STEP;
        }
        if (span > 0)
            scale(rest, slab, tile, span - 1, sums, totals);
        UC_AMX_STORE(0, sums, ROW * sizeof *sums);
        UC_AMX_STORE(1, sums + UC_ROWS, ROW * sizeof *sums);
        if (both) {
            UC_AMX_STORE(2, sums + HALF * ROW, ROW * sizeof *sums);
            UC_AMX_STORE(3, sums + HALF * ROW + UC_ROWS, ROW * sizeof *sums);
        }
    }
    scale(rest, slab, tile, spans - 1, sums, totals);
}

static WIDE void multiply(const struct uc_layout *layout, const struct uc_slab *slab, size_t first,
                          size_t spans, const struct uc_tile *tile, float *restrict totals) {
    const int both = tile->count > HALF, rest = !layout->symmetric && layout->kind == UC_INT8;
    if (both && !rest)
        tile_of(1, 0, layout, slab, first, spans, tile, totals);
    else if (both)
        tile_of(1, 1, layout, slab, first, spans, tile, totals);
    else if (!rest)
        tile_of(0, 0, layout, slab, first, spans, tile, totals);
    else
        tile_of(0, 1, layout, slab, first, spans, tile, totals);
}

const struct uc_tiling uc_tiling_amx = {
    .usable = usable,
    .least = HALF, /* with 4 tokens panels are faster; between, nobody has measured */
    .tokens = TOKENS,
    .rounding = HALF,
    .step = STEP,
    .bytes = 1,
    .settle = settle,
    .lay = lay,
    .multiply = multiply,
    .begin = begin,
    .end = end,
};

#endif
