/* The tables of trit5, which panel.h describes. */
#include "panel.h"

#define FIRST(b) (uint8_t)((b) % 7 | (b) / 21 << 4 | (b) / 7 % 3 << 6)
#define REST(v) (uint8_t)((v) / 9 | (v) / 3 % 3 << 2 | (v) % 3 << 4)
#define SECOND(b) REST((b) % 8 * 4 + (b) / 8 % 4)
#define EIGHT(of, b)                                                                               \
    of(b), of(b + 1), of(b + 2), of(b + 3), of(b + 4), of(b + 5), of(b + 6), of(b + 7)
#define ALL(of)                                                                                    \
    {                                                                                              \
        EIGHT(of, 0), EIGHT(of, 8), EIGHT(of, 16), EIGHT(of, 24), EIGHT(of, 32), EIGHT(of, 40),    \
            EIGHT(of, 48), EIGHT(of, 56)                                                           \
    }

const uint8_t uc_trit5_first[64] = ALL(FIRST), uc_trit5_second[64] = ALL(SECOND);
