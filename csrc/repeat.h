/* repeat.h -- work that a step does again and again: the same operators on the same arrays, which a backend may keep as
 * one recording (a CUDA graph) instead of being told each call. */
#pragma once
#include "barelm.h"

enum { REPEATED = 8 };

/* All that decides which calls the work makes, and with which arguments, as long as its arrays stay where they are. */
typedef struct {
    int work, B, T, has_starts, live;
    float invtemp;
} Repeat;

typedef struct {
    const Ops *ops;
    struct {
        Repeat key;
        int64_t used; /* when last, 0: never */
        int done;     /* without a recording */
        void *recording;
    } kept[REPEATED];
    int64_t now;
} Repeats;

/* Do the work, or again what was recorded of it: then it is OK, and `work` is not called.  It may do nothing but call
 * operators of the table.  The first time nothing is recorded: operators may still have to get their working memory. */
Status repeat(Repeats *r, const Repeat *key, Status (*work)(void *), void *context);
/* When an array that the work uses is freed. */
void repeats_forget(Repeats *r);
