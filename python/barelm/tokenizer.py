"""Tokenizer: text to ids and back, byte-level BPE with special tokens.

Encoding is tiktoken's, training is csrc/bpe.c; this file reads and writes the vocabularies.  Three forms are read here:
Hugging Face's `tokenizer.json`, GPT-2's pair `vocab.bpe` + `encoder.json`, and Llama-3's rank file; binary files of
others in convert/.  The other kind of vocabulary is in sentencepiece.py.  Nothing here touches a network.

Byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): text is cut by a regular
expression, each piece is UTF-8 bytes, and the pair with the lowest rank merges until none is left.  Every byte is a
token, so every byte string can be encoded, and decoding gives back exactly the bytes that went in.
"""

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from . import _core, split
from .merges import Merges, ways
from .split import GPT2_PATTERN, GPT4_PATTERN

__all__ = ["Tokenizer"]

EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>")  # what the known families call the token between documents
MAX_ID = 1 << 24  # far above any real vocabulary: a hostile file must not make us allocate by its ids
MAX_FILE = 256 << 20  # bytes; Llama-3's tokenizer.json has 9 MB
MAX_RANK_LINE = 2048  # characters; a token of 1,024 bytes has 1,376
PART = 1 << 16  # characters that one thread encodes at a time: some milliseconds

RANK_FILES = (".model", ".tiktoken")  # how the names of rank files end
LLAMA3_RANKS = 128_000  # ordinary tokens; 256 special ones follow
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN}  # csrc/split.c knows both
MERGES_A_CALL = 64  # of training, between two calls of `progress`


def _byte_chars() -> list[str]:
    """The printable character that vocabulary files write for each byte: itself, or one from U+0100 on."""
    chars, spare = [], 256
    for byte in range(256):
        printable = chr(byte).isprintable() and chr(byte) != " "
        chars.append(chr(byte if printable else spare))
        spare += not printable
    return chars


BYTE_TO_CHAR = _byte_chars()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


class Tokenizer:
    """A byte-level BPE vocabulary.  Ways to make one:

    Tokenizer.bytes()                       the 256 bytes alone
    Tokenizer.train(documents, vocab_size)  learnt from text
    Tokenizer.load(path)                    from a file or folder of any form below, known by its name
    Tokenizer.gpt2(vocab_bpe, encoder_json) GPT-2's two files
    Tokenizer.llama3(path)                  Llama-3's rank file
    Tokenizer(vocab, merges, special, ...)  from its parts

    n_vocab    the largest id + 1
    eot        the id of the end-of-text token
    bos        the id that begins every document of training text: eot, or a token that the vocabulary has for it
    adds_bos   whether a text to be continued begins with it too: as the vocabulary's file says, for GPT-2 and for what
               is trained here not
    ends       the ids at which a text ends: eot, bos, and those that a model's files name besides
    special    {text: id} of the special tokens
    pattern    the regular expression that cuts text into pieces
    """

    def __init__(
        self,
        vocab: dict[bytes, int],
        merges: Sequence[tuple[bytes, bytes]],
        special: dict[str, int],
        pattern: str = GPT2_PATTERN,
        ignore_merges: bool = False,
        bos: int | None = None,
    ):
        """vocab: the bytes of each ordinary token and its id; merges: pairs, the first merges first; ignore_merges: a
        piece of the split that is a token as a whole is that token, even where the merges lead elsewhere (Llama-3);
        bos: the special token that every text begins with, None: there is none.

        ValueError: a byte has no id, an id is used twice, a merge is not in the vocabulary, there is no end-of-text, or
        bos is no special token.
        """
        self.pattern, self.special, self._vocab = pattern, dict(special), vocab
        self._check_ids()
        self.n_vocab = 1 + max([*vocab.values(), *special.values()])
        self.eot = next((special[name] for name in EOT_NAMES if name in special), -1)
        if self.eot < 0:
            raise ValueError(f"no end-of-text token among the special tokens (one of {', '.join(EOT_NAMES)})")
        self._set_bos(self.eot if bos is None else bos, bos is not None)
        self._bytes: list[bytes | None] = [None] * self.n_vocab
        for token, id in vocab.items():
            self._bytes[id] = token
        for text, id in special.items():
            self._bytes[id] = text.encode()
        self._byte_ids = np.array([vocab[bytes([b])] for b in range(256)], np.int32)
        longest_first = sorted(special, key=len, reverse=True)
        self._special_split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._make_encoder(Merges(vocab, merges, ignore_merges))

    # ---- making one -----------------------------------------------------------------------------------------------

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """The 256 bytes, each its own id, and <|endoftext|> = 256.  Needs no file and no training."""
        return cls({bytes([b]): b for b in range(256)}, [], {EOT: 256})

    @classmethod
    def train(
        cls,
        documents: "Iterable[str | bytes]",
        vocab_size: int,
        pattern: str = "gpt4",
        special: Sequence[str] = (EOT,),
        progress: Callable[[int, int], None] | None = None,
        min_count: int = 2,
    ) -> "Tokenizer":
        """A vocabulary from text: the bytes are ids 0 .. 255, merges follow in their order, then the special tokens.

        documents   any iterable, read once; only its distinct pieces are kept in memory.  Bytes that are not UTF-8 end
                    the piece before them and are in none themselves
        vocab_size  with the bytes and the special tokens
        pattern     how text is cut into pieces, which no merge crosses: "gpt4" or "gpt2"
        progress    called with (merges done, merges wanted) every few merges
        min_count   a pair that occurs less often is not merged.  Where no pair is left n_vocab is below vocab_size

        Each merge takes the most frequent pair; of equally frequent ones the pair whose (left bytes, right bytes) is
        the larger.  With min_count=1 these are the merges of the textbook's loop until nothing is left to merge; 2
        leaves out its last ones, of pairs that occur once.  The same for any number of threads.
        """
        special = _checked_special(special)
        _check_whole("vocab_size", vocab_size, 256 + len(special), MAX_ID)
        _check_whole("min_count", min_count, 1, 2**63 - 1)
        if pattern not in PATTERNS:
            raise ValueError(f"pattern: is {pattern!r}, must be one of {', '.join(map(repr, PATTERNS))}")
        trainer = _core.Bpe(pattern, min_count)
        for document in _each_document(documents):
            trainer.add(document)
        wanted, before, done = vocab_size - 256 - len(special), -1, 0
        while before < done < wanted:
            before, done = done, trainer.merge(min(MERGES_A_CALL, wanted - done))
            if progress:
                progress(done, wanted)
        tokens, merges = [bytes([b]) for b in range(256)], []
        for left, right in trainer.merges.tolist():
            merges.append((tokens[left], tokens[right]))
            tokens.append(tokens[left] + tokens[right])
        vocab = {token: id for id, token in enumerate(tokens)}
        return cls(vocab, merges, {text: len(vocab) + i for i, text in enumerate(special)}, PATTERNS[pattern])

    @classmethod
    def gpt2(cls, vocab_bpe: str | os.PathLike, encoder_json: str | os.PathLike) -> "Tokenizer":
        """GPT-2's vocabulary from its two files: merges, one "a b" a line, and {token: id}."""
        lines = _read(vocab_bpe).split("\n")
        if lines and lines[0].startswith("#version"):
            lines = lines[1:]
        merges = [line.rstrip("\r") for line in lines if line.strip("\r\n ")]
        vocab = read_json(encoder_json)
        try:
            special = {text: vocab.pop(text) for text in (EOT,) if text in vocab}
            return build(vocab, merges, special, GPT2_PATTERN)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{vocab_bpe} and {encoder_json} are not GPT-2's vocabulary: {error}") from None

    @classmethod
    def llama3(cls, path: str | os.PathLike) -> "Tokenizer":
        """Llama-3's vocabulary from its rank file (Meta's tokenizer.model): "token rank" a line, the token in base64.

        Such a file says neither its split pattern nor its special tokens: they are Llama-3's as first published.
        """
        ranks = _read_ranks(path)
        if len(ranks) != LLAMA3_RANKS:
            raise ValueError(f"{path}: {len(ranks)} ranks, where Llama-3 has {LLAMA3_RANKS}; others are not known")
        return _from_ranks(ranks, _llama3_special(), GPT4_PATTERN, bos=LLAMA3_RANKS)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """From a tokenizer.json, a GGUF file, a rank file of Llama-3 (its name ends in .model or .tiktoken), llama2.c's
        tokenizer (.bin), or a folder that holds tokenizer.json, tokenizer.model, or vocab.bpe and encoder.json.  Where
        texts end, a model's folder says besides (generation_config.json, or config.json).

        A SentencePiece vocabulary comes as SentencePiece, which is used as any other.
        """
        path = Path(path)
        if path.is_dir():
            from .convert import generation

            tok = cls._of_folder(path)
            tok.end_at(generation.read_ends(path))
            return tok
        if path.suffix in RANK_FILES:
            return cls.llama3(path)
        if _begins_with(path, b"GGUF"):
            from .convert import gguf

            return gguf.read_tokenizer(path)
        if path.suffix == ".bin":
            from .convert import llama2c

            return llama2c.read_tokenizer(path)
        try:
            return _from_huggingface(read_json(path))
        except ValueError as error:
            says = str(error)
            raise ValueError(legible(says if str(path) in says else f"{path}: {says}")) from None

    @classmethod
    def _of_folder(cls, folder: Path) -> "Tokenizer":
        if (folder / "tokenizer.json").exists():
            return cls.load(folder / "tokenizer.json")
        if (folder / "vocab.bpe").exists() and (folder / "encoder.json").exists():
            return cls.gpt2(folder / "vocab.bpe", folder / "encoder.json")
        if (folder / "tokenizer.model").exists():
            return cls.load(folder / "tokenizer.model")
        raise FileNotFoundError(
            f"{folder}: no tokenizer.json, nor vocab.bpe with encoder.json, nor tokenizer.model, in this folder"
        )

    def end_at(self, ids: Iterable[int]) -> None:
        """Have texts end at these tokens too.  Those that are not special are passed over: many a config.json says 2
        because its writer's default is a Llama's, where that is </s>."""
        self.ends |= frozenset(ids) & frozenset(self.special.values())

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `tokenizer.json` in the form that Hugging Face's `tokenizers` loads; returns its path."""
        path = Path(folder) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with open(part, "w", encoding="utf-8") as file:
            file.write(self.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        return path

    # ---- using it -------------------------------------------------------------------------------------------------

    def encode(self, text: "str | bytes", special: bool = False) -> list[int]:
        """Ids of a text.  Special tokens in it are ordinary text, unless `special`.

        Bytes that are not UTF-8 become the tokens of single bytes, so decode_bytes(encode(b)) == b for any b.
        """
        return self.encode_to_array(text, special).tolist()

    def encode_prompt(self, text: "str | bytes") -> list[int]:
        """Ids of a text that a model is to continue, as `tokenizers` and llama.cpp make them: with bos in front, where
        the vocabulary adds one.  No text at all is the beginning of a document: bos alone.

        Where it adds none (GPT-2, and what is trained here), models learn from windows that begin anywhere, and others
        give them nothing in front either: so the same prompt has the same ids everywhere.
        """
        ids = self.encode(text)
        return [self.bos, *ids] if self.adds_bos or not ids else ids

    def encode_to_array(self, text: "str | bytes", special: bool = False) -> np.ndarray:
        """As encode, an int32 array (n).  A long text is encoded by several threads."""
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: "Iterable[str | bytes]", special: bool = False) -> list[np.ndarray]:
        """encode_to_array of each text, by as many threads as the kernels use."""
        rows = [list(self._parts(_to_bytes(text), special)) for text in texts]
        jobs = list(_jobs(chain.from_iterable(rows)))
        threads = min(len(jobs), _core.threads_get())
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:  # tiktoken lets go of Python's lock
                done = list(pool.map(self._encode_job, jobs))
        else:
            done = map(self._encode_job, jobs)
        ids = chain.from_iterable(done)
        return [np.concatenate([np.zeros(0, np.int32), *(next(ids) for _ in row)]) for row in rows]

    def decode_bytes(self, ids: Iterable[int]) -> "bytes":
        """The exact bytes of the ids.  ValueError: an id that no token has."""
        return b"".join([self.token_bytes(id) for id in ids])

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of the ids; `errors` is what to do where the bytes are not UTF-8, as in bytes.decode."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def token_bytes(self, id: int) -> "bytes":
        """The bytes of one token; of a special token, its name."""
        token = self._bytes[id] if 0 <= id < self.n_vocab else None
        if token is None:
            raise ValueError(f"ids: no token has the id {id} (n_vocab is {self.n_vocab})")
        return token

    def bytes_after(self, before: int, id: int) -> "bytes":
        """What a token adds to a text whose last token is `before`.  ValueError: no token has the id."""
        return self.token_bytes(id)

    def has(self, id: int) -> bool:
        """Whether the id has a token: a vocabulary may leave some out."""
        return 0 <= id < self.n_vocab and self._bytes[id] is not None

    @property
    def merges(self) -> "list[tuple[bytes, bytes]]":
        """The merges, those that come first at the front."""
        return list(self._merges)

    def token_lengths(self) -> np.ndarray:
        """(n_vocab) int64: how many bytes of text each token stands for; 0 for special tokens."""
        lengths = np.array([len(token or b"") for token in self._bytes], np.int64)
        lengths[list(self.special.values())] = 0
        return lengths

    def to_json(self) -> str:
        """What save() writes."""
        return json.dumps(self._to_huggingface(), ensure_ascii=False, indent=1) + "\n"

    def hash(self) -> str:
        """sha256 of what save() writes: two tokenizers with one hash give the same ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __repr__(self) -> str:
        return f"<Tokenizer n_vocab={self.n_vocab} merges={len(self._merges)}>"

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _to_huggingface(self) -> dict:
        return _to_huggingface(self)

    def _set_bos(self, bos: int, adds: bool) -> None:
        if bos not in self.special.values():
            raise ValueError(f"bos: {bos!r:.40} is no special token")
        self.bos, self.adds_bos, self.ends = bos, adds, frozenset((self.eot, bos))

    def _check_ids(self) -> None:
        missing = [b for b in range(256) if bytes([b]) not in self._vocab]
        if missing:
            raise ValueError(f"the byte 0x{missing[0]:02x} has no token: not a byte-level vocabulary")
        ids = [*self._vocab.values(), *self.special.values()]
        for id in ids:
            if type(id) is not int or not 0 <= id < MAX_ID:
                raise ValueError(f"{id!r} is not a token id")
        if len(set(ids)) < len(ids):
            raise ValueError("two tokens have the same id")
        check_close(ids)
        if "" in self.special or b"" in self._vocab:
            raise ValueError("a token is empty")
        for text in self.special:  # a file has one name for both
            if CHAR_TO_BYTE.keys() >= set(text) and _from_chars(text) in self._vocab:
                raise ValueError(f"the special token {text!r} is an ordinary token too")

    def _make_encoder(self, merges: Merges) -> None:
        """tiktoken wants one number per token that is both its id and its rank; where a file has them apart, we map."""
        self._merges, self.ignore_merges, ranks = merges.kept, merges.ignore_merges, merges.ranks
        ids = np.array([self._vocab[token] for token in ranks], np.int32)
        self._rank_to_id = None if np.array_equal(ids, np.arange(len(ids))) else ids
        self._ranks = ranks
        if self.pattern not in PATTERNS.values() and self._encoder:
            self._text("a b1.\n")  # now, not at the first text, a pattern that matches nothing at all is refused

    @cached_property
    def _encoder(self):
        """tiktoken's, or None where nothing merges.  Made for the first text: that takes milliseconds, and much of what
        loads a vocabulary has none."""
        if len(self._ranks) == 256:
            return None
        import tiktoken  # here: a byte vocabulary does without

        # One special token, never allowed: with none tiktoken searches for the empty one at every character.
        return tiktoken.Encoding(
            "barelm",
            pat_str=split.engine_pattern(self.pattern),
            mergeable_ranks=self._ranks,
            special_tokens={EOT: len(self._ranks)},
        )

    def _parts(self, data: "bytes", special: bool) -> Iterator[str | np.ndarray]:
        """Texts that can be encoded each by itself, and between them the ids of what is no text."""
        if not special:
            yield from self._ordinary(data)
            return
        for i, part in enumerate(self._special_split.split(data.decode("utf-8", "surrogateescape"))):
            if i % 2:
                yield np.array([self.special[part]], np.int32)
            else:
                yield from self._ordinary(part.encode("utf-8", "surrogateescape"))

    def _ordinary(self, data: "bytes") -> Iterator[str | np.ndarray]:
        """_parts of bytes in which nothing is special."""
        if self._encoder is None:
            yield self._byte_ids[np.frombuffer(data, np.uint8)]
            return
        try:
            yield from split.parts(data.decode("utf-8"), self.pattern, PART)
        except UnicodeDecodeError:
            runs = re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))  # every second one is bad
            for i, run in enumerate(runs):
                yield from [self._single_bytes(run)] if i % 2 else split.parts(run, self.pattern, PART)

    def _single_bytes(self, escaped: str) -> np.ndarray:
        return self._byte_ids[np.frombuffer(escaped.encode("utf-8", "surrogateescape"), np.uint8)]

    def _encode_job(self, parts: list[str | np.ndarray]) -> list[np.ndarray]:
        return [self._text(part) if isinstance(part, str) else part for part in parts]

    def _text(self, text: str) -> np.ndarray:
        try:
            ranks = self._encoder.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:  # what Rust's panics come as is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the split pattern {self.pattern!r:.200} makes a piece of nothing") from None
        return ranks.astype(np.int32) if self._rank_to_id is None else self._rank_to_id[ranks]


def _jobs(parts: Iterable[str | np.ndarray]) -> Iterator[list[str | np.ndarray]]:
    """Parts in groups of about PART characters: a thread that changes for every few would cost more than it gives."""
    group, size = [], 0
    for part in parts:
        group.append(part)
        size += len(part) if isinstance(part, str) else 0
        if size >= PART:
            yield group
            group, size = [], 0
    if group:
        yield group


# ---- arguments of train -------------------------------------------------------------------------------------------


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name}: is {value!r}, must be a whole number from {low} to {high}")


def check_close(ids: Collection[int]) -> None:
    """ValueError: a small file must not make a large table of the ids that no token has."""
    if max(ids, default=0) > 16 * len(ids) + 100_000:
        raise ValueError("the ids lie too far apart")


def _checked_special(special: Sequence[str]) -> list[str]:
    names = [] if isinstance(special, str) else list(special)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"special: is {special!r}, must be a sequence of texts")
    if len(set(names)) < len(names):
        raise ValueError(f"special: {names} has one twice")
    if not set(names) & set(EOT_NAMES):
        raise ValueError(f"special: no end-of-text token in {names} (one of {', '.join(EOT_NAMES)})")
    return names


def _each_document(documents: "Iterable[str | bytes]") -> "Iterator[bytes]":
    """The bytes of each.  ValueError: there is none, or one is no text."""
    text = str | bytes | bytearray | memoryview
    if isinstance(documents, text) or not isinstance(documents, Iterable):
        raise ValueError(f"documents: is a {type(documents).__name__}, must be an iterable of str or bytes")
    n = 0
    for n, document in enumerate(documents, 1):
        if not isinstance(document, text):
            raise ValueError(f"documents: number {n} is a {type(document).__name__}, must be str or bytes")
        try:
            data = _to_bytes(document)
        except ValueError as error:
            raise ValueError(f"documents: number {n}: {str(error).removeprefix('text: ')}") from None
        yield data
    if not n:
        raise ValueError("documents: there is none")


# ---- files --------------------------------------------------------------------------------------------------------


def _read(path: str | os.PathLike) -> str:
    try:
        size = os.stat(path).st_size
        if size > MAX_FILE:
            raise ValueError(f"{path}: {size} bytes is too much for a vocabulary")
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def legible(text: str) -> str:
    """For messages that quote a file, which may hold anything: without characters that a terminal would obey, and what
    fills the screen without its middle, so that the place and what it must be remain."""
    text = text if len(text) <= 500 else f"{text[:300]} ... {text[-190:]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def _begins_with(path: Path, magic: "bytes") -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False  # whoever reads it says what is wrong


def read_json(path: str | os.PathLike) -> dict:
    """A file that holds a JSON object.  ValueError names it."""
    text = _read(path)
    try:
        value = json.loads(text)
    except ValueError as error:  # not only JSONDecodeError: Python makes no number of more than 4300 digits
        raise ValueError(f"{path}: not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{path}: JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value


def _read_ranks(path: str | os.PathLike) -> dict["bytes", int]:
    """{token: rank} of a rank file, in the order of the ranks, which are 0, 1, 2 ..."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                rank, token = _read_rank(line.rstrip("\r"))
                if rank in tokens:
                    raise ValueError(f"the rank {rank} is there twice")
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
            tokens[rank] = token
    missing = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if missing is not None:
        raise ValueError(f"{path}: no token has the rank {missing}")
    ranks = {tokens[rank]: rank for rank in range(len(tokens))}
    twice = next((tokens[rank] for rank in range(len(tokens)) if ranks[tokens[rank]] != rank), None)
    if twice is not None:
        raise ValueError(f"{path}: the token {twice!r} is there twice")
    return ranks


def _read_rank(line: str) -> tuple[int, "bytes"]:
    word, _, rank = line.partition(" ")
    if len(line) > MAX_RANK_LINE or not rank.isascii() or not rank.isdigit() or int(rank) >= MAX_ID:
        raise ValueError(f"{line[:40]!r} is not a token in base64 and its rank")
    try:
        return int(rank), base64.b64decode(word, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{word[:40]!r} is not base64 ({error})") from None


def _from_ranks(ranks: dict["bytes", int], special: Sequence[str], pattern: str, bos: int | None = None) -> Tokenizer:
    """Every merge of two tokens to a token, in the order of the ranks; special tokens follow the last rank."""
    merges = [pair for token in ranks for pair in ways(token, ranks)]
    ids = {text: len(ranks) + i for i, text in enumerate(special)}
    return Tokenizer(ranks, merges, ids, pattern, ignore_merges=True, bos=bos)


def _llama3_special() -> list[str]:
    """The 256 special tokens of Llama-3, in the order of their ids (3.1 has new names for three reserved ones)."""
    names = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    reserved = (f"reserved_special_token_{i}" for i in range(256))
    return [f"<|{names[i] if i in names else next(reserved)}|>" for i in range(256)]


def _to_bytes(text: "str | bytes") -> "bytes":
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    if not isinstance(text, str):
        raise TypeError(f"text: a str or bytes is expected, this is a {type(text).__name__}")
    try:
        return text.encode("utf-8", "surrogateescape")  # Python writes a bad byte of the command line as U+DC80..U+DCFF
    except UnicodeEncodeError as error:
        raise ValueError(f"text: character {error.start} is a lone surrogate, which no UTF-8 text can hold") from None


def _from_chars(token: str) -> "bytes":
    try:
        return bytes([CHAR_TO_BYTE[char] for char in token])
    except KeyError as error:
        raise ValueError(f"the token {token!r} has the character {error}, which stands for no byte") from None


def _to_chars(token: "bytes") -> str:
    return "".join([BYTE_TO_CHAR[b] for b in token])


def build(
    vocab: dict, merges: list, special: dict, pattern: str, ignore_merges: bool = False, bos: int | None = None
) -> Tokenizer:
    """A Tokenizer from the characters of a file; merges are "a b" or ["a", "b"]."""
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"{merge!r} is not a merge of two tokens")
        pairs.append((_from_chars(pair[0]), _from_chars(pair[1])))
    vocab = {_from_chars(token): id for token, id in vocab.items()}
    return Tokenizer(vocab, pairs, special, pattern, ignore_merges, bos)


def _from_huggingface(file: dict) -> Tokenizer:
    """A tokenizer.json.  What we would do differently from `tokenizers` is refused, never passed over."""
    model = file.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("model: only a BPE model can be read")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("model: vocab (an object) and merges (a list) are expected")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"model.{option}: {model[option]!r} is not supported")
    added = file.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(a, dict) and isinstance(a.get("content"), str) for a in added):
        raise ValueError("added_tokens: a list of objects with id and content is expected")
    if model.get("byte_fallback"):
        from .sentencepiece import from_huggingface

        return from_huggingface(file)
    if model.get("unk_token"):
        raise ValueError(f"model.unk_token: {model['unk_token']!r} is not supported")
    if file.get("normalizer"):
        raise ValueError("normalizer: not supported, text is taken as it is")
    special = {a["content"]: a.get("id") for a in added}
    vocab = {token: id for token, id in vocab.items() if token not in special}
    pattern, bos = _read_pattern(file.get("pre_tokenizer")), template_begin(file.get("post_processor"), special)
    return build(vocab, merges, special, pattern, bool(model.get("ignore_merges", False)), bos)


def _read_pattern(pre: object) -> str:
    """The regular expression of a pre_tokenizer: ByteLevel alone (GPT-2), or a Split before it (Llama-3)."""
    steps = pre.get("pretokenizers") if isinstance(pre, dict) and pre.get("type") == "Sequence" else [pre]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError("pre_tokenizer: ByteLevel, or Split and ByteLevel, is expected")
    byte_level = steps[-1] if steps else {}
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        raise ValueError("pre_tokenizer: must end in ByteLevel without add_prefix_space")
    if len(steps) == 1 and byte_level.get("use_regex", True):
        return GPT2_PATTERN
    split = steps[0]
    regex = split["pattern"].get("Regex") if isinstance(split.get("pattern"), dict) else None
    plain = split.get("behavior") == "Isolated" and not split.get("invert") and not byte_level.get("use_regex", True)
    if len(steps) != 2 or split.get("type") != "Split" or not isinstance(regex, str) or not plain:
        raise ValueError("pre_tokenizer: this sequence of steps is not supported")
    return regex


def template_begin(post: object, special: dict[str, int]) -> int | None:
    """The id that a post_processor puts in front of a text; None: it puts none there.

    This is what `tokenizers` does where it adds special tokens.  tokenizer_config.json is not asked: bos_token there is
    a name that says nothing of where it stands, and a tokenizer.json goes alone into datasets and runs.
    """
    steps = post.get("processors") if isinstance(post, dict) and post.get("type") == "Sequence" else [post]
    steps = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    single = next((step.get("single") for step in steps if step.get("type") == "TemplateProcessing"), None)
    first = single[0] if isinstance(single, list) and single and isinstance(single[0], dict) else {}
    token = first.get("SpecialToken")
    if token is None:
        return None
    name = token.get("id") if isinstance(token, dict) else None
    if not isinstance(name, str) or name not in special:
        raise ValueError(f"post_processor: a text would begin with {name!r:.80}, which is no special token")
    return special[name]


def template(tok: Tokenizer) -> dict:
    """The post_processor that puts bos in front of a text, or that says that nothing is put there."""
    name = tok.token_bytes(tok.bos).decode()

    def text(letter: str, number: int) -> list[dict]:
        bos = {"SpecialToken": {"id": name, "type_id": number}}
        return [bos] * tok.adds_bos + [{"Sequence": {"id": letter, "type_id": number}}]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {name: {"id": name, "ids": [tok.bos], "tokens": [name]}} if tok.adds_bos else {},
    }


def added_token(text: str, id: int) -> dict:
    """A special token, as tokenizer.json lists them."""
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": text, **options}


def _to_huggingface(tok: Tokenizer) -> dict:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pre = byte_level
    if tok.pattern != GPT2_PATTERN:
        split = {"type": "Split", "pattern": {"Regex": tok.pattern}, "behavior": "Isolated", "invert": False}
        pre = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    vocab = {_to_chars(token): id for token, id in tok._vocab.items()} | tok.special
    added = [added_token(text, id) for text, id in sorted(tok.special.items(), key=lambda item: item[1])]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": tok.ignore_merges,
        "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
        "merges": [f"{_to_chars(left)} {_to_chars(right)}" for left, right in tok._merges],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": {"type": "Sequence", "processors": [byte_level, template(tok)]}
        if tok.adds_bos
        else byte_level,
        "decoder": byte_level,
        "model": model,
    }
