#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

enum { SPINS = 4000 }; /* of a pause each: 20 to 60 microseconds */

struct share {
    _Alignas(64) atomic_ullong range; /* first << 32 | end */
};

struct job {
    uc_work *work;
    void *context;
    size_t grain;
    unsigned parts;
};

static pthread_mutex_t running = PTHREAD_MUTEX_INITIALIZER; /* held for a whole run */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;    /* guards what follows */
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static struct job job;
static unsigned started, sleeping;
static int open_, stop;
static pthread_t workers[UC_THREADS_MAX];
static atomic_ulong generation; /* of the job; written under the lock, watched without */
static atomic_uint inside;      /* workers that may touch the job */
static struct share shares[UC_THREADS_MAX];
static uc_team *team; /* NULL: none, or left with the parent by fork() */
static uc_team_size *team_size;

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline unsigned long long pack(size_t first, size_t end) {
    return (unsigned long long)first << 32 | end;
}

/* Take up to `grain` items, from the front or the back. Returns how many; 0: none are left. */
static size_t take(struct share *share, size_t grain, int front, size_t *first) {
    unsigned long long range = atomic_load_explicit(&share->range, memory_order_relaxed);
    for (;;) {
        size_t from = (size_t)(range >> 32), end = (size_t)(range & 0xffffffffu);
        if (from >= end)
            return 0;
        size_t count = end - from < grain ? end - from : grain;
        unsigned long long rest = front ? pack(from + count, end) : pack(from, end - count);
        if (atomic_compare_exchange_weak(&share->range, &range, rest)) {
            *first = front ? from : end - count;
            return count;
        }
    }
}

static void work_through(const struct job *own, unsigned self) {
    for (unsigned k = 0; k < own->parts; k++) {
        struct share *share = &shares[(self + k) % own->parts];
        size_t first, count;
        while ((count = take(share, own->grain, k == 0, &first)) != 0)
            own->work(own->context, first, first + count);
    }
}

static void *worker(void *argument) {
    unsigned self = (unsigned)(uintptr_t)argument;
    unsigned long seen = 0; /* generations start at 1, so a new worker joins the job under way */
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&generation) == seen; spin++)
            pause_briefly();
        pthread_mutex_lock(&lock);
        while (atomic_load(&generation) == seen && !stop) {
            sleeping++;
            pthread_cond_wait(&wake, &lock);
            sleeping--;
        }
        if (stop) {
            pthread_mutex_unlock(&lock);
            return NULL;
        }
        seen = atomic_load(&generation);
        struct job own = job;
        int join = open_ && self < own.parts;
        if (join)
            atomic_fetch_add(&inside, 1);
        pthread_mutex_unlock(&lock);
        if (join) {
            work_through(&own, self);
            atomic_fetch_sub(&inside, 1);
        }
    }
}

struct shared_job {
    struct job job;
    atomic_uint next; /* who comes gets the next number */
};

static void join(void *argument) {
    struct shared_job *own = argument;
    unsigned self = atomic_fetch_add(&own->next, 1);
    if (self < own->job.parts)
        work_through(&own->job, self);
}

void uc_run(unsigned threads, size_t items, size_t grain, uc_work *work, void *context) {
    const unsigned wanted = threads;
    grain = grain ? grain : 1;
    threads = threads < UC_THREADS_MAX ? threads : UC_THREADS_MAX;
    threads = threads < items / grain ? threads : (unsigned)(items / grain);
    if (threads <= 1 || pthread_mutex_trylock(&running) != 0) {
        if (items)
            work(context, 0, items);
        return;
    }
    for (unsigned i = 0; i < threads; i++)
        atomic_store(&shares[i].range, pack(items * i / threads, items * (i + 1) / threads));
    struct job own = {work, context, grain, threads};
    if (team && team_size() == (int)wanted) {
        struct shared_job shared = {own, 0};
        team(join, &shared, wanted, 0);
        pthread_mutex_unlock(&running);
        return;
    }
    pthread_mutex_lock(&lock);
    job = own;
    open_ = 1;
    atomic_fetch_add(&generation, 1);
    /* Too few threads is not an error: whoever is there takes all shares. */
    while (started + 1 < threads &&
           pthread_create(&workers[started], NULL, worker, (void *)(uintptr_t)(started + 1)) == 0)
        started++;
    if (sleeping)
        pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    work_through(&own, 0);
    pthread_mutex_lock(&lock);
    open_ = 0;
    pthread_mutex_unlock(&lock);
    for (int spin = 0; atomic_load(&inside); spin++)
        if (spin < SPINS)
            pause_briefly();
        else
            sched_yield();
    pthread_mutex_unlock(&running);
}

void uc_pool_stop(void) {
    pthread_mutex_lock(&lock);
    stop = 1;
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    for (unsigned i = 0; i < started; i++)
        pthread_join(workers[i], NULL);
    started = 0;
    stop = 0;
}

void uc_pool_share(uc_team *start, uc_team_size *size) {
    pthread_mutex_lock(&running);
    team = start;
    team_size = size;
    pthread_mutex_unlock(&running);
}

static void in_child(void) {
    /* The threads stayed with the parent, and so did whoever held these. */
    pthread_mutex_init(&running, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
    started = sleeping = 0;
    open_ = stop = 0;
    atomic_store(&inside, 0);
    team = NULL; /* of the parent's threads none is here, and OpenMP would wait for them */
}

void uc_pool_prepare(void) {
    pthread_atfork(NULL, NULL, in_child);
}
