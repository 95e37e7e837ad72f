/* cache.h -- the KV cache of a session: pages of keys and values, and the rows of tokens that own and share them. */
#pragma once
#include "status.h"

typedef struct {
    int32_t *pages;
    int n_pages, room, length; /* pages it has, and its list has room for; tokens */
    int used;
    int64_t version; /* of the weights that wrote to it */
} Row;

typedef struct {
    const Ops *ops;
    char *error;
    int n_layer, prec; /* of keys and values */
    char *pool;        /* [layer][page] */
    int64_t page_bytes;
    int pages;
    int32_t *owners, *free_pages; /* rows that share a page; a stack */
    int n_free;
    Row *rows;
    int n_rows;
} Cache;

/* prec: of the session's weights.  cache_free whatever becomes of it. */
Status cache_create(Cache *cache, const Config *c, const Ops *ops, int prec, int pages, char *error);
void cache_free(Cache *cache);
int64_t cache_bytes(const Config *c, const Ops *ops, int prec, int pages);

/* Where the pages of layer l lie. */
char *cache_layer(const Cache *cache, int l);
/* Pages that so many tokens fill. */
int pages_for(int tokens);

/* These are session_add, session_fork, session_drop and session_pages_needed. */
int cache_add(Cache *cache);
int cache_fork(Cache *cache, int row);
void cache_drop(Cache *cache, int row);
int cache_needs(const Cache *cache, const int *rows, const int *counts, int R);
/* Give every row the pages that it will write to.  All or nothing. */
Status cache_take(Cache *cache, const int *rows, const int *counts, int R);
