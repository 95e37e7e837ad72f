/* weights.h -- the weights of a session: matrices packed for its products, the rest as it is, in the block of a model
 * or in one of their own; and the adapter that belongs to them. */
#pragma once
#include "adapter.h"
#include "status.h"

/* An adapter's A's and B's (the B's as one matrix each, see adapter.h), packed, layer after layer. */
typedef struct {
    Adapter of; /* of rank 0: none */
    int prec;
    char *packed;
    float *dense; /* one matrix of B's on its way */
    int64_t at[LINEARS][2], layer, bytes, dense_bytes;
} Added;

typedef struct {
    Config c;
    const Ops *ops;
    char *error;
    int prec; /* of the packed ones */
    Layout layout;
    char *packed; /* the matrices */
    int64_t packed_at[N_PARAMS], packed_layer[N_PARAMS], packed_bytes;
    const float *plain[N_PARAMS]; /* layer 0 of what is read as it is: in another's block, or in `own` */
    int64_t plain_layer[N_PARAMS];
    int embedding_held; /* how the embedding lies there */
    Added added;
    float *own, *part; /* of a session that takes its weights in parts; rows that wait to be packed */
    int64_t own_bytes, part_bytes;
} Weights;

/* Room for the packed ones.  weights_free whatever becomes of it. */
Status weights_create(Weights *w, const Config *c, const Ops *ops, int prec, char *error);
void weights_free(Weights *w);
/* Bytes of the packed ones, and of the rest where it is the session's own. */
void weights_bytes(const Config *c, const Ops *ops, int prec, int64_t *packed, int64_t *plain);

/* These are session_load, or session_begin, session_put and session_end. */
Status weights_load(Weights *w, Model *m);
Status weights_begin(Weights *w);
void weights_put(Weights *w, int64_t offset, const float *values, int64_t floats);
void weights_end(Weights *w);

/* Parameter i of layer l: as it is (NULL where the model has none), or packed. */
const float *weights_plain(const Weights *w, int i, int l);
char *weights_packed(const Weights *w, int i, int l);
/* Whether tokens are looked up in the packed embedding: the other one is not there. */
int weights_embeds_packed(const Weights *w);
/* Of the adapter of linear layer i (P_qkv_w ... P_fc2_w): the width, 0 where it has none; its A or B of layer l. */
int weights_added_width(const Weights *w, int i);
char *weights_added(const Weights *w, int i, int part, int l);
