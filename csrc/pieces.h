/* pieces.h -- how often each distinct piece of all documents occurs.  Only these are kept, no text. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include "split.h"

typedef enum { BPE_OK, BPE_NO_MEMORY, BPE_TOO_LARGE, BPE_INTERRUPTED } BpeStatus;

typedef struct {
    const uint8_t *bytes;
    int64_t count; /* 0: an empty slot of a table */
    uint64_t key;  /* up to 8 bytes are their own key: comparing them needs no look at `bytes` */
    uint32_t size, hash;
} Piece;

typedef struct Pieces Pieces;

Pieces *pieces_create(Split split); /* NULL: no memory */
void pieces_free(Pieces *p);

/* One more document.  `poll` is called every few milliseconds of work and ends it with BPE_INTERRUPTED where it returns
 * non-zero.  After an error nothing but pieces_free may follow. */
BpeStatus pieces_add(Pieces *p, const uint8_t *text, size_t size, int (*poll)(void));
/* Count what is still buffered. */
BpeStatus pieces_flush(Pieces *p, int (*poll)(void));

/* Call visit(context, piece) for every distinct piece, in no fixed order. */
void pieces_visit(const Pieces *p, void (*visit)(void *context, const Piece *piece), void *context);
