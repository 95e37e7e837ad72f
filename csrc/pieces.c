/* pieces.c -- counting with threads.  Documents are buffered, a byte that no UTF-8 has between them; every few
 * megabytes are a round of two steps: workers take chunks of the text and count into tables of their own, then the
 * tables are added up.  All tables are cut into shards by the hash, so that one task adds one shard and no lock is
 * needed. */
#include "pieces.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include "threads.h"

enum { SHARDS = 16, SHARD_SHIFT = 28, FIRST_SLOTS = 512, CHUNK = 128 << 10, ROUND = 64, BUFFER = ROUND * CHUNK };
enum { BETWEEN_DOCUMENTS = 0xFF, BLOCK = 256 << 10 };

typedef struct {
    Piece *slot;
    size_t slots, used; /* slots is a power of two */
} Table;

typedef struct Block {
    struct Block *next;
    uint8_t bytes[];
} Block;

typedef struct { /* the bytes of pieces, in large blocks */
    Block *blocks;
    uint8_t *free;
    size_t left;
} Store;

typedef struct {
    Table shard[SHARDS];
} Counts;

struct Pieces {
    Split split;
    Counts all; /* its pieces lie in `store` */
    Store store[SHARDS];
    Counts *worker[ROUND]; /* of this round: their pieces lie in the text */
    int workers;
    uint8_t *buffer;
    size_t buffered;
    atomic_int status;
};

/* ---- tables ---- */

static uint64_t load4(const uint8_t *p) {
    uint32_t x;
    return memcpy(&x, p, sizeof x), x;
}

static uint64_t load8(const uint8_t *p) {
    uint64_t x;
    return memcpy(&x, p, sizeof x), x;
}

#define ODD 0x9E3779B97F4A7C15u /* 2^64 / golden ratio */

/* Of pieces of one size: different for different pieces of up to 8 bytes, for longer ones in all likelihood. */
static uint64_t key_of(const uint8_t *p, size_t n) {
    uint64_t h = 0;
    for (; n > 8; n -= 8, p += 8) h = (h ^ load8(p)) * ODD, h ^= h >> 29;
    return n >= 4 ? h ^ load4(p) ^ load4(p + n - 4) << 32
                  : h ^ p[0] ^ (uint64_t)p[n / 2] << 8 ^ (uint64_t)p[n - 1] << 16;
}

static Piece piece_of(const uint8_t *p, size_t size) {
    uint64_t key = key_of(p, size), h = (key ^ size) * ODD;
    h = (h ^ h >> 32) * ODD;
    return (Piece){p, 1, key, (uint32_t)size, (uint32_t)(h >> 32)};
}

static int is_same(const Piece *a, const Piece *b) {
    return a->key == b->key && a->size == b->size && (a->size <= 8 || !memcmp(a->bytes, b->bytes, a->size));
}

/* The slot of a piece: where it is, or the empty one where it belongs. */
static Piece *find(const Table *t, const Piece *piece) {
    for (size_t i = piece->hash & (t->slots - 1);; i = (i + 1) & (t->slots - 1)) {
        Piece *s = &t->slot[i];
        if (!s->count || is_same(s, piece)) return s;
    }
}

static int grow(Table *t) {
    Table old = *t;
    t->slots = old.slots ? 2 * old.slots : FIRST_SLOTS;
    if (!(t->slot = calloc(t->slots, sizeof *t->slot))) return *t = old, -1;
    for (size_t i = 0; i < old.slots; i++) {
        const Piece *s = &old.slot[i];
        if (s->count) *find(t, s) = *s;
    }
    free(old.slot);
    return 0;
}

/* Add to the count of a piece; its slot, or NULL: no memory.  A new piece still points to the caller's bytes. */
static Piece *add(Table *t, const Piece *piece, int *is_new) {
    if (2 * t->used >= t->slots && grow(t)) return NULL;
    Piece *s = find(t, piece);
    *is_new = !s->count;
    if (!*is_new) return s->count += piece->count, s;
    t->used++;
    *s = *piece;
    return s;
}

/* A copy of the bytes that lives as long as the store; NULL: no memory. */
static const uint8_t *keep(Store *store, const uint8_t *bytes, size_t size) {
    if (size > store->left) {
        size_t room = size > BLOCK ? size : BLOCK;
        Block *block = malloc(sizeof *block + room);
        if (!block) return NULL;
        block->next = store->blocks;
        store->blocks = block;
        store->free = block->bytes;
        store->left = room;
    }
    uint8_t *copy = memcpy(store->free, bytes, size);
    store->free += size;
    store->left -= size;
    return copy;
}

/* ---- one round ---- */

typedef struct {
    Pieces *p;
    const uint8_t *text, *end;
    size_t chunks; /* of the whole text */
    size_t stop;   /* the first chunk that is not of this round */
    atomic_size_t next;
} Round;

/* Where chunk i of the text begins; NULL where no place to cut is seen in it: then the one before goes on. */
static const uint8_t *chunk_begin(const Round *r, size_t i) {
    if (i == 0) return r->text;
    if (i == r->chunks) return r->end;
    return split_cut(r->text, r->text + i * CHUNK, i + 1 == r->chunks ? r->end : r->text + (i + 1) * CHUNK);
}

static BpeStatus count_piece(Counts *counts, const uint8_t *p, size_t size) {
    if (size > UINT32_MAX) return BPE_TOO_LARGE;
    const Piece piece = piece_of(p, size);
    int is_new;
    return add(&counts->shard[piece.hash >> SHARD_SHIFT], &piece, &is_new) ? BPE_OK : BPE_NO_MEMORY;
}

static BpeStatus count_chunk(const Round *r, size_t i, Counts *counts) {
    const uint8_t *p = chunk_begin(r, i), *stop = NULL;
    if (!p) return BPE_OK;
    while (!stop) stop = chunk_begin(r, ++i);
    while (p < stop) {
        const uint8_t *next = split_next(r->p->split, p, r->end);
        BpeStatus s = next > p ? count_piece(counts, p, (size_t)(next - p)) : BPE_OK;
        if (s) return s;
        p = next > p ? next : p + 1;
    }
    return BPE_OK;
}

static void count_chunks(void *context, int worker) {
    Round *r = context;
    for (size_t i; !r->p->status && (i = atomic_fetch_add(&r->next, 1)) < r->stop;) {
        BpeStatus s = count_chunk(r, i, r->p->worker[worker]);
        if (s) r->p->status = s;
    }
}

static void add_up_shard(void *context, int shard) {
    Pieces *p = ((Round *)context)->p;
    for (int w = 0; w < p->workers; w++) {
        Table *t = &p->worker[w]->shard[shard];
        for (size_t i = 0; i < t->slots; i++) {
            if (!t->slot[i].count) continue;
            int is_new;
            Piece *s = add(&p->all.shard[shard], &t->slot[i], &is_new);
            if (!s || (is_new && !(s->bytes = keep(&p->store[shard], s->bytes, s->size)))) {
                p->status = BPE_NO_MEMORY;
                return;
            }
        }
        if (t->slots) memset(t->slot, 0, t->slots * sizeof *t->slot);
        t->used = 0;
    }
}

static int prepare_workers(Pieces *p) {
    int n = threads_get() < ROUND ? threads_get() : ROUND;
    for (; p->workers < n; p->workers++)
        if (!(p->worker[p->workers] = calloc(1, sizeof(Counts)))) return -1;
    return n;
}

static BpeStatus count(Pieces *p, const uint8_t *text, size_t size, int (*poll)(void)) {
    int workers = prepare_workers(p);
    if (workers < 0) return p->status = BPE_NO_MEMORY;
    Round r = {.p = p, .text = text, .end = text + size, .chunks = (size + CHUNK - 1) / CHUNK};
    while (r.stop < r.chunks) {
        r.next = r.stop;
        r.stop = r.chunks - r.stop < ROUND ? r.chunks : r.stop + ROUND;
        parallel_for(count_chunks, &r, workers);
        if (!p->status) parallel_for(add_up_shard, &r, SHARDS);
        if (p->status) break;
        if (poll()) return p->status = BPE_INTERRUPTED;
    }
    return p->status;
}

/* ---- the API ---- */

Pieces *pieces_create(Split split) {
    Pieces *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->split = split;
    if (!(p->buffer = malloc(BUFFER))) return free(p), NULL;
    return p;
}

static void counts_free(Counts *counts) {
    for (int s = 0; s < SHARDS; s++) free(counts->shard[s].slot);
}

void pieces_free(Pieces *p) {
    if (!p) return;
    counts_free(&p->all);
    for (int s = 0; s < SHARDS; s++)
        for (Block *b = p->store[s].blocks, *next; b; b = next) next = b->next, free(b);
    for (int w = 0; w < p->workers; w++) counts_free(p->worker[w]), free(p->worker[w]);
    free(p->buffer);
    free(p);
}

BpeStatus pieces_flush(Pieces *p, int (*poll)(void)) {
    size_t size = p->buffered;
    p->buffered = 0;
    if (p->status || !size) return p->status;
    return count(p, p->buffer, size, poll);
}

BpeStatus pieces_add(Pieces *p, const uint8_t *text, size_t size, int (*poll)(void)) {
    if (p->status || !size) return p->status;
    if (size >= BUFFER) return count(p, text, size, poll);
    if (p->buffered + size + 1 > BUFFER && pieces_flush(p, poll)) return p->status;
    memcpy(p->buffer + p->buffered, text, size);
    p->buffered += size;
    p->buffer[p->buffered++] = BETWEEN_DOCUMENTS;
    return BPE_OK;
}

void pieces_visit(const Pieces *p, void (*visit)(void *, const Piece *), void *context) {
    for (int s = 0; s < SHARDS; s++)
        for (size_t i = 0; i < p->all.shard[s].slots; i++)
            if (p->all.shard[s].slot[i].count) visit(context, &p->all.shard[s].slot[i]);
}
