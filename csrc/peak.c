/* peak.c -- see peak.h. */
#include "peak.h"
#include <stdio.h>
#include <string.h>
#include "clock.h"
#include "memory.h"
#include "threads.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum { MAX_TASKS = 1024 };

typedef struct {
    const Ops *ops;
    int prec;
    double seconds, rate[MAX_TASKS];
} Flops;

static void flops_task(void *context, int task) {
    Flops *f = context;
    f->rate[task] = f->ops->peak_flops(f->prec, f->seconds);
}

double peak_flops(const Ops *ops, int prec, double seconds) {
    static _Thread_local Flops f;
    f = (Flops){.ops = ops, .prec = prec, .seconds = seconds};
    int threads = threads_get() < MAX_TASKS ? threads_get() : MAX_TASKS;
    parallel_for(flops_task, &f, threads);
    double sum = 0;
    for (int i = 0; i < threads; i++) sum += f.rate[i];
    return sum;
}

typedef struct {
    char *dst;
    const char *src;
    size_t bytes;
    int tasks;
} Copy;

/* Non-temporal stores: an ordinary store would first read the line it is about to overwrite. */
static void copy_task(void *context, int task) {
    const Copy *c = context;
    size_t lines = c->bytes / 64, begin = lines * (size_t)task / (size_t)c->tasks * 64,
           end = lines * ((size_t)task + 1) / (size_t)c->tasks * 64;
#if defined(__SSE2__)
    for (size_t i = begin; i < end; i += 64)
        for (size_t j = i; j < i + 64; j += 16)
            _mm_stream_si128((__m128i *)(c->dst + j), _mm_load_si128((const __m128i *)(c->src + j)));
    _mm_sfence();
#else
    memory_copy(c->dst + begin, c->src + begin, end - begin);
#endif
}

void copy_past_caches(void *dst, const void *src, size_t bytes) {
    Copy c = {.dst = dst, .src = src, .bytes = bytes, .tasks = threads_get()};
    parallel_for(copy_task, &c, c.tasks);
}

/* The last cache of the first CPU, as the kernel knows it: in virtual machines sysconf tells the whole host's. */
static size_t last_cache(void) {
    size_t kb = 0, found;
    char path[80];
    for (int i = 0; i < 8; i++) {
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        FILE *f = fopen(path, "r");
        if (f && fscanf(f, "%zuK", &found) == 1 && found > kb) kb = found;
        if (f) fclose(f);
    }
    return kb << 10;
}

static size_t bytes_beyond_cache(void) {
    size_t least = (size_t)64 << 20, bytes = 4 * last_cache();
    return bytes > least ? bytes : least;
}

/* An array to be read, or NULL.  Not of zeros: some machines carry these faster than what a model has (on a Zen 4 host
 * copies of zeros are 5 % faster). */
static void *filled(size_t bytes) {
    void *p = memory_alloc(bytes);
    if (p) memset(p, 0x5a, bytes);
    return p;
}

typedef struct {
    const uint64_t *src;
    size_t words;
    int tasks;
    uint64_t sums[MAX_TASKS];
} Read;

/* Eight sums, so that no addition waits for another. */
static void read_task(void *context, int task) {
    Read *r = context;
    size_t begin = r->words / (size_t)r->tasks * (size_t)task, end = r->words / (size_t)r->tasks * ((size_t)task + 1);
    uint64_t sum[8] = {0};
    for (size_t i = begin; i + 8 <= end; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += r->src[i + (size_t)j];
    for (int j = 1; j < 8; j++) sum[0] += sum[j];
    r->sums[task] = sum[0];
}

double peak_read(double seconds) {
    static _Thread_local Read r;
    size_t bytes = bytes_beyond_cache();
    r = (Read){.src = filled(bytes), .words = bytes / 8};
    r.tasks = threads_get() < MAX_TASKS ? threads_get() : MAX_TASKS;
    if (!r.src) return 0;
    double start = now(), read = 0, took;
    do {
        parallel_for(read_task, &r, r.tasks);
        read += (double)bytes;
    } while ((took = now() - start) < seconds);
    memory_free((void *)r.src, bytes);
    return read / took;
}

double peak_copy(double seconds) {
    const size_t bytes = bytes_beyond_cache();
    char *dst = memory_alloc(bytes), *src = filled(bytes);
    double best = 0, start = now(); /* every page is there before the clock runs: memory_alloc touches them */
    if (dst && src) {
        do {
            double t = now();
            copy_past_caches(dst, src, bytes);
            double rate = 2.0 * (double)bytes / (now() - t);
            if (rate > best) best = rate;
        } while (now() - start < seconds);
    }
    memory_free(dst, bytes), memory_free(src, bytes);
    return best;
}
