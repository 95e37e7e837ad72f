/* memory.c -- large blocks straight from the system, on huge pages where it grants them: fewer TLB misses.  A block is
 * touched at once, by all threads: no step pays for page faults, and what the system says is free is free. */
#define _GNU_SOURCE
#include "memory.h"
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include "threads.h"

static const size_t HUGE = (size_t)2 << 20;

static size_t whole_pages(size_t bytes) {
    size_t page = bytes >= HUGE ? HUGE : 4096;
    return (bytes + page - 1) / page * page;
}

void *memory_alloc(size_t bytes) {
    if (!bytes) bytes = 1;
    size_t size = whole_pages(bytes), slack = bytes >= HUGE ? HUGE : 0;
    if (size < bytes) return NULL;
    char *p = mmap(NULL, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (!slack) return p;
    char *start = (char *)(((uintptr_t)p + HUGE - 1) / HUGE * HUGE); /* align, and give back what is over */
    if (start > p) munmap(p, (size_t)(start - p));
    if (start + size < p + size + slack) munmap(start + size, (size_t)(p + slack - start));
#ifdef MADV_HUGEPAGE
    madvise(start, size, MADV_HUGEPAGE);
#endif
    memory_zero(start, size);
    return start;
}

void memory_free(void *p, size_t bytes) {
    if (p) munmap(p, whole_pages(bytes ? bytes : 1));
}

typedef struct {
    char *dst;
    const char *src; /* NULL: zero */
    size_t bytes;
} Move;

enum { PIECE = 1 << 20 };

static void move_piece(void *context, int task) {
    const Move *m = context;
    size_t at = (size_t)task * PIECE, n = m->bytes - at < PIECE ? m->bytes - at : PIECE;
    if (m->src) memcpy(m->dst + at, m->src + at, n);
    else memset(m->dst + at, 0, n);
}

static void move(void *dst, const void *src, size_t bytes) {
    Move m = {dst, src, bytes};
    parallel_for(move_piece, &m, (int)((bytes + PIECE - 1) / PIECE));
}

void memory_copy(void *dst, const void *src, size_t bytes) {
    if (bytes) move(dst, src, bytes);
}

void memory_zero(void *p, size_t bytes) { move(p, NULL, bytes); }
