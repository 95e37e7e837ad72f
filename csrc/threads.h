/* threads.h -- the only parallelism of the CPU backends, and the working memory of its threads. */
#pragma once
#include <stddef.h>

/* Call body(context, task) once for each task in 0 .. tasks-1, on up to threads_get() threads, and return when all are
 * done.  Which thread runs a task, and in what order, is not fixed (each thread has a run of neighbouring tasks, which
 * it takes in rising order, and helps with the others' when it is done): a task's result must depend on the task alone.
 * A call from inside a body, or while another thread uses the pool, runs its tasks on the calling thread. */
void parallel_for(void (*body)(void *context, int task), void *context, int tasks);

/* Number of threads: as set, or BARELM_THREADS, or the CPUs that affinity and cgroup grant. */
int threads_get(void);
void threads_set(int n); /* n >= 1; 0: back to the default */

/* Start the pool and give the calling thread its scratch.  Every entry into the library calls it before the first
 * kernel.  0, or -1 where the system grants no memory; then no kernel may run. */
int threads_ready(void);

/* SCRATCH_BYTES of 64-byte aligned memory of the calling thread, never NULL after threads_ready; pages cost memory once
 * they are touched.  A kernel uses SCRATCH_TASK inside a parallel_for body and SCRATCH_CALL around the parallel_for:
 * the caller runs tasks too.  The content does not outlive the operator. */
enum { SCRATCH_CALL, SCRATCH_TASK, SCRATCH_SLOTS };
#define SCRATCH_BYTES ((size_t)256 << 20)
void *scratch(int slot);
