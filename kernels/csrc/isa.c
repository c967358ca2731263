#include "isa.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

int uc_has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

/* With one token a plain loop reads memory at 28 GB/s on Zen 4, and at 24 if told to fetch; on
 * Granite Rapids at 15 and 19. Where activations come in between, fetching helps there too. Zen 3,
 * which has no AVX-512, multiplies int4 and ternary weights from memory a quarter faster with it. */
size_t uc_ahead(size_t tokens) {
    const int zen4 = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512vnni");
    return tokens == 1 && zen4 ? 0 : 3072;
}
#else
size_t uc_ahead(size_t tokens) {
    (void)tokens;
    return 0;
}
#endif

static const struct uc_isa table[] = {
#if defined(UC_AMX_MODEL) /* tests name the panels that go with the model */
    {"amx", &UC_AMX_MODEL, &uc_tiling_amx},
#elif defined(__x86_64__)
    {"amx", &uc_panels_avx512vnni, &uc_tiling_amx},
#endif
#if defined(__x86_64__)
    {"avx512vnni", &uc_panels_avx512vnni, &uc_tiling_avx512vnni},
    {"avx2", &uc_panels_avx2, &uc_tiling_avx2},
#elif defined(__aarch64__)
    {"neon_dotprod", &uc_panels_neon_dotprod, NULL},
#endif
    {"scalar", &uc_panels_scalar, NULL},
};

static _Atomic(const struct uc_isa *) live;

int uc_isa_usable(const struct uc_isa *isa) {
    return isa->panels->usable() && !(isa->tiling && isa->tiling->usable && !isa->tiling->usable());
}

const struct uc_isa *uc_isa_live(void) {
    const struct uc_isa *found = atomic_load(&live);
    if (!found) {
        found = table;
        while (!uc_isa_usable(found))
            found++;
        atomic_store(&live, found);
    }
    return found;
}

enum uc_status uc_isa_use(const char *name) {
    const struct uc_isa *isa;
    for (unsigned i = 0; (isa = uc_isa_at(i)) != NULL; i++)
        if (strcmp(isa->name, name) == 0 && uc_isa_usable(isa)) {
            atomic_store(&live, isa);
            return UC_OK;
        }
    return UC_NO_ISA;
}

const struct uc_isa *uc_isa_at(unsigned index) {
    return index < sizeof table / sizeof *table ? table + index : NULL;
}
