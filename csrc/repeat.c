/* repeat.c -- which work has been recorded. */
#include "repeat.h"

static int same(const Repeat *a, const Repeat *b) {
    return a->work == b->work && a->B == b->B && a->T == b->T && a->has_starts == b->has_starts && a->live == b->live &&
           a->invtemp == b->invtemp;
}

static void drop(Repeats *r, int i) {
    if (r->kept[i].recording) r->ops->forget(r->kept[i].recording);
    r->kept[i].recording = NULL;
}

/* The place of this work; where all are taken, that of what was not done for the longest time. */
static int place_of(Repeats *r, const Repeat *key) {
    int oldest = 0;
    for (int i = 0; i < REPEATED; i++) {
        if (r->kept[i].used && same(&r->kept[i].key, key)) return i;
        if (r->kept[i].used < r->kept[oldest].used) oldest = i;
    }
    drop(r, oldest);
    r->kept[oldest].key = *key, r->kept[oldest].done = 0;
    return oldest;
}

Status repeat(Repeats *r, const Repeat *key, Status (*work)(void *), void *context) {
    if (!r->ops->record) return work(context);
    int i = place_of(r, key);
    r->kept[i].used = ++r->now;
    if (r->kept[i].recording && r->ops->replay(r->kept[i].recording)) return OK;
    if (!r->kept[i].done) {
        r->kept[i].done = 1;
        return work(context);
    }
    drop(r, i);
    r->ops->record();
    Status s = work(context);
    r->kept[i].recording = r->ops->recorded();
    if (r->kept[i].recording) r->ops->replay(r->kept[i].recording);
    return s;
}

void repeats_forget(Repeats *r) {
    for (int i = 0; i < REPEATED; i++) drop(r, i), r->kept[i].used = 0;
}
