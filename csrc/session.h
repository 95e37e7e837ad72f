/* session.h -- rows of tokens that grow, with their keys and values kept in pages: decoding.
 *
 * A row is a sequence.  It joins (add), takes tokens (step), is shared (fork) and leaves (drop) at any time, whatever
 * the others do, and its logits have the bits of one forward pass over all of its tokens.  Pages hold 64 positions of
 * every layer; rows share them until one writes.  Arguments are checked by the caller; as in barelm.h a function that
 * fails leaves a sentence in session_error() and has changed nothing. */
#pragma once
#include "barelm.h"

typedef struct Session Session;

/* Room for `pages` pages.  prec: how weights are packed; keys and values are kept in fp32 with PREC_FP32, else in bf16.
 * NULL where memory does not suffice; then `error` (of `size` bytes) says how much is needed. */
Session *session_create(const Config *c, const Ops *ops, int prec, int pages, char *error, int size);
void session_free(Session *s);
const char *session_error(const Session *s);
void session_set_poll(Session *s, int (*poll)(void));

/* Take the weights of a model of the same config, and its adapter: matrices are packed, the rest is read where it lies,
 * so the model must outlive the session.  `version` names them: rows that other weights have written to are stale. */
Status session_load(Session *s, Model *m, int64_t version);

/* Or take them in parts, once, so that they need not exist beside the session: begin, every part, end.  A part is what
 * lies from `offset` on in such a block, within one Tensor; of a matrix whole rows, which come in order. */
Status session_begin(Session *s);
void session_put(Session *s, int64_t offset, const float *values, int64_t floats);
void session_end(Session *s, int64_t version);

/* The new row, empty; -1: no memory. */
int session_add(Session *s);
int session_fork(Session *s, int row);
void session_drop(Session *s, int row);
int session_length(const Session *s, int row);
int session_stale(const Session *s, int row);

int session_pages(const Session *s);
int session_pages_free(const Session *s);
/* Pages that a step which gives row rows[i] counts[i] tokens takes. */
int session_pages_needed(const Session *s, const int *rows, const int *counts, int R);

/* Row rows[i] takes counts[i] >= 1 of the tokens, which follow one another; rows are distinct and stay within the
 * context.  CACHE_FULL where pages do not suffice, STALE where a row was written with other weights; after INTERRUPTED
 * the rows are as long as before. */
Status session_step(Session *s, const int *rows, const int *counts, const int32_t *tokens, int R);

/* Of the last step: how many rows it had, 0 where it has failed or there was none.  The others are NO_FORWARD where R
 * is another number. */
int session_rows(const Session *s);
/* logits (R, V): behind each row's last token. */
Status session_logits(Session *s, float *logits, int R);
/* A token for each row from the first V logits: tokens and `sampled`, options and u as the operator `sample` has them,
 * and logprobs as session_logprobs at temperature 1, 0 where nothing could be drawn.  Logits stay in the backend. */
Status session_draw(Session *s, int32_t *tokens, float *logprobs, float *sampled, const float *options, const double *u,
                    int V, int R);
/* log p(targets[i]) of row i, the bits of model_forward. */
Status session_logprobs(Session *s, float *logprobs, const int32_t *targets, float temperature, int R);

typedef struct {                  /* bytes by purpose */
    int64_t packed, plain, cache; /* plain: the rest of the weights, where they are taken in parts */
} SessionMemory;
SessionMemory session_memory(const Config *c, const Ops *ops, int prec, int pages);
