/* Threads that wait for work: they spin for some microseconds, then sleep.
 *
 * Work is `items` numbered things, split into one contiguous share a thread, so that each thread
 * reads one stream of memory. A thread takes `grain` items at a time from the front of its share,
 * and when that is empty from the back of the others': a thread that the system has not woken yet,
 * or has put aside, delays nobody for more than `grain` items. Who computes an item never changes
 * its result.
 *
 * Threads are started by the first run that wants them, never for one thread. A run inside a run,
 * or beside another thread's run, is computed by its caller alone. After fork() the child has no
 * threads and starts its own.
 */
#ifndef UC_POOL_H
#define UC_POOL_H

#include <stddef.h>

enum { UC_THREADS_MAX = 256 };

/* Compute items first..end-1. */
typedef void uc_work(void *context, size_t first, size_t end);

/* Compute all items and return when they are done. items < 2^32. */
void uc_run(unsigned threads, size_t items, size_t grain, uc_work *work, void *context);

/* Another pool's threads: call `work(context)` on so many, this one among them, and return when all
 * have; how many it would take by itself. GOMP_parallel and omp_get_max_threads are that. */
typedef void uc_team(void (*work)(void *), void *context, unsigned threads, unsigned flags);
typedef int uc_team_size(void);

/* Compute on those threads whenever there are as many as a run wants: their owner has them spin
 * after its own work, and two pools on the same cores wait for each other. NULL: never. */
void uc_pool_share(uc_team *start, uc_team_size *size);

/* End all threads; the next run starts new ones. Not beside a run. */
void uc_pool_stop(void);

/* Call once before all else: what makes fork() safe. */
void uc_pool_prepare(void);

#endif
