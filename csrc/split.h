/* split.h -- the pieces of text that merges never cross, as two regular expressions cut them; scanned by hand, in time
 * that is linear in the text whatever it holds. */
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef enum {
    SPLIT_GPT2, /* '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
    SPLIT_GPT4  /* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|
                   \s*[\r\n]+|\s+(?!\S)|\s+ */
} Split;

/* The end of the piece that begins at p < end.  p itself where the byte there is not part of UTF-8: it belongs to no
 * piece, and text before and behind it is split as if it ended and began there. */
const uint8_t *split_next(Split split, const uint8_t *p, const uint8_t *end);

/* The first place in [p, end) that no piece of the text begin .. end crosses, found by its neighbours alone; NULL where
 * none is seen.  So parts of a text can be split on their own, given its real end. */
const uint8_t *split_cut(const uint8_t *begin, const uint8_t *p, const uint8_t *end);
