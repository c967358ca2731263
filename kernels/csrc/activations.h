/* Bodies that the compiler widens by itself, once for each instruction set that includes them. */
#ifndef UC_ACTIVATIONS_H
#define UC_ACTIVATIONS_H

#include <stdint.h>
#include <string.h>

#include "panel.h"

#define UC_INLINE static inline __attribute__((always_inline))

/* Comparing the bits of magnitudes orders them, infinity and then NaN last. The sum with 1.5 * 2^23
 * rounds to the nearest even integer and leaves it in the low bits. */
UC_INLINE void uc_quantize_body(const float *from, size_t count, float greatest,
                                int8_t *restrict codes, float *scale, int32_t *owed) {
    uint32_t most = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    float top;
    memcpy(&top, &most, 4);
    const float inverse = top > 0 ? greatest / top : 0.0f;
    int32_t total = 0;
    for (size_t i = 0; i < count; i++) {
        float product = from[i] * inverse, rounded = product + 12582912.0f;
        uint32_t bits, code;
        memcpy(&bits, &product, 4);
        memcpy(&code, &rounded, 4);
        code = (bits & 0x7fffffffu) < 0x7f800000u ? code - 0x4b400000u : 0;
        codes[i] = (int8_t)code;
        total += (int32_t)code;
    }
    *scale = top / greatest;
    *owed = -total;
}

UC_INLINE void uc_from_bfloat16(const uint8_t *from, size_t count, float *restrict to) {
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, from + 2 * i, 2);
        uint32_t bits = (uint32_t)half << 16;
        memcpy(to + i, &bits, 4);
    }
}

UC_INLINE void uc_to_bfloat16(const float *from, size_t count, uint8_t *restrict to) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
        uint16_t half = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (uint16_t)rounded;
        memcpy(to + 2 * i, &half, 2);
    }
}

#endif
