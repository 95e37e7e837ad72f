/* threads.c -- a pool of threads that spin for a moment, then park: the many small operators of a small model start
 * within a microsecond, what a program does between two steps does not put the threads to sleep, and an idle process
 * costs nothing.
 *
 * One atomic word, the ticket, says everything about the running job: bits 63..32 its number, bit 31 "open", bits 30..0
 * how many workers are inside.  A worker may enter while the ticket is open; the caller closes it when no task is left
 * and waits only for those inside.  So a worker that the system has put to sleep never delays a job it did not join. */
#define _GNU_SOURCE
#include "threads.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "clock.h"
#include "system.h"

enum { MAX_THREADS = 1024, CACHE_LINE = 64, SPINS_A_LOOK = 64, SPINS_BEFORE_YIELD = 20000 };
static const double SPIN_SECONDS = 2e-3;
#define OPEN ((uint64_t)1 << 31)
#define INSIDE (OPEN - 1)

static struct {
    pthread_mutex_t user; /* whoever holds it may change what follows and start a job */
    atomic_int wanted;    /* threads asked for; 0: not yet known */
    int workers;          /* threads running beside the caller */
    pthread_t thread[MAX_THREADS];
    void *scratch[MAX_THREADS];

    void (*body)(void *, int);
    void *context;
    int tasks, runs;
    struct {
        _Alignas(CACHE_LINE) atomic_int next; /* first task of the run that is not yet taken */
    } run[MAX_THREADS];
    _Atomic uint64_t ticket;

    pthread_mutex_t park;
    pthread_cond_t wake;
    atomic_int parked;        /* how many sleep */
    char sleeps[MAX_THREADS]; /* and which, under the lock `park` */
    atomic_int stop;
#if defined(__linux__)
    cpu_set_t cpus; /* that the last caller who woke workers may use */
#endif
} pool = {.user = PTHREAD_MUTEX_INITIALIZER, .park = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static _Thread_local char *my_scratch;
static _Thread_local int in_task;
static pthread_key_t scratch_key; /* frees the scratch of a caller's thread when that thread ends */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- scratch ---- */

static void *scratch_new(void) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *p = mmap(NULL, SCRATCH_SLOTS * SCRATCH_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
    madvise(p, SCRATCH_SLOTS * SCRATCH_BYTES, MADV_HUGEPAGE);
#endif
    return p;
}

static void scratch_free(void *p) {
    if (p) munmap(p, SCRATCH_SLOTS * SCRATCH_BYTES);
}

void *scratch(int slot) { return my_scratch + (size_t)slot * SCRATCH_BYTES; }

/* ---- workers ---- */

/* Where run i of the tasks begins: as many runs as threads. */
static int begin_of(int i) { return (int)((int64_t)pool.tasks * i / pool.runs); }

/* A thread takes the tasks of its own run, then helps with the others'.  Neighbouring tasks read neighbouring memory:
 * that they meet in one thread makes one stream of them, however many they are. */
static void run_tasks(int me) {
    in_task = 1;
    for (int i = 0; i < pool.runs; i++) {
        int run = (me + i) % pool.runs, end = begin_of(run + 1), task;
        while ((task = atomic_fetch_add_explicit(&pool.run[run].next, 1, memory_order_relaxed)) < end)
            pool.body(pool.context, task);
    }
    in_task = 0;
}

/* Linux may wake a worker on the very CPU of the thread that woke it, though others idle; then it waits for a time
 * slice (2.7 ms measured) behind the caller, which has not got the help it wants.  So the caller forbids its own CPU to
 * those it wakes, and they lift the ban as soon as they run.  Both under the lock `park`, and only for those that
 * sleep: the handle of a thread that has ended would mean the caller itself. */
#if defined(__linux__)
static void wake_elsewhere(void) {
    cpu_set_t elsewhere;
    int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof pool.cpus, &pool.cpus)) return;
    elsewhere = pool.cpus;
    CPU_CLR(here, &elsewhere);
    if (!CPU_COUNT(&elsewhere)) return;
    for (int i = 0; i < pool.workers; i++)
        if (pool.sleeps[i]) pthread_setaffinity_np(pool.thread[i], sizeof elsewhere, &elsewhere);
}
static void may_run_everywhere(void) {
    if (CPU_COUNT(&pool.cpus)) pthread_setaffinity_np(pthread_self(), sizeof pool.cpus, &pool.cpus);
}
#else
static void wake_elsewhere(void) {}
static void may_run_everywhere(void) {}
#endif

/* Wait until a job with another number than `seen` is there; 0 when the pool stops. */
static int wait_for_job(int me, uint64_t seen) {
    for (double end = now() + SPIN_SECONDS; now() < end;)
        for (int i = 0; i < SPINS_A_LOOK; i++) {
            if (atomic_load_explicit(&pool.stop, memory_order_acquire)) return 0;
            if (atomic_load_explicit(&pool.ticket, memory_order_acquire) >> 32 != seen) return 1;
            pause_cpu();
        }
    /* parked is raised before the ticket is read again, and the caller reads it after it wrote the ticket: one of the
     * two sees the other, so no job is slept through. */
    pthread_mutex_lock(&pool.park);
    atomic_fetch_add(&pool.parked, 1);
    pool.sleeps[me] = 1;
    while (!atomic_load(&pool.stop) && atomic_load(&pool.ticket) >> 32 == seen)
        pthread_cond_wait(&pool.wake, &pool.park);
    atomic_fetch_sub(&pool.parked, 1);
    pool.sleeps[me] = 0;
    may_run_everywhere();
    pthread_mutex_unlock(&pool.park);
    return !atomic_load(&pool.stop);
}

static void *worker(void *index) {
    const int me = (int)(intptr_t)index;
    my_scratch = pool.scratch[me];
    uint64_t seen = atomic_load(&pool.ticket) >> 32;
    while (wait_for_job(me, seen)) {
        uint64_t t = atomic_load_explicit(&pool.ticket, memory_order_acquire);
        seen = t >> 32;
        while (t & OPEN && t >> 32 == seen) {
            if (!atomic_compare_exchange_weak_explicit(&pool.ticket, &t, t + 1, memory_order_acquire,
                                                       memory_order_acquire))
                continue;
            run_tasks(me + 1);
            atomic_fetch_sub_explicit(&pool.ticket, 1, memory_order_release);
            break;
        }
    }
    return NULL;
}

static void wake_all(void) {
    if (!atomic_load(&pool.parked)) return;
    pthread_mutex_lock(&pool.park);
    wake_elsewhere();
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.park);
}

static void stop_workers(void) {
    atomic_store(&pool.stop, 1);
    wake_all();
    for (int i = 0; i < pool.workers; i++) {
        pthread_join(pool.thread[i], NULL);
        scratch_free(pool.scratch[i]);
    }
    pool.workers = 0;
    atomic_store(&pool.stop, 0);
}

/* Workers must not take the program's signals: Python expects them on its own thread. */
static void start_workers(int n) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; pool.workers < n; pool.workers++) {
        int i = pool.workers;
        if (!(pool.scratch[i] = scratch_new())) break; /* fewer threads: same bits, only slower */
        if (pthread_create(&pool.thread[i], NULL, worker, (void *)(intptr_t)i)) {
            scratch_free(pool.scratch[i]);
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* After fork() only the calling thread lives on: the pool starts again from nothing when it is next needed. */
static void forget_workers(void) {
    pool.workers = 0;
    pthread_mutex_init(&pool.user, NULL);
    pthread_mutex_init(&pool.park, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.parked, 0);
    memset(pool.sleeps, 0, sizeof pool.sleeps);
    atomic_store(&pool.stop, 0);
    atomic_store(&pool.ticket, 0);
    in_task = 0;
}

static void init_once(void) {
    pthread_key_create(&scratch_key, scratch_free);
    pthread_atfork(NULL, NULL, forget_workers);
}

/* ---- the API ---- */

static int default_threads(void) {
    const char *s = getenv("BARELM_THREADS");
    int n = s ? atoi(s) : 0;
    if (n < 1) n = system_cpus();
    return n < MAX_THREADS ? n : MAX_THREADS;
}

int threads_get(void) {
    int n = atomic_load(&pool.wanted);
    if (!n) atomic_store(&pool.wanted, n = default_threads());
    return n;
}

void threads_set(int n) { atomic_store(&pool.wanted, n < 1 ? default_threads() : n < MAX_THREADS ? n : MAX_THREADS); }

int threads_ready(void) {
    pthread_once(&once, init_once);
    if (!my_scratch) {
        if (!(my_scratch = scratch_new())) return -1;
        pthread_setspecific(scratch_key, my_scratch);
    }
    if (pthread_mutex_trylock(&pool.user)) return 0; /* another thread computes: this one will do without the pool */
    int workers = threads_get() - 1;
    if (pool.workers > workers) stop_workers();
    if (pool.workers < workers) start_workers(workers);
    pthread_mutex_unlock(&pool.user);
    return 0;
}

void parallel_for(void (*body)(void *, int), void *context, int tasks) {
    if (tasks <= 1 || in_task || pthread_mutex_trylock(&pool.user)) {
        for (int i = 0; i < tasks; i++) body(context, i);
        return;
    }
    if (!pool.workers) {
        pthread_mutex_unlock(&pool.user);
        for (int i = 0; i < tasks; i++) body(context, i);
        return;
    }
    pool.body = body;
    pool.context = context;
    pool.tasks = tasks;
    pool.runs = pool.workers + 1;
    for (int i = 0; i < pool.runs; i++) atomic_store_explicit(&pool.run[i].next, begin_of(i), memory_order_relaxed);
    uint64_t number = (atomic_load(&pool.ticket) >> 32) + 1;
    atomic_store(&pool.ticket, number << 32 | OPEN);
    wake_all();
    run_tasks(0);
    atomic_fetch_and_explicit(&pool.ticket, ~OPEN, memory_order_acq_rel);
    for (int i = 0; atomic_load_explicit(&pool.ticket, memory_order_acquire) & INSIDE; i++)
        i < SPINS_BEFORE_YIELD ? pause_cpu() : (void)sched_yield();
    pthread_mutex_unlock(&pool.user);
}
