/* cache.c -- see cache.h. */
#include "cache.h"
#include <stdlib.h>

/* Attention rounds its operands to bf16 wherever weights are less than fp32, so nothing is lost in the cache. */
static int cache_precision(int prec) { return prec == PREC_FP32 ? PREC_FP32 : PREC_BF16; }

static int64_t bytes_of_page(const Config *c, const Ops *ops, int prec) {
    return aligned(ops->page_bytes(cache_precision(prec), c->n_kv_head, c->head_size));
}

int64_t cache_bytes(const Config *c, const Ops *ops, int prec, int pages) {
    return (int64_t)c->n_layer * pages * bytes_of_page(c, ops, prec);
}

Status cache_create(Cache *cache, const Config *c, const Ops *ops, int prec, int pages, char *error) {
    *cache = (Cache){.ops = ops,
                     .error = error,
                     .n_layer = c->n_layer,
                     .prec = cache_precision(prec),
                     .page_bytes = bytes_of_page(c, ops, prec),
                     .pages = pages,
                     .n_free = pages};
    cache->owners = calloc((size_t)pages, sizeof *cache->owners);
    cache->free_pages = malloc((size_t)pages * sizeof *cache->free_pages);
    if (!cache->owners || !cache->free_pages) return failed(error, NO_MEMORY, "table of pages: no memory");
    for (int i = 0; i < pages; i++) cache->free_pages[i] = pages - 1 - i; /* the first page on top */
    return allocate(ops, error, (void **)&cache->pool, cache_bytes(c, ops, prec, pages), "KV cache");
}

void cache_free(Cache *cache) {
    if (cache->pool) cache->ops->free(cache->pool, (size_t)(cache->n_layer * cache->page_bytes * cache->pages));
    for (int i = 0; i < cache->n_rows; i++) free(cache->rows[i].pages);
    free(cache->rows);
    free(cache->owners);
    free(cache->free_pages);
}

char *cache_layer(const Cache *cache, int l) { return cache->pool + l * cache->page_bytes * cache->pages; }

/* ---- rows and pages ---------------------------------------------------------------------------------------------- */

static int no_memory(Cache *cache) {
    failed(cache->error, NO_MEMORY, "table of rows: no memory");
    return -1;
}

int cache_add(Cache *cache) {
    int i = 0;
    while (i < cache->n_rows && cache->rows[i].used) i++;
    if (i == cache->n_rows) {
        Row *more = realloc(cache->rows, ((size_t)cache->n_rows + 1) * sizeof *more);
        if (!more) return no_memory(cache);
        cache->rows = more;
        cache->n_rows++;
    }
    cache->rows[i] = (Row){.used = 1};
    return i;
}

static int reserve(Row *r, int n_pages) {
    if (n_pages <= r->room) return 1;
    int32_t *more = realloc(r->pages, (size_t)n_pages * sizeof *more);
    if (!more) return 0;
    r->pages = more, r->room = n_pages;
    return 1;
}

int pages_for(int tokens) { return (tokens + KEY_BLOCK - 1) / KEY_BLOCK; }

int cache_fork(Cache *cache, int row) {
    int fork = cache_add(cache);
    if (fork < 0) return -1;
    Row *from = &cache->rows[row], *to = &cache->rows[fork];
    int n = pages_for(from->length); /* not what a step that was cut off has left behind them */
    if (!reserve(to, n)) {
        to->used = 0;
        return no_memory(cache);
    }
    for (int i = 0; i < n; i++) {
        to->pages[i] = from->pages[i];
        cache->owners[to->pages[i]]++;
    }
    to->n_pages = n, to->length = from->length, to->version = from->version;
    return fork;
}

static void leave_page(Cache *cache, int page) {
    if (--cache->owners[page] == 0) cache->free_pages[cache->n_free++] = page;
}

void cache_drop(Cache *cache, int row) {
    Row *r = &cache->rows[row];
    for (int i = 0; i < r->n_pages; i++) leave_page(cache, r->pages[i]);
    free(r->pages);
    *r = (Row){0};
}

/* The page in which the row's next token belongs, where the row has begun it; -1. */
static int tail_of(const Row *r) { return r->length % KEY_BLOCK ? r->pages[r->length / KEY_BLOCK] : -1; }

/* Whether row rows[i] must copy its tail before it writes.  Of rows that share a page the last one to write keeps it.
 */
static int copies_tail(const Cache *cache, const int *rows, int i) {
    int tail = tail_of(&cache->rows[rows[i]]);
    if (tail < 0 || cache->owners[tail] == 1) return 0;
    int owners = cache->owners[tail];
    for (int j = 0; j < i; j++) owners -= tail_of(&cache->rows[rows[j]]) == tail;
    return owners > 1;
}

int cache_needs(const Cache *cache, const int *rows, const int *counts, int R) {
    int needed = 0;
    for (int i = 0; i < R; i++) {
        const Row *r = &cache->rows[rows[i]];
        int more = pages_for(r->length + counts[i]) - r->n_pages;
        needed += (more > 0 ? more : 0) + copies_tail(cache, rows, i);
    }
    return needed;
}

static void copy_tail(Cache *cache, Row *r) {
    int32_t *tail = &r->pages[r->length / KEY_BLOCK], page = cache->free_pages[--cache->n_free];
    for (int l = 0; l < cache->n_layer; l++) {
        char *layer = cache_layer(cache, l);
        cache->ops->copy(layer + page * cache->page_bytes, layer + *tail * cache->page_bytes,
                         (size_t)cache->page_bytes);
    }
    leave_page(cache, *tail);
    cache->owners[page] = 1;
    *tail = page;
}

Status cache_take(Cache *cache, const int *rows, const int *counts, int R) {
    int needed = cache_needs(cache, rows, counts, R);
    if (needed > cache->n_free)
        return failed(cache->error, CACHE_FULL, "the cache is full: %d more pages of %d tokens needed, %d of %d free",
                      needed, KEY_BLOCK, cache->n_free, cache->pages);
    for (int i = 0; i < R; i++) {
        Row *r = &cache->rows[rows[i]];
        if (!reserve(r, pages_for(r->length + counts[i])))
            return failed(cache->error, NO_MEMORY, "a row's list of pages: no memory");
    }
    for (int i = 0; i < R; i++) {
        Row *r = &cache->rows[rows[i]];
        int tail = tail_of(r);
        if (tail >= 0 && cache->owners[tail] > 1) copy_tail(cache, r);
        while (r->n_pages < pages_for(r->length + counts[i])) {
            int page = cache->free_pages[--cache->n_free];
            cache->owners[page] = 1;
            r->pages[r->n_pages++] = page;
        }
    }
    return OK;
}
