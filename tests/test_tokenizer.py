"""Tokenizer: bytes come back exactly, GPT-2's ids are GPT-2's, files are read as written, hostile ones refused."""

import base64
import functools
import json
import threading
from itertools import pairwise

import numpy as np
import pytest
from barelm import Tokenizer, split
from barelm.merges import ways
from barelm.tokenizer import _from_huggingface, _from_ranks, _jobs
from hypothesis import given, settings
from hypothesis import strategies as st

EOT = "<|endoftext|>"


def small_bpe(**options):
    """The bytes and a few merges, with ids that are not the ranks (the bytes come last, as no real file has them)."""
    merges = [(b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b" ", b"w"), (b"\xc3", b"\xa9")]
    tokens = [left + right for left, right in merges] + [bytes([b]) for b in range(255, -1, -1)]
    return Tokenizer({token: 10 + i for i, token in enumerate(tokens)}, merges, {EOT: 0, "<|user|>": 3}, **options)


TOKENIZERS = {"bytes": Tokenizer.bytes(), "small BPE": small_bpe()}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS.keys())
def tok(request):
    return request.param


load_gpt2 = functools.cache(Tokenizer.gpt2)  # building 50,000 ranks takes a moment
load_llama3 = functools.cache(Tokenizer.llama3)


@pytest.fixture
def gpt2(test_data):
    return load_gpt2(test_data / "tok" / "gpt2_vocab.bpe", test_data / "tok" / "gpt2_encoder.json")


@pytest.fixture
def llama3(test_data):
    return load_llama3(test_data / "tok" / "llama3_tokenizer.model")


@pytest.fixture(params=["gpt2", "llama3"])
def known(request):
    """GPT-2's and Llama-3's: each split pattern with a real vocabulary."""
    return request.getfixturevalue(request.param)


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


def pieces(pattern, text):
    """What a split pattern makes of a text, by an engine that has the property classes and remembers less."""
    regex = pytest.importorskip("regex")
    return regex.findall(pattern.replace("$", r"\Z"), text)


SPACES = [(" ", "x"), ("\n", "1"), ("\u3000", "("), (" ", "\x1c"), (" ", ""), ("\n ", "x"), (" ", "\n"), ("\n", "")]


@pytest.mark.parametrize("before", ["a", "(", "a\n", ".\r\n"])
def test_long_white_space_is_cut_as_the_pattern_cuts_it(known, before):
    """tiktoken's engine gives up on runs of a million; from 10,000 on we cut them where the pattern does."""
    for space, after in SPACES:
        text = f"{before}{space * 20_000}{after} b"
        assert known.encode(text) == [id for piece in pieces(known.pattern, text) for id in known.encode(piece)]


@pytest.mark.parametrize("space, after", SPACES)
def test_a_million_spaces_are_encoded(known, space, after):
    text = f"a{space * 1_000_000}{after}"
    assert known.decode(known.encode(text)) == text


@pytest.mark.parametrize("run", ["a", "1", "=", "\n", "\t", "\x1c", "a1", "\u3000\n"])
def test_a_megabyte_of_anything_is_encoded(known, run):
    text = run * (1_000_000 // len(run))
    ids = known.encode(text)
    assert known.decode(ids) == text


# ---- large texts --------------------------------------------------------------------------------------------------

# What the patterns tell apart, densely: line ends, spaces of either opinion, contractions, digits, marks, folded cases.
ALPHABET = "\n\r \t\u3000\u0085\x0b\x1caZ'sStTlLdm17\u0663.,(\u0301\u017f\u212aé東🦙\ufeff\u200b"
CUT_TEXTS = st.lists(st.sampled_from([*ALPHABET, "\n", "\n", "'s", "'LL", ".\n", "\r\n", "123", "  "])).map("".join)


@pytest.mark.parametrize("pattern", [split.GPT2_PATTERN, split.GPT4_PATTERN], ids=["GPT-2", "GPT-4"])
@settings(deadline=None, database=None, max_examples=1000)
@given(text=CUT_TEXTS, size=st.integers(1, 6))
def test_parts_have_the_pieces_of_the_whole(pattern, text, size):
    parts = split.parts(text, pattern, size)
    assert "".join(parts) == text and all(parts)
    assert [piece for part in parts for piece in pieces(pattern, part)] == pieces(pattern, text)


@pytest.mark.parametrize("text", [".\na", "a\n'll", "a\n1", "x\n.", "'\ns", "é\né", "1\n東"])
def test_a_line_end_between_two_characters_is_a_cut(text):
    for pattern in (split.GPT2_PATTERN, split.GPT4_PATTERN):
        assert split.parts(text, pattern, 1) == [text[:2], text[2:]]


@pytest.mark.parametrize("text", ["a\n b", "a\n\nb", "a \nb", "a\r\nb", "\nb", "a\n", "a\n\u3000b"])
def test_other_line_ends_are_no_cuts(text):
    for pattern in (split.GPT2_PATTERN, split.GPT4_PATTERN):
        assert split.parts(text, pattern, 1) == [text]


def test_python_knows_every_space_that_the_engine_knows():
    regex = pytest.importorskip("regex")
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    theirs, ours = set(regex.findall(r"\p{White_Space}", every)), {c for c in every if c.isspace()}
    assert ours - theirs == set("\x1c\x1d\x1e\x1f") and theirs <= ours


def uncut(tok, text):
    """What tiktoken makes of a text as one."""
    ids = tok._encoder.encode_ordinary(text) if tok._encoder else list(text.encode())
    return ids if tok._rank_to_id is None else tok._rank_to_id[ids].tolist()


@settings(deadline=None, database=None)
@given(text=CUT_TEXTS | st.text(), size=st.integers(1, 5))
def test_a_text_in_parts_has_the_ids_of_the_whole(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("barelm.tokenizer.PART", size)
        for pattern in (split.GPT2_PATTERN, split.GPT4_PATTERN):
            tok = small_bpe(pattern=pattern)
            assert tok.encode(text) == uncut(tok, text)


def test_a_large_text_has_the_ids_of_the_whole(known, test_data):
    text = (test_data / "text" / "wiki_demo.txt").read_text(encoding="utf-8")
    assert len(split.parts(text, known.pattern, 1 << 16)) > 10
    assert known.encode(text) == uncut(known, text)


def test_a_batch_has_the_ids_of_its_texts_one_by_one(tok):
    texts = ["hello wé", b"he\xffhe", "", f"a{EOT}b", "hell\n" * 20_000, *("hello " * i for i in range(100))]
    for special in (False, True):
        batch = tok.encode_batch(texts, special)
        assert [ids.tolist() for ids in batch] == [tok.encode(text, special) for text in texts]
        assert all(ids.dtype == np.int32 for ids in batch)
    assert tok.encode_batch(iter([])) == []


def test_small_texts_share_a_job():
    assert [len(job) for job in _jobs(["hello"] * 100)] == [100]
    assert [len(job) for job in _jobs(["a" * 40_000] * 5)] == [2, 2, 1]


def test_large_texts_are_encoded_by_several_threads(monkeypatch):
    tok, used = small_bpe(), set()
    plain = tok._text
    monkeypatch.setattr("barelm._core.threads_get", lambda: 3)
    monkeypatch.setattr(tok, "_text", lambda text: used.add(threading.get_ident()) or plain(text))
    text = "hello he\n" * 200_000
    assert tok.encode(text) == uncut(tok, text)
    assert 1 < len(used) <= 3


# ---- merges that never come about ---------------------------------------------------------------------------------


def plain_bpe(merges, data):
    """BPE as `tokenizers` describes it: the first merge of the list that fits anywhere, its leftmost place."""
    parts = [bytes([b]) for b in data]
    while True:
        rank = {pair: i for i, pair in reversed(list(enumerate(merges)))}
        fits = [(rank[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in rank]
        if not fits:
            return parts
        i = min(fits)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def draw_merges(draw):
    """Merges of a few letters, each of two tokens made before, several of which may never come about."""
    tokens, merges = [b"a", b"b", b"c"], []
    for _ in range(draw(st.integers(1, 12))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if pair[0] + pair[1] not in tokens and len(pair[0] + pair[1]) <= 16:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    return tokens, merges


LETTERS = r"[abc]+|[^abc]+"


@settings(deadline=None, database=None)
@given(data=st.data(), word=st.text("abc", max_size=40))
def test_any_list_of_merges_is_followed(data, word):
    tokens, merges = draw_merges(data.draw)
    vocab = {bytes([b]): b for b in range(256)} | {token: 256 + i for i, token in enumerate(tokens[3:])}
    tok = Tokenizer(vocab, merges, {EOT: 1000}, LETTERS)
    for text in (word, *(token.decode() for token in tokens)):
        assert [tok.token_bytes(id) for id in tok.encode(text)] == plain_bpe(merges, text.encode())


@settings(deadline=None, database=None)
@given(tokens=st.lists(st.text("abc", min_size=2, max_size=6).map(str.encode), unique=True), word=st.text("abc"))
def test_ranks_become_merges_that_mean_the_same(tokens, word):
    ranks = abc_ranks(*tokens)
    tok = _from_ranks(ranks, [EOT], LETTERS)
    again = _from_huggingface(json.loads(tok.to_json()))
    assert again.hash() == tok.hash()
    for text in (word, *(token.decode() for token in tokens)):
        ids = uncut(tok, text)
        assert tok.encode(text) == again.encode(text) == ids
        whole = [text.encode()] if text.encode() in ranks else None
        if not tok.ignore_merges:  # then the merges alone say it
            assert whole in (None, [tok.token_bytes(id) for id in ids])
            assert [tok.token_bytes(id) for id in ids] == plain_bpe(tok._merges, text.encode())


def abc_ranks(*tokens):
    return {bytes([b]): b for b in range(256)} | {token: 256 + i for i, token in enumerate(tokens)}


def test_of_several_ways_to_a_token_the_one_that_comes_about_is_kept():
    assert _from_ranks(abc_ranks(b"aa", b"aaa"), [EOT], LETTERS)._merges == [(b"a", b"a"), (b"aa", b"a")]


def test_a_token_that_no_merge_makes_is_met_as_a_whole():
    """b + c joins first, so nothing makes ab + c; as a whole piece of the split the token is there all the same."""
    tok = _from_ranks(abc_ranks(b"bc", b"ab", b"abca", b"aab"), [EOT], LETTERS)
    assert tok.ignore_merges and tok.encode("abca") == [258]
    assert tok.encode("abcac") == [97, 256, 97, 99]
    assert tok.encode("aab") == [259] and (b"a", b"ab") in tok._merges
    assert not _from_ranks(abc_ranks(b"bc", b"ab", b"aab"), [EOT], LETTERS).ignore_merges


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


@pytest.mark.parametrize("name, file", [("gpt2", "ggml-vocab-gpt-2"), ("llama3", "ggml-vocab-llama-bpe")])
def test_known_vocabularies_give_the_known_ids(name, file, request, test_data, tmp_path):
    tok = request.getfixturevalue(name)
    vectors = test_data / "tok" / f"{file}.gguf"
    texts = vectors.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = vectors.with_suffix(".gguf.out").read_text().split("\n")
    wanted = [[int(id) for id in line.split()] for line in wanted[: len(texts)]]
    assert len(texts) == 47
    again = Tokenizer.load(tok.save(tmp_path))
    assert again.hash() == tok.hash()
    for known in (tok, again):
        assert [known.encode(text) for text in texts] == wanted
        assert [known.decode(ids) for ids in wanted] == texts


def test_llama3_has_its_sizes_and_special_tokens(llama3):
    assert (llama3.n_vocab, llama3.eot, len(llama3.special)) == (128_256, 128_001, 256)
    assert (llama3.bos, llama3.adds_bos) == (128_000, True)
    for name, id in {
        "begin_of_text": 128_000,
        "reserved_special_token_3": 128_005,
        "start_header_id": 128_006,
        "end_header_id": 128_007,
        "reserved_special_token_4": 128_008,
        "eot_id": 128_009,
        "reserved_special_token_5": 128_010,
        "reserved_special_token_250": 128_255,
    }.items():
        assert llama3.special[f"<|{name}|>"] == id


def test_llama3_is_found_in_a_folder_and_by_every_way_to_its_tokens(llama3, test_data, tmp_path):
    """Files in circulation list every merge of two tokens to a third: 280,147 in all."""
    (tmp_path / "tokenizer.model").write_bytes((test_data / "tok" / "llama3_tokenizer.model").read_bytes())
    assert Tokenizer.load(tmp_path).hash() == llama3.hash()
    every = [pair for token in llama3._vocab for pair in ways(token, llama3._vocab)]
    assert len(every) == 280_147
    again = Tokenizer(llama3._vocab, every, llama3.special, llama3.pattern, ignore_merges=True, bos=llama3.bos)
    assert again.hash() == llama3.hash()


def test_gpt2_has_its_sizes_and_survives_the_file(gpt2, tmp_path):
    assert (gpt2.n_vocab, gpt2.eot, gpt2.bos, gpt2.adds_bos) == (50257, 50256, 50256, False)
    gpt2.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash() == gpt2.hash()


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


# ---- the token that begins a document -------------------------------------------------------------------------------

BEGIN = "<|begin|>"


def with_bos(bos=BEGIN):
    """A small vocabulary that puts a special token in front of every text."""
    tok = small_bpe()
    special = tok.special | {BEGIN: tok.n_vocab}
    return Tokenizer(tok._vocab, tok._merges, special, bos=special[bos])


def test_a_vocabulary_that_has_no_bos_begins_documents_with_the_end_of_text(tok):
    assert (tok.bos, tok.adds_bos, tok.ends) == (tok.eot, False, {tok.eot})
    assert tok.encode_prompt("hello") == tok.encode("hello") and tok.encode_prompt("") == [tok.eot]


@pytest.mark.parametrize("name", [BEGIN, EOT])
def test_bos_stands_before_a_prompt_and_survives_the_file(name, tmp_path):
    tok = with_bos(name)
    again = Tokenizer.load(tok.save(tmp_path))
    for known in (tok, again):
        assert (known.bos, known.adds_bos, known.ends) == (tok.special[name], True, {tok.eot, tok.special[name]})
        assert known.encode_prompt(b"hello") == [tok.bos, *tok.encode("hello")] and known.encode_prompt("") == [tok.bos]
        assert known.bytes_after(tok.bos, tok.encode(" ")[0]) == b" "
    assert again.hash() == tok.hash() != small_bpe().hash()


def test_bos_is_a_special_token():
    tok = small_bpe()
    for bos in (11, 10**6):
        with pytest.raises(ValueError, match=f"bos: {bos} is no special token"):
            Tokenizer(tok._vocab, tok._merges, tok.special, bos=bos)


POST_PROCESSORS = [  # (what a tokenizer.json may say, whether a text begins with <|begin|>)
    (lambda sequence: sequence, True),
    (lambda sequence: sequence["processors"][1], True),
    (lambda sequence: sequence["processors"][0], False),
    (lambda sequence: None, False),
    (lambda sequence: sequence["processors"][1] | {"single": sequence["processors"][1]["single"][1:]}, False),
    (lambda sequence: sequence["processors"][1] | {"single": sequence["processors"][1]["single"][::-1]}, False),
    (lambda sequence: sequence["processors"][1] | {"single": [7]}, False),
    (lambda sequence: {"type": "Sequence", "processors": 7}, False),
    (lambda sequence: {"type": "Sequence", "processors": [7, None, sequence["processors"][1]]}, True),
]


@pytest.mark.parametrize("number", range(len(POST_PROCESSORS)))
def test_the_template_of_a_file_says_what_begins_a_text(number, tmp_path):
    change, begins = POST_PROCESSORS[number]
    file = json.loads(with_bos().to_json())
    file["post_processor"] = change(file["post_processor"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    tok = Tokenizer.load(tmp_path)
    assert (tok.bos, tok.adds_bos) == (tok.special[BEGIN if begins else EOT], begins)


@pytest.mark.peers
def test_tokenizers_puts_the_same_token_in_front(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for tok in (*TOKENIZERS.values(), with_bos(), with_bos(EOT)):
        theirs = tokenizers.Tokenizer.from_file(str(tok.save(tmp_path)))
        for text in ("hello wé", " ", "<|begin|>x"):
            assert theirs.encode(text, add_special_tokens=False).ids == tok.encode(text, special=True)
        for text in ("hello wé", " "):
            assert theirs.encode(text, add_special_tokens=True).ids == tok.encode_prompt(text)


def broken(change):
    file = json.loads(small_bpe().to_json())
    change(file)
    return json.dumps(file)


def unreachable(model):
    """he comes before it, so nothing makes h + el; there is also hel = he + l, which the file does not list."""
    model["ignore_merges"] = True
    model["vocab"] |= {"el": 900, "hel": 901}
    model["merges"] += ["e l", "h el"]


def begins_with(token):
    return {"type": "TemplateProcessing", "single": [{"SpecialToken": token}, {"Sequence": {"id": "A", "type_id": 0}}]}


HOSTILE = {
    "not UTF-8": (b"\xff\xfe", "not UTF-8"),
    "not JSON": ("{", "not JSON"),
    "no object": ("[]", "JSON object"),
    "nested": ("[" * 200_000, "nested too deeply"),
    "a number of 5000 digits": ("9" * 5000, r"not JSON \(Exceeds"),
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
    "merges that go astray": (
        broken(lambda f: (f["model"].update(ignore_merges=True), f["model"]["merges"].insert(0, "e l"))),
        "makes a token that is not in the vocabulary",
    ),
    "one of many ways": (broken(lambda f: unreachable(f["model"])), "neither one that comes about nor all there are"),
    "no byte's character": (broken(lambda f: f["model"]["vocab"].update({"\u4e00": 999})), "stands for no byte"),
    "no end of text": (broken(lambda f: f.update(added_tokens=[])), "stands for no byte|no merge|end-of-text"),
    "added tokens of numbers": (broken(lambda f: f.update(added_tokens=[1])), "added_tokens"),
    "normalizer": (broken(lambda f: f.update(normalizer={"type": "NFC"})), "normalizer"),
    "prefix space": (broken(lambda f: f["pre_tokenizer"].update(add_prefix_space=True)), "pre_tokenizer"),
    "a text begins with a word": (
        broken(lambda f: f.update(post_processor=begins_with({"id": "he", "type_id": 0}))),
        "post_processor: a text would begin with 'he', which is no special token",
    ),
    "a text begins with a number": (broken(lambda f: f.update(post_processor=begins_with(7))), "would begin with None"),
    "a text begins with a list": (
        broken(lambda f: f.update(post_processor=begins_with({"id": []}))),
        "would begin with",
    ),
    "no split": (broken(lambda f: f.update(pre_tokenizer=None)), "pre_tokenizer"),
}


@pytest.mark.parametrize("text, reason", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_by_name_and_reason(tmp_path, text, reason):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=reason) as caught:
        Tokenizer.load(tmp_path)
    assert str(path) in str(caught.value)


def rank_file(change=lambda lines: lines):
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)] + ["aGU= 256", "aGVs 257"]
    return "\n".join(change(lines)) + "\n"


def with_line(line):
    return rank_file(lambda lines: [*lines, line])


HOSTILE_RANKS = {
    "too few": (rank_file(), "258 ranks, where Llama-3 has 128000"),
    "not UTF-8": (b"\x0a\x0e\xff\xfe", "not UTF-8"),
    "bad base64": (with_line("a*== 258"), "line 259: .*not base64"),
    "short base64": (with_line("aGV 258"), "line 259: .*not base64"),
    "no rank": (with_line("aGVsbA=="), "line 259: .*and its rank"),
    "three words": (with_line("aGVsbA== 258 1"), "line 259: .*and its rank"),
    "a negative rank": (with_line("aGVsbA== -1"), "line 259: .*and its rank"),
    "no decimal digits": (with_line("aGVsbA== \u0663"), "line 259: .*and its rank"),
    "a huge rank": (with_line(f"aGVsbA== {1 << 60}"), "line 259: .*and its rank"),
    "a long line": (with_line("A" * 4000 + " 258"), "line 259: .*and its rank"),
    "a rank twice": (with_line("aGVsbA== 257"), "line 259: the rank 257 is there twice"),
    "a gap": (with_line("aGVsbA== 259"), "no token has the rank 258"),
    "a token twice": (with_line("aGU= 258"), "the token b'he' is there twice"),
    "JSON": ("{}", "line 1: .*and its rank"),
    "nothing": ("", "0 ranks"),
}


@pytest.mark.parametrize("data, reason", HOSTILE_RANKS.values(), ids=HOSTILE_RANKS.keys())
def test_a_hostile_rank_file_is_refused_by_name_and_reason(tmp_path, data, reason):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match=reason) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


@settings(deadline=None, database=None)
@given(data=st.binary() | st.binary().map(lambda b: rank_file().encode() + b))
def test_no_bytes_of_a_rank_file_crash_us(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="fuzzed"):
        Tokenizer.load(path)


def test_a_rank_file_lacks_no_byte_and_holds_no_monster():
    ranks = {bytes([b]): b for b in range(256)}
    with pytest.raises(ValueError, match="byte 0xff has no token"):
        _from_ranks({token: rank for token, rank in ranks.items() if rank < 255}, [EOT], LETTERS)
    with pytest.raises(ValueError, match=r"1025 bytes.* too long"):
        _from_ranks(ranks | {b"a" * 1025: 256}, [EOT], LETTERS)
    with pytest.raises(ValueError, match="empty"):
        _from_ranks(ranks | {b"": 256}, [EOT], LETTERS)


def test_a_file_too_large_for_a_vocabulary_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.model"
    with open(path, "wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(ValueError, match="too much for a vocabulary"):
        Tokenizer.load(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a\.bpe"):
        Tokenizer.gpt2(tmp_path / "a.bpe", tmp_path / "b.json")


@pytest.mark.parametrize(("pattern", "text"), [(r"a?", None), (r"\p{L}*|.", None), (r"z|(?=q)|(?s).", "q")])
def test_a_pattern_that_matches_nothing_is_refused(pattern, text):
    """tiktoken panics where a piece is empty, which is no Exception: found by changing files at random."""
    if text is None:
        with pytest.raises(ValueError, match="makes a piece of nothing"):
            small_bpe(pattern=pattern)
    else:
        tok = small_bpe(pattern=pattern)
        assert tok.decode(tok.encode("hello")) == "hello"
        with pytest.raises(ValueError, match="makes a piece of nothing"):
            tok.encode(text)


def test_a_message_that_quotes_a_file_does_not_take_over_a_terminal(tmp_path):
    file = json.loads(small_bpe(pattern=r"(?s).").to_json())
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(?\x1b[2J)"
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=r"tokenizer\.json: ") as error:
        Tokenizer.load(tmp_path)
    assert "\x1b" not in str(error.value) and str(error.value).isprintable()
