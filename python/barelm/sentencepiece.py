"""The other kind of vocabulary: SentencePiece's BPE with byte fallback, which Llama 1 and 2 and llama2.c's models have.

Text is characters, a space is a piece like others (written U+2581), and of all neighbours that make a piece those with
the best score merge first, the leftmost of equals (Kudo and Richardson 2018, arXiv:1808.06226, and Sennrich et al.
2016, arXiv:1508.07909).  A character that no piece has becomes the tokens of its UTF-8 bytes, <0x0A>.  A space is put
in front of every text, and taken away when it is decoded.

The merging is tiktoken's, which joins any two neighbours whose bytes are a token, the lowest rank first: given the
pieces in the order of their scores that is the same, once each character of the vocabulary has come together from its
bytes.  So the beginnings of characters of several bytes have ranks too, lower than all pieces; what is left of them
where a character is not in the vocabulary falls back to bytes.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby

import numpy as np

from .merges import ways
from .tokenizer import EOT_NAMES, MAX_ID, PART, Tokenizer, added_token, check_close, template, template_begin

__all__ = ["BYTE", "CONTROL", "NORMAL", "SPACE", "UNKNOWN", "UNUSED", "SentencePiece", "from_huggingface"]

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, as SentencePiece and GGUF count
BEGIN_NAMES = ("<s>", "<bos>", "<|begin_of_text|>")  # what the known families call the token that begins a document
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
CUT = re.compile("(?<=[^ ])(?= )")
END = "\0"  # behind each text that tiktoken gets: it takes a text that is a token as a whole for that token


class SentencePiece(Tokenizer):
    """A SentencePiece BPE vocabulary with byte fallback.  The interface is Tokenizer's; Tokenizer.load reads it.

    eot        </s>, or bos where there is none
    bos        the token that begins every document, <s>: many models of this kind see nothing else between two of them
    pattern    None: merges know no borders but those that the pieces have

    What comes back exactly: any bytes that do not hold U+2581, which is read as a space.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        scores: Sequence[float],
        kinds: Sequence[int],
        begin: int | None = None,
        prefix: bool = True,
        adds_bos: bool = True,
    ):
        """pieces, scores, kinds: of each id; the best score merges first, of equal ones the lower id; begin: the id of
        <s>, None: by its name; prefix: a space is put in front of a text; adds_bos: and <s> before it.

        ValueError: a byte or the space has no piece, two are the same, or there is no <s>.
        """
        if not len(pieces) == len(scores) == len(kinds) <= MAX_ID:
            raise ValueError(f"{len(pieces)} pieces, {len(scores)} scores and {len(kinds)} kinds do not fit together")
        self.pattern, self.prefix, self.ignore_merges = None, prefix, False
        self.pieces, self.kinds = list(pieces), list(kinds)
        self.scores = np.asarray(scores, np.float32)
        if not np.isfinite(self.scores).all():
            raise ValueError("a score is not finite")
        self.n_vocab = len(self.pieces)
        self.special = {self.pieces[i]: i for i in self._of(UNKNOWN, CONTROL, USER_DEFINED)}
        self._normal = {self.pieces[i]: i for i in self._of(NORMAL)}
        self._byte_ids = _byte_ids({self.pieces[i]: i for i in self._of(BYTE)})
        self._check()
        by_name = next((self.special[name] for name in BEGIN_NAMES if name in self.special), -1)
        begin = by_name if begin is None else begin
        if begin not in self.special.values():
            raise ValueError(f"no token that begins a text (one of {', '.join(BEGIN_NAMES)})")
        self.eot = next((self.special[name] for name in EOT_NAMES if name in self.special), begin)
        self._set_bos(begin, adds_bos)
        self._special_ids = frozenset(self.special.values())
        self._bytes = [self._bytes_of(i) for i in range(self.n_vocab)]
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special_split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._make_encoder()

    # ---- what Tokenizer does otherwise ------------------------------------------------------------------------------

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, without the space that was put in front of the text, or behind a special token in it.
        ValueError: an id that no token has."""
        out, first = [], self.prefix
        for id in ids:
            token = self.token_bytes(id)
            out.append(token[1:] if first and token.startswith(b" ") else token)
            first = self.prefix and id in self._special_ids
        return b"".join(out)

    def bytes_after(self, before: int, id: int) -> bytes:
        token = self.token_bytes(id)
        return token[1:] if self.prefix and before in self._special_ids and token.startswith(b" ") else token

    def __repr__(self) -> str:
        return f"<SentencePiece n_vocab={self.n_vocab}>"

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _of(self, *kinds: int) -> list[int]:
        return [id for id, kind in enumerate(self.kinds) if kind in kinds]

    def _check(self) -> None:
        used = [piece for piece, kind in zip(self.pieces, self.kinds, strict=True) if kind != UNUSED]
        if len(set(used)) < len(used):
            raise ValueError("two pieces are the same")
        if "" in used:
            raise ValueError("a piece is empty")
        if SPACE not in self._normal:
            raise ValueError(f"the space has no piece ({SPACE!r})")
        odd = next((piece for piece in self._normal if " " in piece or END in piece), None)
        if odd is not None:
            raise ValueError(f"the piece {odd!r:.80} has a character that no text has")
        unknown = next((kind for kind in self.kinds if kind not in range(NORMAL, BYTE + 1)), None)
        if unknown is not None:
            raise ValueError(f"{unknown!r} is no kind of piece")

    def _bytes_of(self, id: int) -> bytes | None:
        piece, kind = self.pieces[id], self.kinds[id]
        if kind == UNUSED:
            return None
        if kind == BYTE:
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE, " ").encode() if kind == NORMAL else piece.encode()

    def ranked(self) -> list[str]:
        """The pieces that merges can make, those that merge first at the front."""
        ids = self._normal
        return sorted(_mergeable(ids), key=lambda piece: (-float(self.scores[ids[piece]]), ids[piece]))

    def _make_encoder(self) -> None:
        tokens = {bytes([b]): [int(self._byte_ids[b])] for b in range(256)}  # in the order of ranks: ids
        chars = {p.replace(SPACE, " ").encode(): id for p, id in self._normal.items() if len(p) == 1}
        for size in (2, 3):
            for char in chars:
                if len(char) > size:
                    tokens.setdefault(char[:size], [int(self._byte_ids[b]) for b in char[:size]])
        tokens |= {char: [id] for char, id in chars.items()}
        pieces = self.ranked()
        tokens |= {piece.replace(SPACE, " ").encode(): [self._normal[piece]] for piece in pieces}
        self._ids = np.array([ids[0] for ids in tokens.values()], np.int32)
        self._counts = np.array([len(ids) for ids in tokens.values()])
        self._all_ids = np.array([id for ids in tokens.values() for id in ids], np.int32)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._may_cut = not any(CUT.search(piece.replace(SPACE, " ")) for piece in pieces)
        self._ranks = {token: rank for rank, token in enumerate(tokens)}

    @cached_property
    def _encoder(self):
        import tiktoken

        ends = {"<|end|>": len(self._ranks)}
        return tiktoken.Encoding("barelm", pat_str="(?s).+", mergeable_ranks=self._ranks, special_tokens=ends)

    def _ordinary(self, data: bytes) -> Iterator[str | np.ndarray]:
        if not data:
            return
        text = (" " if self.prefix else "") + data.decode("utf-8", "surrogateescape").replace(SPACE, " ")
        for i, run in enumerate(re.split("([\udc80-\udcff]+)", text)):  # every second one is no UTF-8
            yield from [self._single_bytes(run)] if i % 2 else self._cut(run)

    def _cut(self, text: str) -> Iterator[str]:
        """A long text in parts, where no piece reaches across: before a space behind anything else, as a rule."""
        start = 0
        while self._may_cut and (cut := CUT.search(text, start + PART)):
            yield text[start : cut.start()]
            start = cut.start()
        if text[start:]:
            yield text[start:]

    def _text(self, text: str) -> np.ndarray:
        ranks = self._encoder.encode_to_numpy(text + END, disallowed_special=())[:-1]
        counts = self._counts[ranks]
        if counts.max(initial=1) == 1:
            return self._ids[ranks]
        begins = np.cumsum(counts) - counts
        return self._all_ids[np.repeat(self._firsts[ranks] - begins, counts) + np.arange(counts.sum())]

    def _to_huggingface(self) -> dict:
        """The form that Llama's own tokenizer.json has."""
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        prepend = {"type": "Prepend", "prepend": SPACE}
        decoders = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]
        unknown = self._of(UNKNOWN)
        used = [(piece, id) for id, piece in enumerate(self.pieces) if self.kinds[id] != UNUSED]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [added_token(text, id) for text, id in sorted(self.special.items(), key=lambda t: t[1])],
            "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if self.prefix else replace,
            "pre_tokenizer": None,
            "post_processor": template(self),
            "decoder": {"type": "Sequence", "decoders": decoders if self.prefix else decoders[:3]},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": self.pieces[unknown[0]] if unknown else None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": dict(used),
                "merges": [f"{left} {right}" for piece in self.ranked() for left, right in _ways(piece, self._normal)],
            },
        }


def _byte_ids(pieces: dict[str, int]) -> np.ndarray:
    ids = np.full(256, -1, np.int32)
    for piece, id in pieces.items():
        match = BYTE_PIECE.fullmatch(piece)
        if not match:
            raise ValueError(f"{piece!r:.80} is no byte (<0x00> to <0xFF>)")
        ids[int(match[1], 16)] = id
    if (ids < 0).any():
        raise ValueError(f"the byte <0x{int(np.argmin(ids)):02X}> has no piece: not a vocabulary with byte fallback")
    return ids


def _mergeable(vocab: Iterable[str]) -> list[str]:
    """Of several characters, each of which is a piece: others become bytes, which merge with nothing."""
    chars = {piece for piece in vocab if len(piece) == 1}
    return [piece for piece in vocab if len(piece) > 1 and chars.issuperset(piece)]


def _ways(piece: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every merge of two pieces to this one, in the order in which a list of merges takes the leftmost.

    Where x + y and y + z both make the piece and x y z stand in a text, x + y must come first; that is so where the
    piece repeats itself after the length of x.
    """
    found = ways(piece, vocab)
    return sorted(found, key=lambda pair: (not piece.startswith(piece[len(pair[0]) :]), -len(pair[0])))


# ---- files ----------------------------------------------------------------------------------------------------------


def from_huggingface(file: dict) -> SentencePiece:
    """A tokenizer.json whose model falls back to bytes.  What `tokenizers` would do otherwise than we is refused."""
    model, added = file["model"], file.get("added_tokens") or []
    vocab, merges = model["vocab"], model["merges"]
    special = {a["content"]: a.get("id") for a in added}
    ids = {**vocab, **special}
    if any(type(id) is not int or not 0 <= id < MAX_ID for id in ids.values()):
        raise ValueError("model.vocab: an id is no whole number in its range")
    if len(set(ids.values())) < len(ids):
        raise ValueError("two tokens have the same id")
    check_close(ids.values())
    n = 1 + max(ids.values(), default=-1)
    pieces, kinds, scores = [""] * n, [UNUSED] * n, np.full(n, -float(len(merges)) - 1)
    unknown = model.get("unk_token")
    for piece, id in ids.items():
        pieces[id] = piece
        kinds[id] = (UNKNOWN if piece == unknown else CONTROL) if piece in special else NORMAL
        if kinds[id] == NORMAL and BYTE_PIECE.fullmatch(piece):
            kinds[id] = BYTE
    normal = {pieces[id]: id for id in range(n) if kinds[id] == NORMAL}
    for rank, piece in enumerate(_merged(merges, normal)):
        scores[normal[piece]] = -rank
    post = file.get("post_processor")
    begin = template_begin(post, special)
    adds = begin is not None or post is None  # where nothing is said: every family of this kind does
    return SentencePiece(pieces, scores, kinds, begin, _prefix(file), adds)


def _merged(merges: list, vocab: dict[str, int]) -> list[str]:
    """The pieces that a list of merges makes, in its order.  ValueError: scores alone would not make the same."""
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"{merge!r:.80} is not a merge of two pieces")
        pairs.append(tuple(pair))
    made = []
    for piece, group in groupby(pairs, key="".join):
        group = list(group)
        if set(group) != set(ways(piece, vocab)) or piece not in vocab:
            raise ValueError(f"the merges to {piece!r:.80} are not all that there are: scores alone do not say them")
        made.append(piece)
    once = set(made)
    if len(once) < len(made):
        raise ValueError("merges to one piece stand apart: scores alone do not say them")
    lost = next((piece for piece in _mergeable(vocab) if piece not in once and ways(piece, vocab)), None)
    if lost is not None:
        raise ValueError(f"no merge makes the piece {lost!r:.80}")
    return made


def _prefix(file: dict) -> bool:
    """Whether a space is put in front; anything else that would change a text is refused."""
    if file.get("pre_tokenizer"):
        raise ValueError("pre_tokenizer: none is expected beside byte_fallback")
    normalizer = file.get("normalizer")
    steps = [normalizer]
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if steps == [prepend, replace]:
        return True
    if steps == [replace]:
        return False
    raise ValueError(f"normalizer: a {SPACE!r} before the text and in place of spaces is expected beside byte_fallback")
