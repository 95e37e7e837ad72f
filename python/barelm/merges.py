"""Which merges of a vocabulary come about, and with them the ranks that tiktoken encodes by.

tiktoken knows no merges: it joins any two neighbours whose bytes are a token, the lowest rank first.  That is the same
as a list of merges where every token comes about in one way only.  And so it does: what BPE does inside the bytes of a
token, as long as nothing joins across their ends, is what it does to these bytes alone.  If two neighbours ever cover
just these bytes, they are the two parts that the earlier merges leave of them; another merge to the same token never
happens.  Where the earlier merges leave more than two parts, no merge of two earlier tokens makes it.

Llama-3 has some hundred tokens of the latter kind.  They are met where a whole piece of the split is such a token (the
file's `ignore_merges`), or where later tokens lead to them; for these every way must be known.
"""

from collections.abc import Iterator, Sequence

__all__ = ["Merges", "ways"]

MAX_TOKEN = 1024  # bytes of a token that we look for ways to: a hostile file must not make us search for hours

Pair = tuple[bytes, bytes]


class Merges:
    """What a list of merges amounts to.

    ranks           {token: rank} for tiktoken, the 256 bytes first
    kept            the merges, in order: of several to one token only the one that comes about
    ignore_merges   some tokens are met as whole pieces although the merges before them do not make them
    """

    def __init__(self, vocab: dict[bytes, int], merges: Sequence[Pair], ignore_merges: bool = False):
        """vocab: {token: id}; merges: pairs, the first merges first; several merges to one token stand together.

        ValueError: a merge comes before its parts, a token has no merge, or tiktoken could not follow.
        """
        by_id = sorted((bytes([b]) for b in range(256)), key=vocab.__getitem__)
        self.ranks = {byte: rank for rank, byte in enumerate(by_id)}
        self.kept: list[Pair] = []
        self.ignore_merges = False
        self._parts = {}  # of every token that its merge makes
        self._pairs = {}  # {pair: rank} of all merges
        seen = set(by_id)
        for token, pairs in _by_token(merges):
            _check(token, pairs, vocab, seen, ignore_merges)
            seen.add(token)
            self._add(token, pairs, vocab, ignore_merges)
        for token in [token for token in vocab if token not in seen]:
            if not ignore_merges or ways(token, vocab):
                raise ValueError(f"no merge makes the token {token!r}")
            self._add(token, [], vocab, ignore_merges)

    def _add(self, token: bytes, pairs: list[Pair], vocab: dict[bytes, int], ignore_merges: bool) -> None:
        made = next((pair for pair in pairs if self._comes_about(*pair)), None)
        if made:
            self._parts[token] = made
            pairs = [made]
        elif ignore_merges:
            if set(pairs) != set(ways(token, vocab)):
                raise ValueError(
                    f"the merges to the token {token!r} are neither one that comes about nor all there are"
                )
            self.ignore_merges = True
        self.kept += pairs
        if made or ignore_merges:  # otherwise no text has this token
            rank = self.ranks[token] = len(self.ranks)
            self._pairs.update(dict.fromkeys(pairs, rank))

    def _comes_about(self, left: bytes, right: bytes) -> bool:
        """Whether the merges so far make of left + right these two parts.

        Each of them is made of its own bytes, so the question is whether anything joins across their border before.
        We undo their merges from the last to the first and look at the two parts that meet at the border each time.
        (The idea is that of the crate `bpe` in github/rust-gems.)
        """
        parts, ranks = self._parts, self.ranks
        if (len(left) > 1 and left not in parts) or (len(right) > 1 and right not in parts):
            return False
        limit = len(ranks)
        while self._pairs.get((left, right), limit) >= limit:
            last_left = ranks[left] if left in parts else -1
            last_right = ranks[right] if right in parts else -1
            if last_left < 0 and last_right < 0:
                return True
            if last_left > last_right:
                limit, left = last_left, parts[left][1]
            else:  # equal merges happen from left to right: the border's own comes before the one on its right
                limit, right = last_right + 1, parts[right][0]
        return False


def ways(token: bytes, vocab: dict[bytes, int]) -> list[Pair]:
    """Every merge of two tokens to this one.  ValueError: the token is longer than any real one."""
    if len(token) > MAX_TOKEN:
        raise ValueError(f"a token of {len(token)} bytes, beginning with {token[:16]!r}, is too long")
    halves = [(token[:i], token[i:]) for i in range(1, len(token))]
    return [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]


def _by_token(merges: Sequence[Pair]) -> Iterator[tuple[bytes, list[Pair]]]:
    """Merges that follow each other and make the same token, together."""
    token, pairs = b"", []
    for pair in merges:
        if pair[0] + pair[1] != token:
            if pairs:
                yield token, pairs
            token, pairs = pair[0] + pair[1], []
        pairs.append(pair)
    if pairs:
        yield token, pairs


def _check(token: bytes, pairs: list[Pair], vocab: dict[bytes, int], seen: set[bytes], ignore_merges: bool) -> None:
    known = vocab if ignore_merges else seen
    for left, right in pairs:
        if left not in known or right not in known:
            raise ValueError(f"the merge {left!r} + {right!r} comes before one of its parts is made")
        if token not in vocab:
            raise ValueError(f"the merge {left!r} + {right!r} makes a token that is not in the vocabulary")
    if token in seen:
        raise ValueError(f"two merges far apart make {token!r}: not a vocabulary that ranks alone describe")
