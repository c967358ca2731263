/* Runs the kernels without Python, for valgrind and for emulators of other processors.
 *
 * Each round draws a weight, activations and sizes, multiplies them with every instruction set
 * named on the command line (default: all that this machine can run) and compares the bits with
 * those of `scalar`. All buffers are allocated to the byte, so that a read or write outside is
 * seen.
 *
 *     cc -std=c11 -g -O1 -ffp-contract=off -pthread -Ikernels/csrc \
 *         kernels/csrc/{isa,layout,panel_*,pool,product,tiles*,trits}.c
 * tests/kernels/csrc_driver/main.c -lm
 *     ./a.out ROUNDS [ISA ...]
 *
 * Exits with 0 where all bits agree, 1 where some do not, 2 where an instruction set is not there,
 * and 3 where one changed byte of a weight does not show.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "isa.h"
#include "pool.h"
#include "product.h"

#ifndef SHORT
#define SHORT 0 /* bytes that weights lack, to see that a tool notices */
#endif
#ifndef MOST_TOKENS
#define MOST_TOKENS 40
#define MOST_COLUMNS 420
#endif

static uint64_t state = 88172645463325252u;

static uint32_t below(uint32_t count) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32) % count;
}

static uint8_t *bytes(size_t count) {
    uint8_t *memory = malloc(count ? count : 1);
    if (!memory)
        abort();
    return memory;
}

/* A float in about -2..2 as a dtype; an extreme one is -2 or 2. */
static void put(enum uc_dtype dtype, int extreme, uint8_t *to) {
    float value =
        extreme ? (float)below(2) * 4.0f - 2.0f : ((float)below(8192) - 4096.0f) / 2048.0f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t half = (uint16_t)(bits >> 16);
    if (dtype == UC_FLOAT16 && extreme)
        half = value < 0 ? 0xc000 : 0x4000;
    else if (dtype == UC_FLOAT16)
        half = (uint16_t)(below(0x4000) | (below(2) << 15));
    memcpy(to, dtype == UC_FLOAT32 ? (void *)&value : (void *)&half, uc_bytes_of(dtype));
}

static enum uc_status multiply(const char *isa, const struct uc_layout *layout,
                               const struct uc_product *product, uint8_t *out) {
    enum uc_status status = uc_isa_use(isa);
    if (status != UC_OK)
        return status;
    struct uc_product own = *product;
    own.out = out;
    memset(out, 0xff, own.out_bytes);
    return uc_linear(layout, &own);
}

static int round_of(unsigned round, const char *const *names, size_t count) {
    static const long long groups[] = {32, 64, 128, 7, -1};
    static const int low[UC_KINDS] = {-128, -8, -2, -1, -1};
    static const int radix[UC_KINDS] = {256, 16, 4, 3, 2}, step[UC_KINDS] = {1, 1, 1, 1, 2};
    struct uc_layout layout;
    enum uc_kind kind = (enum uc_kind)(round % UC_KINDS);
    if (uc_layout_of(&layout, (int)kind, 1 + below(40), 1 + below(MOST_COLUMNS), groups[below(5)],
                     (int)below(2), (int)below(3)) != UC_OK)
        abort();
    size_t wide = layout.rows * layout.groups, cells = layout.rows * layout.columns;
    size_t scale_bytes = uc_bytes_of(layout.scale_dtype);
    int8_t *codes = (int8_t *)bytes(cells), *zeros = (int8_t *)bytes(wide);
    uint8_t *scales = bytes(wide * scale_bytes), *data = bytes(layout.bytes - SHORT);
    /* The greatest sums: only the least and the greatest codes and activations. */
    const int extreme = below(4) == 0;
    for (size_t i = 0; i < cells; i++) {
        int digit = (int)below(extreme ? 2 : (uint32_t)radix[kind]);
        codes[i] = (int8_t)(low[kind] + step[kind] * (extreme ? digit * (radix[kind] - 1) : digit));
    }
    for (size_t i = 0; i < wide; i++) {
        zeros[i] = (int8_t)(low[kind] + (int)below((uint32_t)radix[kind]));
        put(layout.scale_dtype, 0, scales + i * scale_bytes);
    }
    unsigned threads = 1 + below(2);
    if (uc_block(&layout, codes, scales, zeros, data, threads) != UC_OK)
        abort();
    enum uc_dtype dtype = (enum uc_dtype)below(3);
    size_t tokens = 1 + below(round % 4 ? 5 : MOST_TOKENS), own = uc_bytes_of(dtype);
    struct uc_product product = {.x_bytes = tokens * layout.columns * own,
                                 .weight = data,
                                 .weight_bytes = layout.bytes,
                                 .bias_bytes = layout.rows * sizeof(float),
                                 .out_bytes = tokens * layout.rows * own,
                                 .tokens = tokens,
                                 .dtype = (int)dtype,
                                 .exact = (int)below(2),
                                 .threads = threads};
    uint8_t *x = bytes(product.x_bytes), *bias = bytes(product.bias_bytes);
    for (size_t i = 0; i < tokens * layout.columns; i++)
        put(dtype, extreme, x + i * own);
    for (size_t i = 0; i < layout.rows; i++)
        put(UC_FLOAT32, 0, bias + i * sizeof(float));
    product.x = x;
    product.bias = below(2) ? bias : NULL;
    uint8_t *wanted = bytes(product.out_bytes), *found = bytes(product.out_bytes);
    int answer = multiply("scalar", &layout, &product, wanted) != UC_OK;
    for (size_t i = 0; i < count; i++)
        if (multiply(names[i], &layout, &product, found) != UC_OK ||
            memcmp(found, wanted, product.out_bytes) != 0) {
            printf("round %u: %s differs: kind %d, %zu x %zu, group %zu, %zu tokens, dtype %d, "
                   "exact %d\n",
                   round, names[i], (int)kind, layout.rows, layout.columns, layout.group, tokens,
                   (int)dtype, product.exact);
            answer = 1;
        }
    /* A comparer that cannot fail proves nothing: another first digit must show somewhere. */
    if (round < UC_KINDS && dtype == UC_FLOAT32 && answer == 0) {
        /* The first weight of all, behind the scales. */
        data[layout.stretches > 1 ? layout.header_bytes : layout.last_header] ^= 1;
        if (multiply("scalar", &layout, &product, found) != UC_OK ||
            memcmp(found, wanted, product.out_bytes) == 0)
            answer = 3;
    }
    product.weight_bytes--;
    if (uc_linear(&layout, &product) != UC_BAD_WEIGHT_BYTES)
        answer = 1;
    free(codes), free(zeros), free(scales), free(data);
    free(x), free(bias), free(wanted), free(found);
    return answer;
}

int main(int count, char **arguments) {
    const char *names[16];
    size_t named = 0;
    for (int i = 2; i < count && named < 16; i++) {
        if (uc_isa_use(arguments[i]) != UC_OK) {
            printf("%s is not there\n", arguments[i]);
            return 2;
        }
        names[named++] = arguments[i];
    }
    if (!named)
        for (const struct uc_isa *isa; (isa = uc_isa_at((unsigned)named)) != NULL;)
            names[named++] = isa->name;
    size_t usable = 0;
    for (size_t i = 0; i < named; i++)
        if (uc_isa_use(names[i]) == UC_OK)
            names[usable++] = names[i];
    unsigned rounds = count > 1 ? (unsigned)atoi(arguments[1]) : 100;
    int answer = 0;
    for (unsigned round = 0; round < rounds && !answer; round++)
        answer = round_of(round, names, usable);
    uc_pool_stop();
    printf("%u rounds, %zu instruction sets: %s\n", rounds, usable, answer ? "wrong" : "equal");
    return answer;
}
