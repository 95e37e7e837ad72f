"""SentencePiece vocabularies: the ids of a plain merging loop, bytes that come back, the files they are in."""

import json
import struct

import numpy as np
import pytest
from barelm import Tokenizer
from barelm.convert.source import CheckpointError
from barelm.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, SentencePiece
from hypothesis import given, settings
from hypothesis import strategies as st

BASE = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
BYTES = [(f"<0x{b:02X}>", 0, BYTE) for b in range(256)]
WORDS = [
    "▁",
    "e",
    "t",
    "a",
    "b",
    "c",
    "l",
    "o",
    "w",
    "é",
    "東",
    "▁t",
    "he",
    "▁the",
    "ll",
    "ll▁",
    "lo",
    "low",
    "▁low",
    "ab",
    "aba",
    "abab",
    "▁▁",
    "▁▁▁▁",
    "aa",
    "aaa",
    "aaaa",
    "東e",
    "zz",
]


def make(words, scores=None, **options):
    """Words with falling scores, in the order in which they stand."""
    scores = [-float(i) for i in range(len(words))] if scores is None else scores
    rows = [*BASE, *BYTES, *((word, score, NORMAL) for word, score in zip(words, scores, strict=True))]
    return SentencePiece(*map(list, zip(*rows, strict=True)), **options)


def plain(tok, text):
    """The definition: join the pair whose piece has the best score, the leftmost of equals, until there is none."""
    normal = {piece: id for id, piece in enumerate(tok.pieces) if tok.kinds[id] == NORMAL}
    symbols = list((SPACE if tok.prefix and text else "") + text.replace(" ", SPACE))
    while True:
        known = [(i, symbols[i] + symbols[i + 1]) for i in range(len(symbols) - 1)]
        known = [
            (-tok.scores[normal[piece]], normal[piece], i)
            for i, piece in known
            if piece in normal and symbols[i] in normal and symbols[i + 1] in normal
        ]
        if not known:
            break
        _, _, i = min(known)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = []
    for symbol in symbols:
        ids += [normal[symbol]] if symbol in normal else [tok._byte_ids[b] for b in symbol.encode()]
    return [int(id) for id in ids]


TOKENIZERS = {
    "small": make(WORDS),
    "no prefix": make(WORDS, prefix=False),
    "words with a space inside": make([*WORDS, "w▁", "lo▁", "lo▁w"]),
    "equal scores": make(WORDS, [0.0] * len(WORDS)),
}
TEXT = st.text(st.sampled_from("  etablow東é▁zq\n\0ßx𝄞")) | st.text()


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS.keys())
def tok(request):
    return request.param


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=300, database=None)
@given(text=TEXT)
def test_the_ids_are_those_of_the_plain_loop(name, text):
    assert TOKENIZERS[name].encode(text) == plain(TOKENIZERS[name], text)


def test_a_text_that_is_a_piece_as_a_whole_merges_as_any_other():
    """Of "▁abcd" = "▁ab" + "cd" neither part comes about, since b + c is better."""
    tok = make(["▁", "a", "b", "c", "d", "bc", "▁ab", "cd", "▁abcd"])
    assert (
        [tok.pieces[id] for id in tok.encode("abcd")]
        == ["▁", "a", "bc", "d"]
        == [tok.pieces[id] for id in plain(tok, "abcd")]
    )


@settings(deadline=None, max_examples=100, database=None)
@given(
    words=st.lists(st.text("ab▁é東", min_size=1, max_size=5), unique=True, max_size=30),
    scores=st.randoms(use_true_random=False),
    text=st.text("ab é東ß", max_size=40),
)
def test_any_vocabulary(words, scores, text):
    words = [*dict.fromkeys([SPACE, "a", *words])]
    tok = make(words, [scores.randrange(1000) / 8 for _ in words])
    assert tok.encode(text) == plain(tok, text)
    again = reload(tok)
    assert again.encode(text) == tok.encode(text) and again.hash() == tok.hash()


def reload(tok):
    from barelm.tokenizer import _from_huggingface

    return _from_huggingface(json.loads(tok.to_json()))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=200, database=None)
@given(data=st.binary() | st.text().map(str.encode))
def test_any_bytes_without_the_sign_of_a_space_come_back(name, data):
    tok, data = TOKENIZERS[name], data.replace(SPACE.encode(), b"")
    assert tok.decode_bytes(tok.encode(data)) == data
    assert tok.decode_bytes(tok.encode(b"</s>" + data + b"<s>" + data, special=True)) == b"</s>" + data + b"<s>" + data


def test_the_sign_of_a_space_is_a_space(tok):
    assert tok.decode(tok.encode("a▁b")) == "a b"


def test_special_tokens_are_text_unless_asked(tok):
    assert not set(tok.encode("<s>a</s>")) & {1, 2}
    assert tok.encode("a<s></s>", special=True) == [*tok.encode("a"), 1, 2]
    assert (tok.bos, tok.eot, tok.n_vocab, tok.token_bytes(1)) == (1, 2, len(tok.pieces), b"<s>")


def test_a_text_to_be_continued_begins_with_bos(tok):
    assert (tok.adds_bos, tok.ends) == (True, {1, 2})
    assert tok.encode_prompt("low") == [1, *tok.encode("low")] and tok.encode_prompt("") == [1]


def test_where_the_file_says_so_it_does_not(tmp_path):
    tok = make(WORDS, adds_bos=False)
    again = Tokenizer.load(tok.save(tmp_path))
    for known in (tok, again):
        assert (known.bos, known.adds_bos, known.ends) == (1, False, {1, 2})
        assert known.encode_prompt("low") == tok.encode("low") and known.encode_prompt("") == [1]
    assert again.hash() == tok.hash() != make(WORDS).hash()


@pytest.mark.parametrize(("post", "adds"), [(None, True), ({"type": "ByteLevel"}, False), (7, False)])
def test_a_file_that_says_nothing_is_as_others_of_its_kind(post, adds, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(make(WORDS).to_json()) | {"post_processor": post}))
    tok = Tokenizer.load(tmp_path)
    assert (tok.bos, tok.adds_bos) == (1, adds)


def test_a_vocabulary_without_an_end_ends_where_the_next_text_begins():
    rows = [*BASE[:2], *BYTES, *((word, -1.0, NORMAL) for word in WORDS)]
    tok = SentencePiece(*map(list, zip(*rows, strict=True)))
    assert (tok.bos, tok.eot, tok.ends) == (1, 1, {1})


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100, database=None)
@given(ids=st.lists(st.integers(0, 40) | st.integers(259, 259 + len(WORDS) - 1), max_size=8))
def test_a_text_token_by_token_is_the_text(name, ids):
    """Behind a special token the space in front of a text is none of it."""
    tok = TOKENIZERS[name]
    whole, before = b"", tok.bos
    for id in ids:
        whole, before = whole + tok.bytes_after(before, id), id
    assert whole == tok.decode_bytes(ids)


def test_lengths_count_the_space_in_front_and_no_special_token(tok):
    ids = tok.encode("lo é東ß</s>", special=True)
    assert tok.token_lengths()[ids].sum() == tok.prefix + len("lo é東ß".encode())


@pytest.mark.parametrize("part", [1, 2, 7, 100])
def test_long_texts_are_cut_where_no_piece_is(tok, monkeypatch, part):
    text = "the low  low aaaaaa lolo w    ▁the\n 東e" * 20
    want = plain(tok, text)
    monkeypatch.setattr("barelm.sentencepiece.PART", part)
    assert tok.encode(text) == want
    assert len(list(tok._cut(text))) == 1 or tok._may_cut


def test_a_million_of_one_character(tok):
    ids = tok.encode("a" * 10**6)
    assert tok.decode(ids) == "a" * 10**6 and len(ids) < 260_000


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "equal scores"])
def test_the_file_is_read_as_it_was_written(name, tmp_path):
    tok = TOKENIZERS[name]
    again = Tokenizer.load(tok.save(tmp_path).parent)
    assert isinstance(again, SentencePiece) and again.to_json() == tok.to_json() and again.prefix == tok.prefix
    assert again.kinds == tok.kinds and again.pieces == tok.pieces
    text = "the low aaaaab 東ß é▁ lo w"
    assert again.encode(text) == tok.encode(text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.pop(10), "the byte <0x07> has no piece"),
        (lambda rows: rows.pop(3 + 256), "the space has no piece"),
        (lambda rows: rows.append(rows[-1]), "two pieces are the same"),
        (lambda rows: rows.append(("", 0, NORMAL)), "a piece is empty"),
        (lambda rows: rows.append(("a b", 0, NORMAL)), "a character that no text has"),
        (lambda rows: rows.append(("x", float("nan"), NORMAL)), "a score is not finite"),
        (lambda rows: rows.append(("x", 0, 9)), "9 is no kind of piece"),
        (lambda rows: rows.append(("<0xG0>", 0, BYTE)), "'<0xG0>' is no byte"),
        (lambda rows: rows.pop(1), "no token that begins a text"),
    ],
)
def test_what_is_no_vocabulary(change, says):
    rows = [*BASE, *BYTES, *((word, -1.0, NORMAL) for word in WORDS)]
    change(rows)
    with pytest.raises(ValueError, match=says):
        SentencePiece(*map(list, zip(*rows, strict=True)))


CHANGES = [
    (lambda f: f["model"]["merges"].pop(), "no merge makes the piece"),
    (lambda f: f["model"]["merges"].append(f["model"]["merges"][0]), "are not all that there are|stand apart"),
    (lambda f: f["model"]["merges"].append("▁ x"), "are not all that there are"),
    (lambda f: f["model"]["merges"].append("▁"), "is not a merge of two pieces"),
    (lambda f: f["model"]["vocab"].update(x=10**9), "an id is no whole number in its range"),
    (lambda f: f["model"]["vocab"].update(x=10**7), "the ids lie too far apart"),
    (lambda f: f["model"]["vocab"].update(x="1"), "an id is no whole number in its range"),
    (lambda f: f["model"]["vocab"].update(x=5), "two tokens have the same id"),
    (lambda f: f.update(normalizer=None), "normalizer: "),
    (lambda f: f.update(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer: none is expected"),
    (lambda f: f["added_tokens"].append({"content": "<x>"}), "an id is no whole number in its range"),
    (lambda f: f["post_processor"]["single"][0]["SpecialToken"].update(id="low"), "a text would begin with 'low'"),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_file_that_says_something_else_is_refused(number, tmp_path):
    change, says = CHANGES[number]
    file = json.loads(TOKENIZERS["small"].to_json())
    change(file)
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=says):
        Tokenizer.load(tmp_path)


def test_ids_may_have_holes():
    tok = SentencePiece(
        *map(list, zip(*BASE, *BYTES, ("a", 0, UNUSED), (SPACE, 0, NORMAL), ("a", -1, NORMAL), strict=True))
    )
    assert tok.encode("a") == [260, 261] and reload(tok).encode("a") == [260, 261]
    with pytest.raises(ValueError, match="no token has the id 259"):
        tok.decode([259])


# ---- llama2.c's tokenizer


def test_llama2cs_tokenizer(test_data):
    tok = Tokenizer.load(test_data / "ckpt" / "tok512.bin")
    assert (tok.n_vocab, tok.bos, tok.eot, tok.special) == (512, 1, 2, {"<unk>": 0, "<s>": 1, "</s>": 2})
    assert tok.encode("Once upon a time, Lily\n") == [403, 407, 261, 378, 432, 317, 13]
    for text in (test_data / "text" / "tinystories_2MB.txt").read_text()[:6000].split("\n"):
        assert tok.encode(text) == plain(tok, text)
    assert reload(tok).hash() == tok.hash()


def test_two_megabytes_come_back(test_data):
    tok = Tokenizer.load(test_data / "ckpt" / "tok512.bin")
    data = (test_data / "text" / "tinystories_2MB.txt").read_bytes()
    ids = tok.encode_to_array(data)
    assert ids.dtype == np.int32 and tok.decode_bytes(ids) == data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "header: 4 bytes are wanted"),
        (struct.pack("i", 0), "the longest piece would have 0 bytes"),
        (struct.pack("i", 10**9), "the longest piece would have 1000000000 bytes"),
        (struct.pack("ifi", 7, 0, 5) + b"<un", "piece 0: 5 bytes are wanted"),
        (struct.pack("ifi", 7, 0, -5), "piece 0: has -5 bytes"),
        (struct.pack("ifi", 7, 0, 50) + b"x" * 50, "piece 0: has 50 bytes, the longest has 7"),
        (struct.pack("ifi", 7, 0, 2) + b"\xff\xfe", "piece 0: is not UTF-8"),
        (struct.pack("ifi", 7, 0, 5) + b"<unk>", "the byte <0x00> has no piece"),
    ],
)
def test_a_file_that_is_no_tokenizer_of_llama2c(data, says, tmp_path):
    (tmp_path / "tok.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tok\.bin: .*" + says):
        Tokenizer.load(tmp_path / "tok.bin")
