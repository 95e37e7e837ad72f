/* bpe.h -- byte-level BPE: the merges that a vocabulary is made of, from documents.
 *
 * Tokens 0 .. 255 are the bytes; merge i makes token 256 + i.  Each merge takes the pair of neighbours that is most
 * frequent in all documents; of equally frequent ones the pair whose (left bytes, right bytes) is the larger, compared
 * as Python compares tuples of bytes.  Pairs never cross pieces.  The same merges for any number of threads, order and
 * batching of the documents.  After an error only bpe_free may follow. */
#pragma once
#include "pieces.h"

typedef struct Bpe Bpe;

typedef struct {
    uint32_t left, right;
} Merge;

/* A pair that occurs less than min_count times (>= 1) is not merged.  NULL: no memory. */
Bpe *bpe_create(Split split, int64_t min_count);
void bpe_free(Bpe *b);

/* `poll` is called every few milliseconds; where it returns non-zero the call ends with BPE_INTERRUPTED. */
BpeStatus bpe_add(Bpe *b, const uint8_t *text, size_t size, int (*poll)(void)); /* one document */
/* Up to n merges more, fewer where no pair is left; after the first call no document may be added.  BPE_TOO_LARGE: the
 * distinct pieces have 2^32 bytes or more. */
BpeStatus bpe_merge(Bpe *b, int n, int (*poll)(void));
int bpe_has_begun(const Bpe *b);                      /* merging */
size_t bpe_merges(const Bpe *b, const Merge **first); /* how many there are, and where */
