"""Training a vocabulary: pieces are those of the regular expressions, merges those of a plain trainer written here, for
any number of threads and any batching; what is trained encodes as its merges say."""

import functools
import itertools
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import regex
import tiktoken
from barelm import Tokenizer, _core
from barelm.tokenizer import GPT2_PATTERN, GPT4_PATTERN
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import threads

EOT = "<|endoftext|>"
PATTERNS = {
    "gpt2": regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    "gpt4": regex.compile(GPT4_PATTERN),
}
MIB = 2**20
both_patterns = pytest.mark.parametrize("pattern", PATTERNS)


def quietly(examples=100):
    return settings(deadline=None, database=None, max_examples=examples)


# What the patterns tell apart: contractions in both cases (the long s has one), white space with line ends and without,
# of one to three bytes, what is often taken for white space, digits of other scripts, marks, characters of four bytes.
TRICKY = (
    "'sStTrReEvVlLmMdD\u017f\u212a  \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2028\u3000\u200b\ufeff\x00"
    "aé中\u01c5\u02b0\u0130019\u0663\u2167\xb2\xbd\U0001d7d9\u0301\u0903\u20dd\U00010348\U0001f600.-!_\u2019\xad"
)
# A stray byte, sequences cut short, longer than need be, surrogates, what lies above U+10FFFF.
BAD = "ff 80 c3 e4b8 f09f98 c0af c1bf e080af e09fbf f08080af f08fbfbf eda080 edbfbf f4908080 f888"
BAD = [bytes.fromhex(part) for part in BAD.split()]
texts = st.text(st.sampled_from(TRICKY), max_size=40)
dirty = st.lists(st.sampled_from([*map(str.encode, TRICKY), *BAD]), max_size=40).map(b"".join)
few_letters = st.lists(st.text("ab", max_size=30) | st.text("abc é'1\n", max_size=30), max_size=4)


@pytest.fixture(autouse=True)
def default_threads():
    yield
    _core.threads_set(0)


# ---- the plain way


def plain_split(pattern, data):
    """The pieces; bytes that are not UTF-8 stand between two texts."""
    runs = re.split("[\udc80-\udcff]+", data.decode("utf-8", "surrogateescape"))
    return [piece.encode() for run in runs for piece in PATTERNS[pattern].findall(run)]


def merged(word, pair):
    """The tokens of the word with the pair merged wherever it stands, from left to right."""
    out = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


def plain_merges(pieces, n, min_count):
    """The most frequent pair, n times; of equals the larger.  pieces: {bytes: count}."""
    words, counts = [[bytes([b]) for b in piece] for piece in pieces], list(pieces.values())
    frequency, merges = Counter(), []
    for word, count in zip(words, counts, strict=True):
        for pair in itertools.pairwise(word):
            frequency[pair] += count
    while len(merges) < n:
        best = max(frequency, key=lambda pair: (frequency[pair], pair), default=None)
        if best is None or frequency[best] < min_count:
            break
        merges.append(best)
        for i, word in enumerate(words):
            if best[0] in word and best[1] in word:
                words[i] = merged(word, best)
                for pair in itertools.pairwise(word):
                    frequency[pair] -= counts[i]
                for pair in itertools.pairwise(words[i]):
                    frequency[pair] += counts[i]
    return merges


def plain_encode(tok, pattern, data):
    """The tokens' bytes: every merge in its order, piece by piece."""
    words = {piece: [bytes([b]) for b in piece] for piece in plain_split(pattern, data)}
    for pair in tok._merges:
        for piece, word in words.items():
            if pair[0] in word and pair[1] in word:
                words[piece] = merged(word, pair)
    return [token for piece in plain_split(pattern, data) for token in words[piece]]


def trained(documents, n, pattern, min_count=1):
    """The merges that _core makes of documents (bytes), as pairs of bytes."""
    trainer = _core.Bpe(pattern, min_count)
    for document in documents:
        trainer.add(document)
    trainer.merge(n)
    tokens, merges = [bytes([b]) for b in range(256)], []
    for left, right in trainer.merges.tolist():
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    return merges


def counted(pattern, documents):
    return Counter(piece for document in documents for piece in plain_split(pattern, document))


OWN_TEXT = "\n".join(p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.glob("test_[a-m]*.py")))


@functools.cache
def own(pattern):
    """A vocabulary of these tests' own text."""
    return Tokenizer.train([OWN_TEXT], 700, pattern=pattern)


# ---- pieces


def ours(pattern, text):
    return [piece.decode() for piece in _core.split(pattern, text.encode())]


def probe(char):
    """A text that is cut in a way of its own for a letter, a number, white space, and anything else."""
    return f"a{char}1!{char}!"


def assert_is_new(char):
    """Tables of two versions of Unicode differ in characters that this Python, which has an older one, has not."""
    assert unicodedata.category(char) == "Cn", f"U+{ord(char):04X}"


CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and chr(code) != " "]


def test_every_character_is_what_regex_takes_it_for():
    theirs = PATTERNS["gpt2"].findall
    for i in range(0, len(CHARACTERS), 256):
        block = CHARACTERS[i : i + 256]
        text = "x".join(map(probe, block))
        if ours("gpt2", text) != theirs(text):
            for char in block:
                if ours("gpt2", probe(char)) != theirs(probe(char)):
                    assert_is_new(char)


def test_every_character_is_what_tiktoken_takes_it_for():
    """Encoding splits by its tables.  What a pattern leaves out is in no token."""
    text, bytes_alone = "".join(CHARACTERS), {bytes([b]): b for b in range(256)}
    pieces = [ours("gpt2", probe(char)) for char in CHARACTERS]
    for name, expression, is_one in (
        ("letter", r"\p{L}", lambda char, pieces: pieces[0] == f"a{char}"),
        ("number", r"\p{N}", lambda char, pieces: pieces[1] == f"{char}1"),
        ("white space", r"\s", lambda char, pieces: pieces[-2:] == [char, "!"] and len(pieces) == 6),
    ):
        engine = tiktoken.Encoding(name, pat_str=expression, mergeable_ranks=bytes_alone, special_tokens={})
        theirs = set(engine.decode(engine.encode_ordinary(text)))
        for char, cut in zip(CHARACTERS, pieces, strict=True):
            if is_one(char, cut) != (char in theirs):
                assert_is_new(char)


@both_patterns
def test_contractions_end_where_the_regular_expression_says(pattern):
    ends = ["s", "t", "m", "d", "ll", "ve", "re", "\u017f", "l", "v", "r", "e", "le", "vl", "\u212a", "S\u0301"]
    for end in {"".join(case) for word in ends for case in itertools.product(*({c, c.upper()} for c in word))}:
        for text in (f"'{end}", f"'{end}x", f"a'{end}x", f" '{end}x", f"''{end}1", f"1'{end}'{end}"):
            assert ours(pattern, text) == PATTERNS[pattern].findall(text)


@both_patterns
@quietly(1000)
@given(text=texts)
def test_text_is_split_as_the_regular_expression_does(pattern, text):
    assert ours(pattern, text) == PATTERNS[pattern].findall(text)


@both_patterns
@quietly(500)
@given(data=dirty)
def test_bytes_that_are_not_utf8_stand_between_texts(pattern, data):
    assert _core.split(pattern, data) == plain_split(pattern, data)


@both_patterns
@quietly()
@given(data=dirty)
def test_encoding_splits_as_training_does(pattern, data):
    """No token of an encoded text reaches over the end of a piece."""
    tok = own(pattern)
    tokens = [tok.token_bytes(id) for id in tok.encode(data)]
    assert b"".join(tokens) == data
    ends = set(itertools.accumulate(map(len, tokens)))
    at = 0
    for piece in _core.split(pattern, data):
        at = data.index(piece, at) + len(piece)
        assert at in ends


@both_patterns
@pytest.mark.parametrize("char", [" ", "\n", "\u3000", "a", "5", "."], ids=ascii)
def test_a_megabyte_of_one_character(pattern, char):
    """What takes time that grows with the square of the length would not come to its end."""
    data = char.encode() * MIB
    for text in (data, data + b"x", b"x" + data + b"\n" + data + b"("):
        assert b"".join(_core.split(pattern, text)) == text
    assert _core.split(pattern, b"\xff" * MIB) == []


@both_patterns
@pytest.mark.parametrize("after", ["", "x", "1", "(", "\n", "\nx", "\n  x", "\n\n"], ids=ascii)
def test_a_long_run_of_white_space_is_encoded_as_it_was_trained(pattern, after):
    """The engine behind the encoder gives up on runs that long; they are cut where it would."""
    text = f"a{' ' * 200_000}{after}"
    tok = Tokenizer.train([text] * 2, 400, pattern=pattern)
    assert [tok.token_bytes(id) for id in tok.encode(text)] == plain_encode(tok, pattern, text.encode())


@both_patterns
@quietly(20)
@example(part="\n\xa0", bad=b"\xff")
@example(part="\n\u1680", bad=b"\xff")
@example(part="\n\u2028", bad=b"\xff")
@example(part="\n\u3000", bad=b"\xff")
@example(part="\n\r \t\x0b\x0c", bad=b"\xff")
@given(
    part=st.text(st.sampled_from(TRICKY) | st.sampled_from("ab \n"), min_size=1, max_size=200), bad=st.sampled_from(BAD)
)
def test_a_long_document_is_cut_into_chunks_where_no_piece_is(pattern, part, bad):
    """Chunks have 128 KB; the document has five of them, and no place to cut in some."""
    part = part.encode()
    document = part * (MIB // 4 // len(part)) + bad + b"a" * (MIB // 4) + part * (MIB // 8 // len(part))
    _core.threads_set(3)
    assert _core.piece_counts(pattern, [document]) == counted(pattern, [document])


# ---- counting


def documents_of(n):
    """Documents of n bytes in all, none like another; each ends with a letter."""
    words = [word for word in OWN_TEXT.split(" ") if word]
    for i in itertools.count():
        text = f"{i} {' '.join(words[i % len(words) :][:50])} end"
        yield text.encode()
        n -= len(text)
        if n < 0:
            return


@both_patterns
def test_counts_do_not_depend_on_threads_or_batches(pattern):
    """Documents are buffered up to 8 MB, and one that is longer is counted where it lies.  A letter before a space ends
    a piece, so that documents can be joined there."""
    documents = list(documents_of((9 if "TSAN_OPTIONS" in os.environ else 12) * MIB))
    joined = [b" ".join(documents), b""]
    documents[1:] = [b" " + document for document in documents[1:]]
    want = counted(pattern, documents)
    for n in (3,) if "TSAN_OPTIONS" in os.environ else (1, 2, 3, 8):
        with threads(n):
            assert _core.piece_counts(pattern, documents) == want
            assert _core.piece_counts(pattern, joined) == want
    if "TSAN_OPTIONS" in os.environ:  # where each pass takes a quarter of a minute
        return
    pairs = [b"".join(documents[i : i + 2]) for i in range(0, len(documents), 2)]
    assert _core.piece_counts(pattern, pairs[::-1]) == want


def test_a_piece_does_not_cross_documents():
    assert _core.piece_counts("gpt4", [b"ab", b"", b"ab", b"c'", b"s", b" ", b" d"]) == {
        b"ab": 2,
        b"c": 1,
        b"'": 1,
        b"s": 1,
        b" ": 1,
        b" d": 1,
    }


def test_pieces_of_any_length_are_told_apart():
    """The last two have one key in the hash table: found by a search."""
    letters = [b"x" * n + end for n in [*range(1, 40), 2**17, 2**19] for end in (b"a", b"b", b"b")]
    document = b"1".join([*letters, b"coxqmdgvaaaaaaad", b"xlhuazxficiexcwy"])
    assert _core.piece_counts("gpt4", [document]) == counted("gpt4", [document])


# ---- merges


def real_texts(folder):
    return [folder / "text" / "taylorswift.txt", *sorted((folder / "tok" / "cs336").glob("*"))]


@both_patterns
def test_merges_of_real_texts_are_the_plain_trainers(pattern, test_data):
    paths = real_texts(test_data)
    assert len(paths) == 4
    for path in paths:
        data = path.read_bytes()
        n = 250 if len(data) > 100_000 else 750
        assert trained([data], n, pattern) == plain_merges(counted(pattern, [data]), n, min_count=1)


@both_patterns
@pytest.mark.parametrize("min_count", [1, 2, 3])
@quietly(300)
@given(documents=few_letters)
def test_merges_are_the_plain_trainers(pattern, min_count, documents):
    """Until none is left, or the 40th."""
    documents = [document.encode() for document in documents]
    want = plain_merges(counted(pattern, documents), 40, min_count)
    assert trained(documents, 40, pattern, min_count) == want


@pytest.mark.parametrize(
    ("documents", "merges"),
    [
        (["ab cd", "ab cd"], [(b"c", b"d"), (b"a", b"b")]),  # the larger left
        (["ab ac", "ab ac"], [(b"a", b"c"), (b"a", b"b")]),  # the larger right
        (["bab", "bab"], [(b"b", b"a"), (b"ba", b"b")]),  # left first, then right
        (
            ["ba"] * 5 + ["bac", "bz"] * 2,
            [(b"b", b"a"), (b"ba", b"c"), (b"b", b"z")],
        ),  # "b", where "ba" begins, is less
        (["a\xff"], [(b"\xc3", b"\xbf"), (b"a", b"\xc3\xbf")]),  # bytes without sign
        (["aaaa"], [(b"a", b"a"), (b"aa", b"aa")]),
        (["aaaaa"], [(b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a")]),
    ],
)
def test_of_equally_frequent_pairs_the_larger_goes_first(documents, merges):
    assert trained([document.encode() for document in documents], 9, "gpt4")[: len(merges)] == merges


def test_merges_do_not_depend_on_threads_or_order():
    documents = [line.encode() for line in OWN_TEXT.split("\n")]
    want = trained(documents, 500, "gpt4")
    for n in (1, 2, 3, 8):
        with threads(n):
            assert trained(documents, 500, "gpt4") == trained(documents[::-1], 500, "gpt4") == want


def test_merges_in_many_calls_are_those_of_one():
    want = trained([OWN_TEXT.encode()], 300, "gpt2")
    trainer = _core.Bpe("gpt2", 1)
    trainer.add(OWN_TEXT.encode())
    assert [trainer.merge(n) for n in (0, 1, 99, 200)] == [0, 1, 100, 300]
    tokens = [bytes([b]) for b in range(256)]
    for left, right in trainer.merges.tolist():
        tokens.append(tokens[left] + tokens[right])
    assert tokens[256:] == [left + right for left, right in want]


# ---- Tokenizer.train


def test_the_vocabulary_is_bytes_then_merges_then_special_tokens():
    tok = Tokenizer.train([OWN_TEXT], 300, special=("<|user|>", EOT))
    merges = trained([OWN_TEXT.encode()], 42, "gpt4", 2)
    assert tok.n_vocab == 300 and tok.special == {"<|user|>": 298, EOT: 299} and tok.eot == 299
    assert [tok.token_bytes(id) for id in range(256)] == [bytes([b]) for b in range(256)]
    assert [tok.token_bytes(256 + i) for i in range(42)] == [left + right for left, right in merges]
    assert tok.pattern == GPT4_PATTERN
    assert Tokenizer.train([OWN_TEXT], 300, pattern="gpt2").pattern == GPT2_PATTERN


def test_documents_are_any_iterable_of_texts_and_bytes():
    want = Tokenizer.train([OWN_TEXT, "é\udcff"], 300).hash()
    for documents in (
        (text for text in (OWN_TEXT, "é\udcff")),
        [b"", OWN_TEXT.encode(), "", b"\xc3\xa9\xff"],
        {bytearray(OWN_TEXT.encode()).decode(): 0, "é\udcff": 1},
        [bytearray(OWN_TEXT.encode()), memoryview(b"\xc3\xa9\xff")],
    ):
        assert Tokenizer.train(documents, 300).hash() == want


@pytest.mark.parametrize(
    ("documents", "min_count", "n_vocab"),
    [
        ([""], 1, 257),
        (["a", "b"], 1, 257),
        (["ab"], 2, 257),
        (["ab"], 1, 258),
        (["abab"], 2, 258),
        (["abc"] * 2, 2, 259),
    ],
)
def test_where_no_pair_is_left_the_vocabulary_is_smaller(documents, min_count, n_vocab):
    tok = Tokenizer.train(documents, 1000, min_count=min_count)
    assert (tok.n_vocab, tok.eot) == (n_vocab, n_vocab - 1)


def test_progress_goes_from_little_to_all():
    said = []
    Tokenizer.train([OWN_TEXT], 256 + 1 + 200, progress=lambda *args: said.append(args))
    done, wanted = zip(*said, strict=True)
    assert len(said) > 2 and list(done) == sorted(done) and done[-1] == 200 and set(wanted) == {200}


class Stop(Exception):
    pass


def failing():
    yield "text"
    raise Stop


def stop(*_):
    raise Stop


def test_what_the_caller_raises_comes_through():
    with pytest.raises(Stop):
        Tokenizer.train(failing(), 300)
    with pytest.raises(Stop):
        Tokenizer.train([OWN_TEXT], 300, progress=stop)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(documents=[]), "documents: there is none"),
        (dict(documents="text"), "documents: is a str, must be an iterable of str or bytes"),
        (dict(documents=b"text"), "documents: is a bytes, must be"),
        (dict(documents=5), "documents: is a int, must be"),
        (dict(documents=["a", 5]), "documents: number 2 is a int, must be str or bytes"),
        (dict(documents=["a\ud800"]), "documents: number 1: character 1 is a lone surrogate"),
        (dict(vocab_size=256), "vocab_size: is 256, must be a whole number from 257 to"),
        (dict(vocab_size=257, special=(EOT, "<|user|>")), "vocab_size: is 257, must be a whole number from 258 to"),
        (dict(vocab_size=2**40), "vocab_size: is 1099511627776, must be"),
        (dict(vocab_size=300.0), "vocab_size: is 300.0, must be"),
        (dict(pattern="gpt3"), "pattern: is 'gpt3', must be one of 'gpt2', 'gpt4'"),
        (dict(special=EOT), "special: is '<|endoftext|>', must be a sequence of texts"),
        (dict(special=()), "special: is (), must be"),
        (dict(special=(EOT, "")), "special: is ('<|endoftext|>', ''), must be"),
        (dict(special=(EOT, EOT)), "special: ['<|endoftext|>', '<|endoftext|>'] has one twice"),
        (dict(special=("<|user|>",)), "special: no end-of-text token in ['<|user|>']"),
        (dict(special=(EOT, "ab"), documents=["ab ab"]), "the special token 'ab' is an ordinary token too"),
        (dict(min_count=0), "min_count: is 0, must be a whole number from 1 to"),
        (dict(min_count=2**63), "min_count: is 9223372036854775808, must be"),
    ],
)
def test_a_bad_argument_is_refused(arguments, says):
    with pytest.raises(ValueError, match="^" + re.escape(says)):
        Tokenizer.train(**(dict(documents=["text"], vocab_size=300) | arguments))


def test_the_trainer_checks_what_it_is_given():
    for arguments, says in ((("gpt3", 1), "pattern: is 'gpt3'"), (("gpt2", 0), "min_count: is 0, must be at least 1")):
        with pytest.raises(ValueError, match=says):
            _core.Bpe(*arguments)
    trainer = _core.Bpe("gpt2", 1)
    with pytest.raises(ValueError, match="n: is -1, must not be negative"):
        trainer.merge(-1)
    with pytest.raises(TypeError):
        trainer.add("text")
    trainer.add(b"text")
    trainer.merge(1)
    with pytest.raises(RuntimeError, match="merging has begun"):
        trainer.add(b"text")


# ---- using what was trained


@both_patterns
def test_real_texts_are_encoded_as_the_merges_say(pattern, test_data):
    for path in real_texts(test_data):
        tok = Tokenizer.train([path.read_bytes()], 600, pattern=pattern)
        for data in (path.read_bytes()[:20_000], "Grüße, 12345 'S \u017f\u2028\r\n\n  x 😀".encode()):
            assert [tok.token_bytes(id) for id in tok.encode(data)] == plain_encode(tok, pattern, data)


@both_patterns
@quietly()
@given(documents=few_letters, text=st.text("abc é'1\n", max_size=60))
def test_text_is_encoded_as_the_merges_say(pattern, documents, text):
    """With the last merge that can be made: tokens that are whole pieces, and parts of each other."""
    tok = Tokenizer.train([*documents, "x"], 400, pattern=pattern, min_count=1)
    for data in (text.encode(), *map(str.encode, documents)):
        assert [tok.token_bytes(id) for id in tok.encode(data)] == plain_encode(tok, pattern, data)


@both_patterns
@quietly()
@given(data=st.binary() | dirty)
def test_any_bytes_come_back(pattern, data):
    tok = own(pattern)
    assert tok.decode_bytes(tok.encode(data)) == data
    assert [tok.token_bytes(id) for id in tok.encode(data)] == encode_around_bad(tok, pattern, data)


def encode_around_bad(tok, pattern, data):
    """As plain_encode, with the bytes that are in no piece."""
    out, at = [], 0
    for piece in plain_split(pattern, data):
        start = data.index(piece, at)
        out += [data[i : i + 1] for i in range(at, start)] + plain_encode(tok, pattern, piece)
        at = start + len(piece)
    return out + [data[i : i + 1] for i in range(at, len(data))]


@both_patterns
def test_a_trained_vocabulary_survives_the_file(pattern, tmp_path):
    own(pattern).save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash() == own(pattern).hash() and again.pattern == own(pattern).pattern
    assert again.encode(TRICKY) == own(pattern).encode(TRICKY)


@pytest.mark.peers
@both_patterns
def test_tokenizers_gives_the_same_ids(pattern, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(own(pattern).save(tmp_path)))

    @quietly()
    @given(text=texts)
    def same(text):
        assert theirs.encode(text, add_special_tokens=False).ids == own(pattern).encode(text)

    same()


# ---- long work


def script(text, *arguments, timeout=60):
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments], capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


INTERRUPT = """
import os, random, signal, sys, threading, time
from barelm import _core

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts behind "&" ignore Ctrl-C
_core.threads_set(1)  # one: then processor time says how long a call went on, however busy the machine is
trainer = _core.Bpe("gpt4", 1)
letters = "".join(map(chr, range(0x4E00, 0x9E00)))
document = "".join(random.Random(0).choices(letters, k=3_000_000)).encode()
sent = []

def send():
    time.sleep(0.25)
    sent.append(time.process_time())
    os.kill(os.getpid(), signal.SIGINT)

if sys.argv[1] == "merge":
    trainer.add(document)
    trainer.merge(1)
    call = lambda: trainer.merge(10_000_000)
else:
    document = b"a b " * (300 << 18)
    call = lambda: trainer.add(document)
threading.Thread(target=send).start()
try:
    call()
    sys.exit("the call came through")
except KeyboardInterrupt:
    late = time.process_time() - sent[0]
assert late < 1, f"{late:.2f} s late"
try:
    trainer.merge(1)
    sys.exit("half of the work was taken for all")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("call", ["add", "merge"])
def test_ctrl_c_ends_a_long_call(call):
    """One that takes seconds: well within the next."""
    assert script(INTERRUPT, call) == "the training was interrupted\n"


NO_MEMORY = """
import resource
import numpy as np
from barelm import _core

rng = np.random.default_rng(0)
words = rng.integers(97, 123, (50, 200_000, 9), np.uint8)
words[..., -1] = 32
documents = [block.tobytes() for block in words]
_core.threads_set(1)
trainer = _core.Bpe("gpt4", 1)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
for call in (lambda: [trainer.add(document) for document in documents], lambda: trainer.merge(1)):
    try:
        call()
        print("enough")
    except MemoryError as error:
        print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="nothing here says how large a process is")
def test_too_little_memory_is_an_error():
    assert script(NO_MEMORY) == "documents: no memory for their distinct pieces\n" * 2


STREAM = """
import numpy as np
from barelm import Tokenizer

def most():  # kilobytes; not getrusage, which begins with what the parent had
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))

rng = np.random.default_rng(0)
letters = rng.choice(list("etaoinshrdlucmfwypvbgkjqxz"), (1 << 19, 12))
lengths = rng.integers(1, 13, 1 << 19)
words = np.array(["".join(row[:n]) for row, n in zip(letters, lengths)], object)
size = 0

def documents():
    global size
    while size < 200_000_000:
        ranks = np.minimum(rng.zipf(1.15, 1 << 16), 1 << 19) - 1  # the words of a natural text: Zipf, with a long tail
        text = " ".join(words[ranks])
        size += len(text)
        yield text

before = most()
tok = Tokenizer.train(documents(), 4096)
peak = most()
print(size >> 20, "MB of text,", before >> 10, "MB before,", peak >> 10, "at most,", tok.n_vocab)
assert tok.n_vocab == 4096 and peak < 500 << 10, (before, peak)  # kilobytes
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no /proc")
def test_memory_holds_pieces_and_not_the_text():
    print(script(STREAM, timeout=300))
