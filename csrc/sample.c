/* sample.c -- one token a row, drawn from its logits, without a sort: what top_k, top_p and min_p keep is each time all
 * that stands before one border in the order of falling logits.  The border is bracketed by halving an interval of
 * logits, each time with a pass over the row in vectors; the few tokens of the bracket then go into buckets by their
 * bits.  A row stays in the cache, so that a pass of 50,000 logits takes a few microseconds. */
#include <float.h>
#include "simd.h"
#include "threads.h"

enum {
    CHUNK = 4 * W,    /* logits that are looked at together */
    BLOCK = 1024,     /* probabilities of one sum, of which one block is then searched */
    HALVINGS = 8,     /* of the interval a border lies in; 88 temperatures then are a third of one */
    BUCKETS = 1 << 11 /* three rounds settle any 32 bits */
};

typedef struct {
    int32_t *tokens;
    float *logprobs;
    const float *logits, *options;
    const double *u;
    int N, V, Vp, rows;
} Job;

/* The tokens that may still come, in order of id.  Where tokens are dropped the others move up in the `kept` arrays. */
typedef struct {
    const float *x, *e;     /* logits; exp((x - max) / temperature) */
    const int32_t *id;      /* NULL: 0, 1, 2 ... */
    float *x_kept, *e_kept; /* e and e_kept are the same from the start */
    int32_t *id_kept, *at;  /* at: places in the list */
    double *sums;           /* of e, for each block */
    int n;
    float max, temperature;
} List;

/* ---- the greatest ---------------------------------------------------------------------------------------------- */

/* The greatest of a row; NaN where a value is NaN or +inf.  Such a value stays in its lane of `bad`. */
static float greatest(const float *x, int V) {
    const vf lowest = vset(-INFINITY), infinity = vset(INFINITY);
    vf a = lowest, b = lowest, bad = vset(0.0f);
    int v = 0;
    for (; v + 2 * W <= V; v += 2 * W) {
        vf y = vload_all(x + v), z = vload_all(x + v + W);
        a = vmax(y, a), b = vmax(z, b);
        bad = vpick_lt(z, infinity, vpick_lt(y, infinity, bad, y), z);
    }
    for (; v < V; v += W) {
        int k = min_int(W, V - v);
        vf y = vfirst(vload(x + v, k), lowest, k);
        a = vmax(y, a);
        bad = vpick_lt(y, infinity, bad, y);
    }
    return vsum(bad) == 0.0f ? vhmax(vmax(a, b)) : NAN;
}

static float chunk_max(const float *x, int n) {
    vf m = vset(-INFINITY);
    for (int i = 0; i < n; i += W) {
        int k = min_int(W, n - i);
        m = vmax(m, vfirst(vload(x + i, k), vset(-INFINITY), k));
    }
    return vhmax(m);
}

static int first_of(const float *x, float max, int V) {
    int v = 0;
    while (chunk_max(x + v, min_int(CHUNK, V - v)) < max) v += CHUNK;
    while (x[v] < max) v++;
    return v;
}

/* ---- sums ------------------------------------------------------------------------------------------------------ */

static double sum_of(const float *e, int n) {
    vd low = vdset(0.0), high = vdset(0.0);
    for (int i = 0; i < n; i += W) {
        vf y = vload(e + i, min_int(W, n - i));
        low = low + vdlow(y), high = high + vdhigh(y);
    }
    return vdsum(low + high);
}

/* The sums of the blocks, and their sum in order. */
static double block_sums(const List *l) {
    double total = 0.0;
    for (int i = 0; i < l->n; i += BLOCK) total += l->sums[i / BLOCK] = sum_of(l->e + i, min_int(BLOCK, l->n - i));
    return total;
}

/* The sum of e where x >= least; `counted`: how many they are. */
INLINE double weight_from(const List *l, float least, const int counted) {
    const vf border = vset(least), zero = vset(0.0f);
    vd low = vdset(0.0), high = vdset(0.0);
    vf count = zero;
    for (int i = 0; i < l->n; i += W) {
        int k = min_int(W, l->n - i);
        vf x = vload(l->x + i, k);
        if (counted) count = count + vpick_lt(x, border, zero, vfirst(vset(1.0f), zero, k));
        else {
            vf y = vpick_lt(x, border, zero, vload(l->e + i, k));
            low = low + vdlow(y), high = high + vdhigh(y);
        }
    }
    return counted ? vdsum(vdlow(count) + vdhigh(count)) : vdsum(low + high);
}

/* ---- borders --------------------------------------------------------------------------------------------------- */

/* Bits in the order of the floats; both zeros are one. */
INLINE uint32_t key_of(float x) {
    uint32_t u;
    x += 0.0f;
    memcpy(&u, &x, sizeof u);
    return u >> 31 ? ~u : u | 0x80000000u;
}

static float of_key(uint32_t key) {
    uint32_t u = key >> 31 ? key & 0x7fffffffu : ~key;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* at = the places in first .. end-1 where low <= x <= high; returns how many. */
static int places_between(int32_t *at, const float *x, float low, float high, int first, int end) {
    int n = 0;
    for (; first < end; first += CHUNK) {
        const int stop = first + min_int(CHUNK, end - first);
        if (chunk_max(x + first, stop - first) < low) continue;
        for (int i = first; i < stop; i++) { /* no branch: which it are is not to be foreseen */
            at[n] = i;
            n += (x[i] >= low) & (x[i] <= high);
        }
    }
    return n;
}

/* Keep the places in l->at. */
static void keep_places(List *l, int n) {
    for (int i = 0; i < n; i++) {
        const int at = l->at[i]; /* at or behind i: nothing is lost that is still to be read */
        l->x_kept[i] = l->x[at], l->e_kept[i] = l->e[at], l->id_kept[i] = l->id ? l->id[at] : at;
    }
    l->x = l->x_kept, l->id = l->id_kept, l->n = n;
}

/* Find the token at which the weight, from the greatest logit on, reaches target: its logit and its place.  It is one
 * of the n places in l->at, their keys lie in first .. last, and `above` is the weight of all beyond. */
INLINE int find_border(const List *l, float *border, int n, uint32_t first, uint32_t last, double above, double target,
                       const int counted) {
    double weight[BUCKETS];
    while (first < last) {
        int shift = 0;
        while ((last - first) >> shift >= BUCKETS) shift++;
        uint32_t b = (last - first) >> shift;
        memset(weight, 0, (b + 1) * sizeof *weight);
        for (int i = 0; i < n; i++) {
            uint32_t key = key_of(l->x[l->at[i]]);
            if (key >= first && key <= last) weight[(key - first) >> shift] += counted ? 1.0 : (double)l->e[l->at[i]];
        }
        for (; b > 0 && above + weight[b] < target; b--) above += weight[b];
        first += b << shift;
        if ((last - first) >> shift) last = first + ((1u << shift) - 1);
    }
    int place = -1; /* of equals the first ones */
    for (int i = 0; i < n && above < target; i++)
        if (key_of(l->x[l->at[i]]) == first) place = l->at[i], above += counted ? 1.0 : (double)l->e[place];
    *border = of_key(first);
    return place;
}

/* Keep the fewest tokens, from the greatest logit on, whose weight reaches target; all where those from `bottom` on do
 * not reach it. */
INLINE void keep_weight(List *l, float bottom, double target, const int counted) {
    if (weight_from(l, bottom, counted) < target) return;
    float low = bottom, high = l->max;
    double above = 0.0;
    for (int i = 0; i < HALVINGS; i++) {
        float middle = 0.5f * low + 0.5f * high;
        double weight = weight_from(l, middle, counted);
        if (weight >= target) low = middle;
        else high = nextafterf(middle, -INFINITY), above = weight;
    }
    int n = places_between(l->at, l->x, low, high, 0, l->n);
    int end = 1 + find_border(l, &low, n, key_of(low), key_of(high), above, target, counted);
    n = places_between(l->at, l->x, low, INFINITY, 0, end);
    n += places_between(l->at + n, l->x, nextafterf(low, INFINITY), INFINITY, end, l->n);
    keep_places(l, n);
}

/* The logit that lies y temperatures below the greatest; the lowest float where it is past that. */
static float logit_at(const List *l, double y) { return (float)fmax(l->max + y * l->temperature, -FLT_MAX); }

static void keep_top_k(List *l, float k) {
    if (k > 0.0f && k < (float)l->n) keep_weight(l, logit_at(l, -88.0), k, 1); /* below that e is 0 */
}

static void keep_top_p(List *l, double p) {
    if (p >= 1.0) return;
    double mass = block_sums(l);
    /* the greatest e is 1: all that are below (1 - p) / n cannot be missed; 1 more for what is rounded */
    keep_weight(l, logit_at(l, log((1.0 - p) / l->n) - 1.0), p * mass, 0);
}

static void keep_min_p(List *l, double p) {
    if (p <= 0.0) return;
    const double border = fmax(l->max + log(p) * l->temperature, -FLT_MAX);
    float least = (float)border;
    if ((double)least < border) least = nextafterf(least, INFINITY);
    keep_places(l, places_between(l->at, l->x, least, INFINITY, 0, l->n));
}

/* ---- a row ----------------------------------------------------------------------------------------------------- */

static void exponentials(List *l) {
    const vf invtemp = vset(fminf(1.0f / l->temperature, FLT_MAX)); /* of a tiny one: 0 * infinity would be NaN */
    const vf max = vset(l->max);
    for (int i = 0; i < l->n; i += W) {
        int k = min_int(W, l->n - i);
        vstore(l->e_kept + i, vexp((vload(l->x + i, k) - max) * invtemp), k);
    }
    l->e = l->e_kept;
}

/* The first place at which the running sum of e is greater than goal.  Where rounding lets none be, in the block or in
 * the row: the last that can come. */
static int search(const List *l, double goal) {
    int block = 0, last = (l->n - 1) / BLOCK, found = 0;
    double running = 0.0;
    while (l->sums[last] == 0.0) last--;
    for (; block < last && running + l->sums[block] <= goal; block++) running += l->sums[block];
    const int end = min_int(l->n, (block + 1) * BLOCK);
    for (int i = block * BLOCK; i < end && running <= goal; i++) {
        running += (double)l->e[i];
        if (l->e[i] > 0.0f) found = i;
    }
    return found;
}

static void sample_row(const Job *job, int n) {
    const float *x = job->logits + (int64_t)n * job->Vp, *option = job->options + (int64_t)n * SAMPLE_COUNT;
    const int V = job->V;
    const float max = greatest(x, V), temperature = option[SAMPLE_TEMPERATURE];
    job->tokens[n] = -1, job->logprobs[n] = NAN;
    if (!isfinite(max)) return;
    if (temperature == 0.0f) {
        job->tokens[n] = first_of(x, max, V), job->logprobs[n] = 0.0f;
        return;
    }
    List l = {.x = x, .n = V, .max = max, .temperature = temperature, .sums = scratch(SCRATCH_TASK)};
    l.e_kept = (float *)(l.sums + (V / BLOCK + 1));
    l.x_kept = l.e_kept + V;
    l.id_kept = (int32_t *)(l.x_kept + V);
    l.at = l.id_kept + V;
    exponentials(&l);
    keep_top_k(&l, option[SAMPLE_TOP_K]);
    keep_top_p(&l, option[SAMPLE_TOP_P]);
    keep_min_p(&l, option[SAMPLE_MIN_P]);
    const double total = block_sums(&l);
    const int i = search(&l, job->u[n] * total);
    job->tokens[n] = l.id ? l.id[i] : i;
    job->logprobs[n] = (float)(((double)l.x[i] - max) / temperature - log(total));
}

static void sample_rows(void *context, int task) {
    const Job *job = context;
    const int end = min_int(job->N, (task + 1) * job->rows);
    for (int n = task * job->rows; n < end; n++) sample_row(job, n);
}

void CAT(sample, ISA)(int32_t *tokens, float *logprobs, const float *logits, const float *options, const double *u,
                      int N, int V, int Vp) {
    Job job = {.tokens = tokens,
               .logprobs = logprobs,
               .logits = logits,
               .options = options,
               .u = u,
               .N = N,
               .V = V,
               .Vp = Vp,
               .rows = rows_per_task(Vp)};
    parallel_for(sample_rows, &job, tasks_for(N, job.rows));
}
