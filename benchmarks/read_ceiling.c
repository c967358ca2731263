// How fast can threads read memory? Each thread reads a part of its own, as one stream or as several
// side by side, asking for lines ahead or not: which way is fastest differs from processor to
// processor, and the fastest is the ceiling. The buffer is large and on huge pages where there are any.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { MOST = 64, PASSES = 3 };
static const int streams_of[] = {1, 2, 4}, ahead_of[] = {0, 1024, 3072};

typedef uint64_t line __attribute__((vector_size(64), aligned(64)));
typedef struct {
    const uint8_t *start;
    size_t bytes;
    int streams, ahead;
    uint64_t sum;
} part;

#define INLINE static inline __attribute__((always_inline))

INLINE uint64_t sum_of(const part *own, const int streams, const int fetch) {
    const size_t each = own->bytes / streams, ahead = own->ahead;
    line sums[4] = {{0}};
    for (size_t at = 0; at < each; at += sizeof(line))
#pragma GCC unroll 4
        for (int i = 0; i < streams; i++) {
            const uint8_t *from = own->start + i * each + at;
            if (fetch) __builtin_prefetch(from + ahead, 0, 3);
            sums[i] += *(const line *)from;
        }
    sums[0] += sums[1] + sums[2] + sums[3];
    uint64_t sum = 0;
    for (int i = 0; i < 8; i++) sum += sums[0][i];
    return sum;
}

static void *read_part(void *given) {
    part *own = given;
    if (own->streams == 1) own->sum = own->ahead ? sum_of(own, 1, 1) : sum_of(own, 1, 0);
    if (own->streams == 2) own->sum = own->ahead ? sum_of(own, 2, 1) : sum_of(own, 2, 0);
    if (own->streams == 4) own->sum = own->ahead ? sum_of(own, 4, 1) : sum_of(own, 4, 0);
    return NULL;
}

static double pass(const uint8_t *buffer, size_t bytes, int threads, int streams, int ahead, uint64_t *sum) {
    struct timespec begin, end;
    pthread_t ids[MOST];
    part parts[MOST];
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < threads; i++) {
        parts[i] = (part){buffer + bytes / threads * i, bytes / threads, streams, ahead, 0};
        pthread_create(&ids[i], NULL, read_part, &parts[i]);
    }
    *sum = 0;
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        *sum += parts[i].sum;
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    return (end.tv_sec - begin.tv_sec) + 1e-9 * (end.tv_nsec - begin.tv_nsec);
}

// Return the seconds of the fastest pass over `bytes` (a multiple of 256 times `threads`, of which
// there are at most 64); way: the streams of a thread, and how many bytes ahead it asked for a line.
// -1: no memory, or a pass did not read everything.
double read_seconds(size_t bytes, int threads, int huge, int way[2]) {
    const size_t page = 2 << 20, room = bytes + page;
    uint8_t *memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || threads > MOST) return -1;
    uint8_t *buffer = memory + -(uintptr_t)memory % page;
    madvise(buffer, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    uint64_t expected = 0, sum;
    for (size_t at = 0; at < bytes; at += sizeof(line)) expected += *(uint64_t *)(buffer + at) = at;
    double best = 1e9;
    for (int turn = 0; turn < PASSES; turn++)
        for (int i = 0; i < 9; i++) {
            double took = pass(buffer, bytes, threads, streams_of[i / 3], ahead_of[i % 3], &sum);
            if (sum != expected) best = -1;
            if (took >= best) continue;
            best = took;
            way[0] = streams_of[i / 3];
            way[1] = ahead_of[i % 3];
        }
    munmap(memory, room);
    return best;
}
