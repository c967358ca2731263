// How fast can threads read memory? One pass over a buffer, each thread a part of its own, with the
// prefetch distance that the kernels use. The buffer is large and on huge pages where there are any.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

typedef struct {
    const uint8_t *start;
    size_t bytes;
    uint64_t sum;
} part;

static void *read_part(void *given) {
    part *own = given;
    typedef uint64_t line __attribute__((vector_size(64), aligned(64)));
    line a = {0}, b = {0};
    for (size_t at = 0; at < own->bytes; at += 128) {
        __builtin_prefetch(own->start + at + 1024, 0, 3);
        __builtin_prefetch(own->start + at + 1088, 0, 3);
        a += *(const line *)(own->start + at);
        b += *(const line *)(own->start + at + 64);
    }
    a += b;
    for (int i = 0; i < 8; i++) own->sum += a[i];
    return NULL;
}

// Return the seconds of one pass over `bytes` (a multiple of 128 times `threads`) after a first one.
double read_seconds(size_t bytes, int threads, int huge) {
    uint8_t *buffer = mmap(NULL, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED) return -1;
    if (huge) madvise(buffer, bytes + 4096, MADV_HUGEPAGE);
    for (size_t at = 0; at < bytes; at += 64) buffer[at] = (uint8_t)at;
    double best = 1e9;
    for (int pass = 0; pass < 5; pass++) {
        struct timespec begin, end;
        pthread_t ids[64];
        part parts[64];
        clock_gettime(CLOCK_MONOTONIC, &begin);
        for (int i = 0; i < threads; i++) {
            parts[i] = (part){buffer + bytes / threads * i, bytes / threads, 0};
            pthread_create(&ids[i], NULL, read_part, &parts[i]);
        }
        volatile uint64_t sum = 0;
        for (int i = 0; i < threads; i++) {
            pthread_join(ids[i], NULL);
            sum += parts[i].sum;
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        double took = (end.tv_sec - begin.tv_sec) + 1e-9 * (end.tv_nsec - begin.tv_nsec);
        if (took < best) best = took;
    }
    munmap(buffer, bytes + 4096);
    return best;
}
