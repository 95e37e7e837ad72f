/* bpe.c -- merging.  All distinct pieces lie one after the other; merging looks only at the places where the pair is.
 *
 * Three facts keep it short:
 *   - a pair can arise only in the step that makes the newer of its two tokens.  So its list of places is complete
 * after that step, and later its count only falls: a pair below min_count is dropped for good, and the heap may hold
 *     outdated counts, which are too high, never too low.
 *   - a step changes counts of pairs with one of the two merged tokens, or the new one, on one side: they are added up
 *     by the token on the other side, in plain arrays, and looked up once each.
 *   - two merges cannot make the same bytes: both parts would have been merged by the first.  */
#include "bpe.h"
#include <stdlib.h>
#include <string.h>

enum { BYTES = 256 };
enum { LEFT, RIGHT };
#define BORDER UINT32_MAX       /* the symbol between two pieces */
#define INSIDE (UINT32_MAX - 1) /* the symbol of a place inside a token, neither its first nor its last */
#define NONE UINT32_MAX

typedef struct {     /* one byte of the pieces */
    uint32_t symbol; /* the first and the last place of a token hold its number */
    uint32_t piece;
} Place;

typedef struct { /* its bytes are those of any place where it stands */
    uint32_t at, size;
} Token;

typedef struct {
    uint32_t left, right;
    int64_t count;
    uint64_t list; /* of `places`, rising; one is out of date where other symbols stand there */
    uint32_t places;
} Pair;

typedef struct {
    int64_t count; /* of the pair when the entry was made: at least what it is now */
    uint32_t pair;
} Entry;

typedef struct { /* the pairs of the new token with one other token, on one side */
    int64_t count;
    uint64_t list;
    uint32_t places;
    int listed;
} Neighbour;

typedef struct {
    uint32_t token, place;
} Meeting;

typedef struct {      /* what a step gathers, on one side of the new token */
    Neighbour *of;    /* by token */
    uint32_t *tokens; /* those it met */
    Meeting *meetings;
    size_t n_tokens, n_meetings, meetings_room;
} Side;

struct Bpe {
    Pieces *pieces; /* until merging begins */
    int64_t min_count;

    uint8_t *bytes; /* (n) */
    Place *place;   /* (n), a border first and last */
    size_t n;
    int64_t *count; /* of each piece */
    size_t n_pieces;

    Token *token;
    size_t tokens, tokens_room;
    Merge *merge; /* (tokens - BYTES) */

    Pair *pair;
    size_t pairs, pairs_room;
    uint32_t *slot; /* hash table of pairs: its number, or NONE */
    size_t slots;
    uint32_t *list; /* the places of all pairs */
    size_t listed, list_room;
    Entry *heap;
    size_t heap_size; /* <= pairs */

    Side side[2]; /* LEFT and RIGHT of the new token */
    BpeStatus status;
};

/* ---- memory ---- */

/* The array with room for so many items; where memory does not suffice *failed is set and it stays as it is. */
static void *resize(void *array, size_t room, size_t item, int *failed) {
    void *p = room > SIZE_MAX / item ? NULL : realloc(array, room * item);
    if (!p) *failed = 1;
    return p ? p : array;
}

static size_t larger(size_t room, size_t wanted) { return wanted > 2 * room ? wanted : 2 * room; }

/* ---- which pair is next ---- */

static int compare_tokens(const Bpe *b, uint32_t t, uint32_t u) {
    const Token *x = &b->token[t], *y = &b->token[u];
    int order = memcmp(b->bytes + x->at, b->bytes + y->at, x->size < y->size ? x->size : y->size);
    return order ? order : (x->size > y->size) - (x->size < y->size);
}

static int comes_before(const Bpe *b, const Entry *e, const Entry *f) {
    if (e->count != f->count) return e->count > f->count;
    const Pair *p = &b->pair[e->pair], *q = &b->pair[f->pair];
    int order = compare_tokens(b, p->left, q->left);
    return (order ? order : compare_tokens(b, p->right, q->right)) > 0;
}

static void sift_up(Bpe *b, size_t i) {
    Entry e = b->heap[i];
    for (; i && comes_before(b, &e, &b->heap[(i - 1) / 2]); i = (i - 1) / 2) b->heap[i] = b->heap[(i - 1) / 2];
    b->heap[i] = e;
}

static void sift_down(Bpe *b) {
    Entry e = b->heap[0];
    size_t i = 0, n = b->heap_size;
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && comes_before(b, &b->heap[child + 1], &b->heap[child])) child++;
        if (!comes_before(b, &b->heap[child], &e)) break;
        b->heap[i] = b->heap[child];
    }
    b->heap[i] = e;
}

/* The best pair leaves the heap; NONE: no pair is left. */
static uint32_t pop(Bpe *b) {
    while (b->heap_size) {
        Entry top = b->heap[0];
        int64_t count = b->pair[top.pair].count;
        if (count == top.count || count < b->min_count) b->heap[0] = b->heap[--b->heap_size];
        else b->heap[0].count = count;
        if (b->heap_size) sift_down(b);
        if (count == top.count) return top.pair;
    }
    return NONE;
}

/* ---- pairs ---- */

static size_t pair_slot(const Bpe *b, uint32_t left, uint32_t right) {
    uint64_t h = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u; /* 2^64 / golden ratio */
    for (size_t i = (h >> 32) & (b->slots - 1);; i = (i + 1) & (b->slots - 1)) {
        uint32_t p = b->slot[i];
        if (p == NONE || (b->pair[p].left == left && b->pair[p].right == right)) return i;
    }
}

static int grow_slots(Bpe *b) {
    size_t slots = b->slots ? 2 * b->slots : 1 << 12;
    uint32_t *slot = malloc(slots * sizeof *slot);
    if (!slot) return -1;
    memset(slot, 0xFF, slots * sizeof *slot);
    free(b->slot);
    b->slot = slot;
    b->slots = slots;
    for (size_t p = 0; p < b->pairs; p++) b->slot[pair_slot(b, b->pair[p].left, b->pair[p].right)] = (uint32_t)p;
    return 0;
}

static int reserve_pair(Bpe *b, uint32_t places) {
    int failed = b->pairs == NONE || (2 * b->pairs >= b->slots && grow_slots(b));
    if (b->pairs == b->pairs_room && !failed) {
        size_t room = larger(b->pairs_room, 1 << 12);
        b->pair = resize(b->pair, room, sizeof *b->pair, &failed);
        b->heap = resize(b->heap, room, sizeof *b->heap, &failed);
        if (!failed) b->pairs_room = room;
    }
    if (b->listed + places > b->list_room && !failed) {
        size_t room = larger(b->list_room, b->listed + places);
        b->list = resize(b->list, room, sizeof *b->list, &failed);
        if (!failed) b->list_room = room;
    }
    return failed;
}

/* A new pair, with room for its places; `n` learns where they go, and whether they are wanted. */
static int add_pair(Bpe *b, uint32_t left, uint32_t right, Neighbour *n) {
    n->listed = n->count >= b->min_count;
    if (!n->listed) return 0;
    if (reserve_pair(b, n->places)) return -1;
    uint32_t new = (uint32_t)b->pairs++;
    n->list = b->listed;
    b->listed += n->places;
    b->slot[pair_slot(b, left, right)] = new;
    b->pair[new] = (Pair){left, right, n->count, n->list, n->places};
    b->heap[b->heap_size] = (Entry){n->count, new};
    sift_up(b, b->heap_size++);
    return 0;
}

/* ---- the beginning ---- */

typedef struct {
    Bpe *b;
    size_t bytes, pieces;
} Sizes;

/* A piece of one byte has no pair. */
static void measure(void *context, const Piece *piece) {
    Sizes *s = context;
    if (piece->size > 1) s->bytes += piece->size + 1, s->pieces++;
}

static void lay_down(void *context, const Piece *piece) {
    Bpe *b = ((Sizes *)context)->b;
    if (piece->size < 2) return;
    memcpy(b->bytes + b->n, piece->bytes, piece->size);
    for (uint32_t i = 0; i < piece->size; i++) b->place[b->n++] = (Place){piece->bytes[i], (uint32_t)b->n_pieces};
    b->place[b->n++].symbol = BORDER;
    b->count[b->n_pieces++] = piece->count;
}

/* The pieces one after the other, behind all bytes once, which are the first tokens. */
static BpeStatus lay_out(Bpe *b) {
    Sizes s = {b, BYTES, 0};
    pieces_visit(b->pieces, measure, &s);
    if (s.bytes >= UINT32_MAX) return BPE_TOO_LARGE;
    b->bytes = malloc(s.bytes);
    b->place = malloc(s.bytes * sizeof *b->place);
    b->count = malloc((s.pieces + 1) * sizeof *b->count);
    if (!b->bytes || !b->place || !b->count) return BPE_NO_MEMORY;
    for (int i = 0; i < BYTES; i++) b->bytes[i] = (uint8_t)i, b->place[i].symbol = BORDER;
    b->n = BYTES;
    pieces_visit(b->pieces, lay_down, &s);
    pieces_free(b->pieces);
    b->pieces = NULL;
    return BPE_OK;
}

static BpeStatus first_pairs(Bpe *b) {
    Neighbour *all = calloc(BYTES * BYTES, sizeof *all);
    if (!all) return BPE_NO_MEMORY;
    const Place *p = b->place;
    for (size_t i = BYTES; i + 1 < b->n; i++)
        if (p[i].symbol != BORDER && p[i + 1].symbol != BORDER) {
            Neighbour *n = &all[p[i].symbol * BYTES + p[i + 1].symbol];
            n->count += b->count[p[i].piece];
            n->places++;
        }
    int failed = 0;
    for (uint32_t pair = 0; pair < BYTES * BYTES && !failed; pair++)
        failed = add_pair(b, pair / BYTES, pair % BYTES, &all[pair]);
    for (size_t i = BYTES; i + 1 < b->n && !failed; i++)
        if (p[i].symbol != BORDER && p[i + 1].symbol != BORDER) {
            Neighbour *n = &all[p[i].symbol * BYTES + p[i + 1].symbol];
            if (n->listed) b->list[n->list++] = (uint32_t)i;
        }
    free(all);
    return failed ? BPE_NO_MEMORY : BPE_OK;
}

/* Room for n tokens more. */
static BpeStatus reserve_tokens(Bpe *b, size_t n) {
    if (b->tokens + n <= b->tokens_room) return BPE_OK;
    size_t room = larger(b->tokens_room, b->tokens + n);
    int failed = 0;
    b->token = resize(b->token, room, sizeof *b->token, &failed);
    b->merge = resize(b->merge, room, sizeof *b->merge, &failed);
    for (int i = 0; i < 2; i++) {
        Side *s = &b->side[i];
        s->of = resize(s->of, room, sizeof *s->of, &failed);
        s->tokens = resize(s->tokens, room, sizeof *s->tokens, &failed);
        if (!failed) memset(s->of + b->tokens_room, 0, (room - b->tokens_room) * sizeof *s->of);
    }
    if (failed) return BPE_NO_MEMORY;
    b->tokens_room = room;
    return BPE_OK;
}

static BpeStatus begin(Bpe *b) {
    BpeStatus s = lay_out(b);
    if (!s) s = reserve_tokens(b, BYTES);
    if (s) return s;
    for (uint32_t i = 0; i < BYTES; i++) b->token[i] = (Token){i, 1};
    b->tokens = BYTES;
    return first_pairs(b);
}

/* ---- one merge ---- */

static void meet(Side *s, uint32_t token, uint32_t place, int64_t count) {
    Neighbour *n = &s->of[token];
    if (!n->places++) s->tokens[s->n_tokens++] = token;
    n->count += count;
    s->meetings[s->n_meetings++] = (Meeting){token, place};
}

/* Merge `pair` wherever it stands, from left to right, and gather whom the new token meets. */
static void replace(Bpe *b, const Pair *pair, uint32_t new) {
    const uint32_t left = pair->left, right = pair->right;
    const uint32_t left_size = b->token[left].size, right_size = b->token[right].size;
    b->token[new] = (Token){b->list[pair->list], left_size + right_size};
    for (uint32_t k = 0; k < pair->places; k++) {
        uint32_t i = b->list[pair->list + k], j = i + left_size, behind = j + right_size;
        Place *p = b->place;
        if (p[i].symbol != left || p[j].symbol != right) continue;
        p[j - 1].symbol = p[j].symbol = INSIDE;
        p[i].symbol = p[behind - 1].symbol = new;
        int64_t count = b->count[p[i].piece];
        uint32_t before = p[i - 1].symbol, after = p[behind].symbol;
        if (before != BORDER) meet(&b->side[LEFT], before, i - b->token[before].size, count);
        if (after != BORDER) meet(&b->side[RIGHT], after, i, count);
    }
}

static void lower(Bpe *b, uint32_t left, uint32_t right, int64_t count) {
    uint32_t p = b->slot[pair_slot(b, left, right)];
    if (p != NONE) b->pair[p].count -= count;
}

/* The pairs that the new token makes take over the counts of those that its parts made.  The right side comes first:
 * where one new token follows another, the first met `left` of the second before that was merged too.  That pair was
 * counted on the right side, and the second, whose neighbour on the left is `new`, takes it back. */
static int add_side(Bpe *b, const Merge *m, uint32_t new, int right) {
    Side *s = &b->side[right];
    for (size_t i = 0; i < s->n_tokens; i++) {
        uint32_t other = s->tokens[i];
        Neighbour *n = &s->of[other];
        lower(b, right ? m->right : other, right ? other : m->left, n->count);
        if (add_pair(b, right ? new : other, right ? other : new, n)) return -1;
    }
    for (size_t i = 0; i < s->n_meetings; i++) {
        Neighbour *n = &s->of[s->meetings[i].token];
        if (n->listed) b->list[n->list++] = s->meetings[i].place;
    }
    return 0;
}

static void forget(Side *s) {
    for (size_t i = 0; i < s->n_tokens; i++) s->of[s->tokens[i]] = (Neighbour){0};
    s->n_tokens = s->n_meetings = 0;
}

static BpeStatus reserve_meetings(Side *s, uint32_t n) {
    int failed = 0;
    if (n <= s->meetings_room) return BPE_OK;
    s->meetings = resize(s->meetings, n, sizeof *s->meetings, &failed);
    if (!failed) s->meetings_room = n;
    return failed ? BPE_NO_MEMORY : BPE_OK;
}

static BpeStatus step(Bpe *b, uint32_t best) {
    Pair pair = b->pair[best]; /* a copy: the array may move */
    uint32_t new = (uint32_t)b->tokens;
    Merge m = {pair.left, pair.right};
    if (reserve_meetings(&b->side[LEFT], pair.places) || reserve_meetings(&b->side[RIGHT], pair.places))
        return BPE_NO_MEMORY;
    replace(b, &pair, new);
    b->merge[b->tokens++ - BYTES] = m;
    if (add_side(b, &m, new, RIGHT) || add_side(b, &m, new, LEFT)) return BPE_NO_MEMORY;
    forget(&b->side[LEFT]);
    forget(&b->side[RIGHT]);
    return BPE_OK;
}

/* ---- the API ---- */

Bpe *bpe_create(Split split, int64_t min_count) {
    Bpe *b = calloc(1, sizeof *b);
    if (!b) return NULL;
    b->min_count = min_count;
    if (!(b->pieces = pieces_create(split))) return free(b), NULL;
    return b;
}

void bpe_free(Bpe *b) {
    if (!b) return;
    pieces_free(b->pieces);
    for (int i = 0; i < 2; i++) free(b->side[i].of), free(b->side[i].tokens), free(b->side[i].meetings);
    free(b->bytes), free(b->place), free(b->count), free(b->token), free(b->merge);
    free(b->pair), free(b->slot), free(b->list), free(b->heap);
    free(b);
}

BpeStatus bpe_add(Bpe *b, const uint8_t *text, size_t size, int (*poll)(void)) {
    return pieces_add(b->pieces, text, size, poll);
}

BpeStatus bpe_merge(Bpe *b, int n, int (*poll)(void)) {
    if (b->pieces && !b->status && !(b->status = pieces_flush(b->pieces, poll))) b->status = begin(b);
    if (!b->status) b->status = reserve_tokens(b, (size_t)n);
    for (uint32_t best; n > 0 && !b->status && (best = pop(b)) != NONE; n--) {
        b->status = step(b, best);
        if (!b->status && poll()) b->status = BPE_INTERRUPTED;
    }
    return b->status;
}

int bpe_has_begun(const Bpe *b) { return !b->pieces; }

size_t bpe_merges(const Bpe *b, const Merge **first) {
    *first = b->merge;
    return b->tokens > BYTES ? b->tokens - BYTES : 0;
}
