/* The instruction sets, and the functions that each one brings.
 *
 * A family is told apart by its feature's name: a function is uc_<what>_<isa>. The table in isa.c
 * is best first and ends with `scalar`, which is the definition: all others give the same bits. A
 * name that this machine cannot run cannot be chosen.
 */
#ifndef UC_ISA_H
#define UC_ISA_H

#include <stdint.h>

#include "panel.h"
#include "tiles.h"

/* Up to 16 tokens, and what tiles of many share with them. */
struct uc_panels {
    int (*usable)(void);
    uc_convert *convert;
    uc_store *store;
    uc_quantize *quantize;
    uc_multiply *dots[UC_KINDS];  /* compute="int8" */
    uc_multiply *exact[UC_KINDS]; /* compute="exact" */
    uc_unpack *unpack[UC_KINDS];  /* for tilings */
};

struct uc_isa {
    const char *name;
    const struct uc_panels *panels;
    const struct uc_tiling *tiling; /* NULL: many tokens go by panels too */
};

/* The instruction set in use: the best that the machine has, until uc_isa_use. */
const struct uc_isa *uc_isa_live(void);

/* Choose by name. UC_NO_ISA where the machine lacks it. */
enum uc_status uc_isa_use(const char *name);

/* All instruction sets in order, best first; NULL behind the last. */
const struct uc_isa *uc_isa_at(unsigned index);

/* Do the processor and the system have it? */
int uc_isa_usable(const struct uc_isa *isa);

/* Does the processor convert float16? Not every compiler's __builtin_cpu_supports knows it. */
int uc_has_f16c(void);

/* How many bytes ahead of a line to fetch, once a line, with so many tokens at once: 0 where the
 * processor reads one stream as fast by itself, and slower if told. */
size_t uc_ahead(size_t tokens);

/* What lies in a file of its own. */
extern const struct uc_panels uc_panels_scalar, uc_panels_avx2, uc_panels_avx512vnni,
    uc_panels_neon_dotprod;
extern const struct uc_tiling uc_tiling_avx2, uc_tiling_avx512vnni, uc_tiling_amx;

#endif
