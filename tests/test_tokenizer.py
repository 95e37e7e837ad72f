"""Tokenizer: bytes come back exactly, GPT-2's ids are GPT-2's, files are read as written, hostile ones refused."""

import functools
import json

import numpy as np
import pytest
from barelm import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

EOT = "<|endoftext|>"


def small_bpe():
    """The bytes and a few merges, with ids that are not the ranks (the bytes come last, as no real file has them)."""
    merges = [(b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b" ", b"w"), (b"\xc3", b"\xa9")]
    tokens = [left + right for left, right in merges] + [bytes([b]) for b in range(255, -1, -1)]
    return Tokenizer({token: 10 + i for i, token in enumerate(tokens)}, merges, {EOT: 0, "<|user|>": 3})


TOKENIZERS = {"bytes": Tokenizer.bytes(), "small BPE": small_bpe()}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS.keys())
def tok(request):
    return request.param


load_gpt2 = functools.cache(Tokenizer.gpt2)  # building 50,000 ranks takes a moment


@pytest.fixture
def gpt2(test_data):
    return load_gpt2(test_data / "tok" / "gpt2_vocab.bpe", test_data / "tok" / "gpt2_encoder.json")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, database=None)
@given(data=st.binary() | st.text().map(str.encode))
def test_any_bytes_come_back(name, data):
    tok = TOKENIZERS[name]
    assert tok.decode_bytes(tok.encode(data)) == data
    assert tok.decode_bytes(tok.encode(data, special=True)) == data


@settings(deadline=None, database=None)
@given(text=st.text())
def test_text_and_its_bytes_have_the_same_ids(text):
    for tok in TOKENIZERS.values():
        assert tok.encode(text) == tok.encode(text.encode())
        assert tok.decode(tok.encode(text)) == text


def test_bytes_are_their_own_ids():
    tok = Tokenizer.bytes()
    assert tok.encode("aé") == [97, 0xC3, 0xA9]
    assert (tok.n_vocab, tok.eot, tok.token_bytes(256)) == (257, 256, EOT.encode())


def test_merges_apply_in_their_order():
    tok = small_bpe()
    assert [tok.token_bytes(id) for id in tok.encode("hello wé")] == [b"hell", b"o", b" w", b"\xc3\xa9"]
    assert [tok.token_bytes(id) for id in tok.encode(b"he\xffhe")] == [b"he", b"\xff", b"he"]


def test_special_tokens_are_ordinary_text_unless_asked(tok):
    text = f"a{EOT}b{EOT}"
    assert tok.eot not in tok.encode(text)
    ids = tok.encode(text, special=True)
    assert ids == [*tok.encode("a"), tok.eot, *tok.encode("b"), tok.eot]
    assert tok.decode(ids) == text


def test_arrays_are_int32_and_equal_the_lists(tok):
    array = tok.encode_to_array("hello")
    assert array.dtype == np.int32 and array.tolist() == tok.encode("hello")
    assert tok.encode_to_array("").shape == (0,) and tok.encode("") == []


def test_lengths_add_up_to_the_bytes_and_special_tokens_have_none(tok):
    ids = tok.encode(f"hello wörld{EOT}", special=True)
    assert tok.token_lengths()[ids].sum() == len("hello wörld".encode())


@pytest.mark.parametrize("id", [-1, 1, 100_000])
def test_an_id_without_a_token_is_refused(id):
    with pytest.raises(ValueError, match=f"id {id} "):
        small_bpe().decode([id])


def test_incomplete_characters_are_replaced_or_refused():
    assert Tokenizer.bytes().decode([0xC3]) == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        Tokenizer.bytes().decode([0xC3], errors="strict")


def test_a_lone_surrogate_is_refused_and_a_bad_byte_of_the_command_line_is_kept(tok):
    with pytest.raises(ValueError, match="lone surrogate"):
        tok.encode("a\ud800")
    assert tok.decode_bytes(tok.encode("a\udcff")) == b"a\xff"


def test_a_million_spaces_are_encoded_as_a_thousand_are(gpt2):
    """The engine behind the split pattern gives up on runs that long; we cut them where it would."""
    for space, after in ((" ", "x"), ("\n", "1"), ("\u3000", "("), (" ", "\x1c"), (" ", "")):
        short, long = (gpt2.encode(f"a{space * n}{after} b") for n in (1_000, 1_000_000))
        assert gpt2.decode(long) == f"a{space * 1_000_000}{after} b"
        assert long[-2:] == short[-2:] and long[:2] == short[:2]


# ---- files --------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_loads_as_itself(tok, tmp_path):
    tok.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.hash() == tok.hash()
        assert again.encode("hello wé <|user|>") == tok.encode("hello wé <|user|>")
        assert again.special == tok.special


def test_another_split_pattern_survives_the_file(tmp_path):
    tok = small_bpe()
    digits = Tokenizer(tok._vocab, tok._merges, tok.special, pattern=r"he|\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]")
    digits.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode("hello") == digits.encode("hello") != tok.encode("hello")


def test_gpt2_gives_the_known_ids(gpt2, test_data):
    vectors = test_data / "tok" / "ggml-vocab-gpt-2.gguf"
    texts = vectors.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = vectors.with_suffix(".gguf.out").read_text().split("\n")
    wanted = [[int(id) for id in line.split()] for line in wanted[: len(texts)]]
    assert len(texts) == 47
    assert [gpt2.encode(text) for text in texts] == wanted
    assert [gpt2.decode(ids) for ids in wanted] == texts


def test_gpt2_has_its_sizes_and_survives_the_file(gpt2, tmp_path):
    assert (gpt2.n_vocab, gpt2.eot) == (50257, 50256)
    gpt2.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash() == gpt2.hash()
    assert again.encode("def f(x):\n    return x") == gpt2.encode("def f(x):\n    return x")


def test_gpt2_loads_from_a_folder_and_sees_a_changed_file(tmp_path):
    """tiktoken's own reader keeps a copy by path and would give back the old file."""
    tok = Tokenizer.bytes()
    chars = {token: id for token, id in json.loads(tok.to_json())["model"]["vocab"].items() if id < 256}
    for left, right in (("h", "e"), ("e", "l")):
        (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{left} {right}\n", encoding="utf-8")
        (tmp_path / "encoder.json").write_text(json.dumps(chars | {left + right: 256, EOT: 257}))
        assert 256 in Tokenizer.load(tmp_path).encode(left + right)


@pytest.mark.peers
def test_tokenizers_reads_what_we_write(gpt2, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for tok in (*TOKENIZERS.values(), gpt2):
        theirs = tokenizers.Tokenizer.from_file(str(tok.save(tmp_path)))
        text = "def hello(x):\n    return 'wé 12345'  # 🦙\n\n"
        assert theirs.encode(text, add_special_tokens=False).ids == tok.encode(text)
        assert theirs.token_to_id(EOT) == tok.eot
        assert theirs.decode(tok.encode(text)) == text


def broken(change):
    file = json.loads(small_bpe().to_json())
    change(file)
    return json.dumps(file)


HOSTILE = {
    "not UTF-8": (b"\xff\xfe", "not UTF-8"),
    "not JSON": ("{", "not JSON"),
    "no object": ("[]", "JSON object"),
    "nested": ("[" * 200_000, "nested too deeply"),
    "empty": ("{}", "only a BPE|vocab"),
    "other model": (broken(lambda f: f["model"].update(type="Unigram")), "only a BPE model"),
    "no byte": (broken(lambda f: f["model"]["vocab"].pop("a")), "byte 0x61 has no token"),
    "text for an id": (broken(lambda f: f["model"]["vocab"].update(a="1")), "'1' is not a token id"),
    "huge id": (broken(lambda f: f["model"]["vocab"].update(a=1 << 60)), "is not a token id"),
    "negative id": (broken(lambda f: f["model"]["vocab"].update(a=-5)), "is not a token id"),
    "same id": (broken(lambda f: f["model"]["vocab"].update(a=f["model"]["vocab"]["b"])), "same id"),
    "unknown merge": (broken(lambda f: f["model"]["merges"].append("x y")), "not in the vocabulary"),
    "merge of three": (broken(lambda f: f["model"]["merges"].append("x y z")), "not a merge of two"),
    "merge of one number": (broken(lambda f: f["model"]["merges"].append(7)), "not a merge of two"),
    "merge too early": (broken(lambda f: f["model"]["merges"].reverse()), "comes before one of its parts"),
    "no merge": (broken(lambda f: f["model"]["merges"].pop()), "no merge makes the token"),
    "no byte's character": (broken(lambda f: f["model"]["vocab"].update({"\u4e00": 999})), "stands for no byte"),
    "no end of text": (broken(lambda f: f.update(added_tokens=[])), "stands for no byte|no merge|end-of-text"),
    "added tokens of numbers": (broken(lambda f: f.update(added_tokens=[1])), "added_tokens"),
    "normalizer": (broken(lambda f: f.update(normalizer={"type": "NFC"})), "normalizer"),
    "prefix space": (broken(lambda f: f["pre_tokenizer"].update(add_prefix_space=True)), "pre_tokenizer"),
    "no split": (broken(lambda f: f.update(pre_tokenizer=None)), "pre_tokenizer"),
}


@pytest.mark.parametrize("text, reason", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_by_name_and_reason(tmp_path, text, reason):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=reason) as caught:
        Tokenizer.load(tmp_path)
    assert str(path) in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a\.bpe"):
        Tokenizer.gpt2(tmp_path / "a.bpe", tmp_path / "b.json")
