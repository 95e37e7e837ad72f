"""Models of other projects, in and out: the published text of a real one, equal bits through every form, errors that
name the file and the thing."""

import json
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from barelm import Config, Model, Session, Tokenizer, _core, checkpoint, generate
from barelm import __main__ as command
from barelm.convert import gguf, gguf_file, llama2c, llmc
from barelm.convert.numbers import from_float32, to_float32
from barelm.convert.output import whole_file
from barelm.convert.recognise import open_source
from barelm.convert.source import CheckpointError, Source, half_split, interleaved
from conftest import GPT2, LLAMA, tiny_configs
from formats import rewritten_gguf, small_pieces, write_llama2c, write_llama2c_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_all_same_bits, assert_same_bits, copies, random_model
from test_tokenizer import load_gpt2, load_llama3

SCALING = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64, rope_type="llama3"
)
LLMC = GPT2 | dict(n_head=4, n_kv_head=4, vocab_size=200)


def values_of(source):
    return {name: np.concatenate(list(source.rows(name))) for name in source.shapes}


def written(model, path, kind="F32", tok=None):
    """A model as GGUF, read again."""
    gguf.write(Source.of_model(model, tok), path, kind)
    return gguf.read(path)


# ---- a real model


@pytest.fixture
def stories(test_data):
    return open_source(test_data / "ckpt" / "stories260K.bin").with_tokenizer(
        Tokenizer.load(test_data / "ckpt" / "tok512.bin")
    )


def published(test_data):
    """The text that stories260K writes with temperature 0."""
    blocks = (test_data / "ckpt" / "stories260K.md").read_text().split("```")
    return next(b.split("\n", 2)[2] for b in blocks if "-t 0.0\n" in b).rstrip("\n")


def greedy(folder, tok, steps=257):
    session = Session.load(folder, steps)
    row, ids = session.add(), [tok.bos]
    while len(ids) < steps:
        ids.append(int(session.step([row], [ids[-1:]])[0].argmax()))
        if ids[-1] in tok.ends:
            return ids[:-1]
    return ids


def test_stories260k_writes_its_published_text(stories, test_data, tmp_path):
    checkpoint.write(stories, tmp_path / "a")
    text = stories.tokenizer.decode(greedy(tmp_path / "a", stories.tokenizer)[1:])
    want = published(test_data)
    assert len(want) > 500 and text == want
    model = Model.load(tmp_path / "a")
    assert "".join(generate(model, stories.tokenizer, temperature=0, max_tokens=256)) == want


def test_sample_begins_and_ends_a_text_with_bos(stories, test_data, tmp_path, capsys):
    """As llama2.c does; the token that ended it is no part of it."""
    checkpoint.write(stories, tmp_path / "a", files={"tokenizer.json": stories.tokenizer.to_json().encode()})
    words = ["sample", "--checkpoint", str(tmp_path / "a"), "--temperature", "0", "--max-tokens"]
    assert command.main([*words, "256"]) == 0
    assert capsys.readouterr().out == published(test_data) + "\n"
    assert command.main([*words, "400", "--json"]) == 0
    said, tok = json.loads(capsys.readouterr().out), stories.tokenizer
    ids = greedy(tmp_path / "a", tok, 400)
    assert (said["finish"], said["ids"], len(ids)) == ("stop", ids[1:], 346)
    assert said["text"] == tok.decode(said["ids"]) and said["text"].startswith(published(test_data))
    assert len(said["logprobs"]) == len(said["ids"])


def test_stories260k_has_its_loss_on_forty_stories(stories, test_data, tmp_path):
    checkpoint.write(stories, tmp_path / "a")
    model, tok, nats, n = Model.load(tmp_path / "a"), stories.tokenizer, 0.0, 0
    text = (test_data / "text" / "tinystories_2MB.txt").read_text(encoding="utf-8")
    for story in text.split("<|endoftext|>")[1:41]:
        ids = np.array([tok.encode_prompt(story.strip())], np.int32)[:, :512]
        logprobs = model.forward(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]))
        nats, n = nats - logprobs.sum(dtype=np.float64), n + logprobs.size
    assert n == 12_532
    assert nats / n == pytest.approx(1.2459, abs=0.0001)


def test_presets_are_the_models_that_they_name(stories):
    """Sizes as published: 260K; 15M; 1.24, 3.21 and 8.03 billion."""
    assert Config.preset("stories260k") == stories.config and stories.n_params == 260_032
    published = {
        "stories15m": 15_191_712,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "llama-3-8b": 8_030_261_248,
    }
    for name, n in published.items():
        config = Config.preset(name)
        assert sum(np.prod(shape) for shape in _core.model_tensors(config).values()) == n
        scaling = config.rope_scaling
        assert (scaling is not None) == name.startswith("llama-3.2")
        assert scaling is None or (scaling["factor"], scaling["original_max_position_embeddings"]) == (32.0, 8192)


def test_stories260k_comes_back_from_every_form(stories, tmp_path):
    want = values_of(stories)
    checkpoint.write(stories, tmp_path / "a", files={"tokenizer.json": stories.tokenizer.to_json().encode()})
    gguf.write(stories, tmp_path / "a.gguf")
    gguf.write(checkpoint.Weights(tmp_path / "a"), tmp_path / "b.gguf")
    checkpoint.write(gguf.read(tmp_path / "b.gguf"), tmp_path / "b")
    for path in ("a", "a.gguf", "b.gguf"):
        source = open_source(tmp_path / path)
        assert source.config == stories.config and source.tokenizer.hash() == stories.tokenizer.hash()
        assert_all_same_bits(values_of(source), want)
    assert_all_same_bits(values_of(open_source(tmp_path / "b")), want)


# ---- round trips


@pytest.mark.parametrize("name", tiny_configs)
@pytest.mark.parametrize("kind", gguf.KINDS)
def test_gguf_holds_what_its_kind_can(name, kind, tmp_path):
    """Matrices are rounded once, vectors and positions never; F16 where rows are no whole blocks."""
    model = random_model(tiny_configs[name])
    if name in ("gpt2, erf, no bias, untied", "gpt2, grouped queries"):
        with pytest.raises(ValueError, match=r"llama\.cpp has GPT-2"):
            written(model, tmp_path / "a.gguf", kind)
        assert list(tmp_path.iterdir()) == []
        return
    source = written(model, tmp_path / "a.gguf", kind)
    assert source.config == model.config and source.tokenizer is None
    for param, p in model.params.items():
        rows = p.T if param.startswith("h.") and p.ndim == 2 else p  # GPT-2's, as GGUF has them
        used = "F32" if p.ndim == 1 or param == "wpe.weight" else kind
        used = "F16" if used == "Q8_0" and rows.shape[-1] % 32 else used
        want = to_float32(from_float32(np.ascontiguousarray(rows), used), used)
        got = np.concatenate(list(source.rows(param)))
        assert_same_bits(got.T if rows is not p else got, want, param)


@settings(deadline=None, max_examples=25)
@given(
    family=st.sampled_from([GPT2, LLAMA]),
    tied=st.booleans(),
    bias=st.booleans(),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3), (3, 3)]),
    head_size=st.sampled_from([2, 4, 6, 16]),
    n_layer=st.integers(1, 3),
    vocab_size=st.integers(2, 300),
    n_inner=st.integers(1, 70),
    part=st.integers(1, 500),
)
def test_any_model_comes_back_with_equal_bits(
    tmp_path_factory, family, tied, bias, heads, head_size, n_layer, vocab_size, n_inner, part
):
    config = family | dict(tied=tied, n_layer=n_layer, vocab_size=vocab_size, n_inner=n_inner)
    n_head, n_kv_head = heads if family is LLAMA else (heads[0], heads[0])
    config |= dict(n_head=n_head, n_kv_head=n_kv_head, n_embd=n_head * head_size)
    config |= dict(bias=bias) if family is LLAMA else {}
    model, folder = random_model(config), tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as m:
        m.setattr("barelm.convert.source.PART", part)
        source = written(model, folder / "a.gguf")
        assert source.config == model.config
        assert_all_same_bits(values_of(source), copies(model.params))
        checkpoint.write(source, folder / "b", shard_size=5000)
        assert_all_same_bits(copies(Model.load(folder / "b").params), copies(model.params))
    if family is LLAMA and not bias:
        write_llama2c(model, folder / "c.bin")
        source = open_source(folder / "c.bin")
        assert source.config == model.config
        assert_all_same_bits(values_of(source), copies(model.params))


@pytest.mark.parametrize("kind", llmc.VERSIONS)
@pytest.mark.parametrize("vocab_size", [1, 127, 128, 200])
def test_llmc_comes_back(kind, vocab_size, tmp_path):
    model = random_model(LLMC | dict(vocab_size=vocab_size, n_inner=64))
    llmc.write(Source.of_model(model), tmp_path / "a.bin", kind)
    source = open_source(tmp_path / "a.bin")
    want = {name: to_float32(from_float32(np.ascontiguousarray(p), kind), kind) for name, p in model.params.items()}
    assert source.config == model.config and source.kinds == {kind}
    assert_all_same_bits(values_of(source), want)


def test_llmc_is_laid_out_as_its_programs_read_it(tmp_path):
    """Every offset by hand, as train_gpt2.c takes its pointers: all layers of a kind together, rows [out, in]."""
    model = random_model(LLMC | dict(vocab_size=130))
    c, p = model.config, model.params
    llmc.write(Source.of_model(model), tmp_path / "a.bin")
    header = np.fromfile(tmp_path / "a.bin", np.int32, 256)
    assert header[:8].tolist() == [20240326, 3, c.context, 130, c.n_layer, 4, c.n_embd, 256] and not header[8:].any()
    data = np.fromfile(tmp_path / "a.bin", np.float32, offset=1024)
    C, L, wte = c.n_embd, c.n_layer, data[: 256 * c.n_embd].reshape(256, -1)
    assert_same_bits(wte[:130], p["wte.weight"])
    assert not wte[130:].any()
    at = 256 * C + c.context * C + 2 * L * C  # behind wpe, ln1w, ln1b
    qkvw = data[at : at + L * 3 * C * C].reshape(L, 3 * C, C)
    assert_same_bits(qkvw[1], p["h.1.attn.c_attn.weight"].T)
    fcprojb, lnf = L * C, 2 * C
    assert_same_bits(data[-lnf - fcprojb : -lnf].reshape(L, C)[1], p["h.1.mlp.c_proj.bias"])
    assert_same_bits(data[-C:], p["ln_f.bias"])


def test_gguf_is_laid_out_as_llama_cpp_reads_it(tmp_path):
    """By hand: GPT-2's linear layers [out, in], also the square ones; Llama's rotary pairs side by side."""
    gpt2, llama = random_model(GPT2), random_model(LLAMA | dict(bias=True))
    for model, path in ((gpt2, "gpt2"), (llama, "llama")):
        gguf.write(Source.of_model(model), tmp_path / path)

    def raw(path, name):
        stored = gguf_file.read(tmp_path / path).tensors[name]
        return stored.read(0, slice(0, stored.shape[0]))

    for ours, name in (("attn.c_attn", "attn_qkv"), ("attn.c_proj", "attn_output"), ("mlp.c_fc", "ffn_up")):
        assert_same_bits(raw("gpt2", f"blk.1.{name}.weight"), gpt2.params[f"h.1.{ours}.weight"].T)
    for kind in ("weight", "bias"):
        for ours, name, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
            p, got = llama.params[f"layers.1.self_attn.{ours}.{kind}"], raw("llama", f"blk.1.{name}.{kind}")
            for head in range(heads):
                for j in range(2):
                    for half in (0, 1):
                        assert_same_bits(got[head * 4 + 2 * j + half], p[head * 4 + half * 2 + j])
        assert_same_bits(raw("llama", f"blk.1.attn_v.{kind}"), llama.params[f"layers.1.self_attn.v_proj.{kind}"])


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("part", [1, 50, 999, 10**6])
def test_gguf_in_any_parts_along_any_axis(kind, part, tmp_path, monkeypatch):
    config = LLAMA | dict(n_embd=64, n_inner=96, n_head=4, n_layer=1, vocab_size=33)
    for family in (config, GPT2 | dict(n_embd=32, n_inner=64, n_layer=1)):
        source = written(random_model(family), tmp_path / "a.gguf", kind)
        whole = values_of(source)
        with monkeypatch.context() as m:
            m.setattr("barelm.convert.source.PART", part)
            for name, values in whole.items():
                for axis in range(values.ndim):
                    assert_same_bits(np.concatenate(list(source.rows(name, axis)), axis), values, name)


def test_rows_of_rotary_pairs():
    order = half_split(2, 6)
    assert order.tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert interleaved(2, 6)[order].tolist() == list(range(12))


# ---- Llama-3's stretched rotation


@pytest.mark.parametrize("own", [True, False])
def test_a_stretched_rotation_comes_back(own, tmp_path):
    """Others write the divisors alone, and Llama-3's numbers are known to belong to them."""
    scaling = SCALING if own else SCALING | dict(factor=32.0, original_max_position_embeddings=8192)
    config = LLAMA | dict(head_size=64, rope_theta=500000.0, rope_scaling=scaling)
    model = random_model(config)
    source = written(model, tmp_path / "a.gguf")
    if not own:
        data = rewritten_gguf(tmp_path / "a.gguf", {key: None for key in source_keys(tmp_path / "a.gguf")})
        (tmp_path / "a.gguf").write_bytes(data)
        source = gguf.read(tmp_path / "a.gguf")
    assert source.config == model.config
    assert_all_same_bits(values_of(source), copies(model.params))


def source_keys(path):
    return [key for key in gguf_file.read(path).values if key.startswith("barelm.")]


def test_a_head_that_is_the_embedding_once_more(tmp_path):
    """So llama.cpp's converter wrote GPT-2 until 2024: it is tied all the same."""
    model = random_model(GPT2)
    written(model, tmp_path / "a.gguf")
    head = np.array(model.params["wte.weight"])
    for last, tied in ((0, True), (1, False)):
        head[-1, -1] += last
        (tmp_path / "b.gguf").write_bytes(rewritten_gguf(tmp_path / "a.gguf", tensors={"output.weight": head}))
        source = gguf.read(tmp_path / "b.gguf")
        assert source.config.tied == tied and ("lm_head.weight" in source.shapes) != tied
        want = copies(model.params) | ({} if tied else {"lm_head.weight": head})
        assert_all_same_bits(values_of(source), want)


def test_divisors_that_are_not_llama3s(tmp_path):
    model = random_model(LLAMA | dict(head_size=64, rope_theta=500000.0))
    written(model, tmp_path / "a.gguf")
    for divisors, good in (([1.0] * 32, True), ([2.0] * 32, False), ([1.0] * 31, False), ([np.nan] * 32, False)):
        data = rewritten_gguf(tmp_path / "a.gguf", tensors={"rope_freqs.weight": np.array(divisors, np.float32)})
        (tmp_path / "b.gguf").write_bytes(data)
        if good:
            assert gguf.read(tmp_path / "b.gguf").config == model.config
        else:
            with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
                gguf.read(tmp_path / "b.gguf")


# ---- vocabularies


def vectors(test_data, name):
    texts = (test_data / "tok" / f"{name}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (test_data / "tok" / f"{name}.gguf.out").read_text().split("\n")
    return texts, [[int(id) for id in line.split()] for line in lines[: len(texts)]]


def test_gpt2s_vocabulary_out_of_a_gguf_file(test_data):
    tok = Tokenizer.load(test_data / "tok" / "ggml-vocab-gpt-2.gguf")
    texts, want = vectors(test_data, "ggml-vocab-gpt-2")
    assert len(texts) == 47 and [tok.encode(text) for text in texts] == want
    assert tok.hash() == load_gpt2(test_data / "tok" / "gpt2_vocab.bpe", test_data / "tok" / "gpt2_encoder.json").hash()
    with pytest.raises(CheckpointError, match="holds a vocabulary, but no tensors"):
        open_source(test_data / "tok" / "ggml-vocab-gpt-2.gguf")


@pytest.mark.slow
def test_llama3s_vocabulary_through_gguf(test_data, tmp_path):
    tok = load_llama3(test_data / "tok" / "llama3_tokenizer.model")
    model = Model(Config.preset("llama-3.2-1b", n_layer=1, n_embd=8, n_head=2, n_kv_head=1, n_inner=4, context=8))
    again = written(model, tmp_path / "a.gguf", tok=tok).tokenizer
    texts, want = vectors(test_data, "ggml-vocab-llama-bpe")
    assert len(texts) == 47 and [again.encode(text) for text in texts] == want
    assert again.hash() == tok.hash() and again.bos == 128_000 and again.adds_bos


TOKENIZERS = {
    "bytes": Tokenizer.bytes(),
    "trained: gpt2": Tokenizer.train(["hello low lower lowest " * 20], 280, "gpt2"),
    "trained: gpt4": Tokenizer.train(["hello low lower lowest " * 20], 280, "gpt4", ["<|endoftext|>", "<|a|>"]),
    "with bos": Tokenizer({bytes([b]): b for b in range(256)}, [], {"<|endoftext|>": 256, "<|a|>": 257}, bos=257),
    "SentencePiece": small_pieces(),
    "SentencePiece, no bos": small_pieces(adds_bos=False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("more", [0, 5])
def test_a_vocabulary_comes_back_from_gguf(name, more, tmp_path):
    """Ids of the model that no token has are there as unused ones."""
    tok = TOKENIZERS[name]
    model = Model(Config(**GPT2 | dict(vocab_size=tok.n_vocab + more)))
    again = written(model, tmp_path / "a.gguf", tok=tok).tokenizer
    assert again.hash() == tok.hash() and again.eot == tok.eot and type(again) is type(tok)
    assert (again.bos, again.adds_bos) == (tok.bos, tok.adds_bos)
    text = "hello lowest ab é \n 東"
    assert again.encode_prompt(text) == tok.encode_prompt(text)


@pytest.mark.parametrize(
    ("name", "values", "bos"),
    [
        ("bytes", {"add_bos_token": None}, None),
        ("bytes", {"add_bos_token": True}, 256),
        ("with bos", {"add_bos_token": None}, None),
        ("with bos", {"add_bos_token": None, "pre": "llama-bpe"}, 257),  # what llama.cpp does with Llama-3's pattern
        ("with bos", {"bos_token_id": 256}, 256),
        ("SentencePiece", {"add_bos_token": None}, 1),
        ("SentencePiece", {"add_bos_token": None, "bos_token_id": None}, 1),
        ("SentencePiece", {"bos_token_id": 2}, 2),
        ("SentencePiece", {"add_bos_token": False}, None),
    ],
)
def test_what_a_gguf_file_says_of_bos(name, values, bos, tmp_path):
    tok = TOKENIZERS[name]
    written(Model(Config(**GPT2 | dict(vocab_size=tok.n_vocab))), tmp_path / "a.gguf", tok=tok)
    values = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    (tmp_path / "b.gguf").write_bytes(rewritten_gguf(tmp_path / "a.gguf", values))
    got = Tokenizer.load(tmp_path / "b.gguf")
    assert (got.adds_bos, got.bos) == ((True, bos) if bos else (False, 1 if "Piece" in name else tok.eot))


def test_a_vocabulary_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="its ids go up to 256, the model's vocabulary has 37"):
        written(Model(Config(**GPT2)), tmp_path / "a.gguf", tok=Tokenizer.bytes())
    odd = Tokenizer({bytes([b]): b for b in range(256)}, [], {"<|endoftext|>": 256}, pattern=r"(?s).")
    with pytest.raises(ValueError, match="knows no such split pattern"):
        written(Model(Config(**GPT2 | dict(vocab_size=257))), tmp_path / "a.gguf", tok=odd)


def test_llama2cs_tokenizer_as_we_write_it_in_tests(tmp_path):
    write_llama2c_tokenizer(small_pieces(), tmp_path / "tok.bin")
    assert Tokenizer.load(tmp_path / "tok.bin").hash() == small_pieces().hash()


# ---- files that are not what they say


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A GGUF file, bytes and path."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    gguf.write(Source.of_model(random_model(LLAMA | dict(vocab_size=300)), small_pieces()), path)
    return path


def refused(path, data, says):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + ".*" + says):
        open_source(path).tokenizer  # noqa: B018 (it is read when it is asked for)


HEADERS = {
    "version 1": (b"GGUF" + struct.pack("<III", 1, 0, 0), "is GGUF version 1, must be 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    "cut off": (b"GGUF\3\0", "header: 4 bytes are wanted"),
    "many values": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "value 0: 8 bytes are wanted"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "tensors: there would be 9,223"),
    "a long key": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40), "its name would have 1,099"),
    "an odd type": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 13), "k: has type 13"),
    "nested arrays": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1),
        "k: is an array of type 9, must be of numbers or strings",
    ),
    "a long array": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**62),
        "k: there would be 4,611",
    ),
    "a long text": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IQ", 8, 2**63), "k: 9,223"),
    "nothing": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture is missing"),
    "a key twice": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 7, 1)),
        "k: comes twice",
    ),
    "ak42": (struct.pack("<Ii", 0x616B3432, 1) + bytes(300), "is llama2.c's version 1; only version 0 is read"),
    "llm.c's old version": (struct.pack("<256i", 20240326, 1, *[1] * 254), "is llm.c's version 1, must be one of 3, 5"),
    "llm.c, sizes": (struct.pack("<256i", 20240326, 3, 8, 4, 1, 1, 4, 128, *[0] * 248), "has 1,024 bytes, its header"),
    "llm.c, rows": (
        struct.pack("<256i", 20240326, 3, 8, 40, 1, 1, 4, 10, *[0] * 248),
        "10 rows for a vocab",
    ),
    "llm.c, heads": (struct.pack("<256i", 20240326, 3, 8, 4, 1, 3, 4, 128, *[0] * 248), "header: n_embd: is 4, must"),
    "pickled": (b"PK\3\4" + bytes(99), "is pickled"),
    "safetensors alone": (struct.pack("<Q", 2) + b"{}", "name its folder"),
    "a text": (b"hello, this is a text and no model", "is no model that is known"),
    "empty": (b"", "is no model that is known"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_not_true(name, tmp_path):
    refused(tmp_path / "model", *HEADERS[name])


def test_strings_lie_across_the_blocks_that_are_read(tmp_path):
    path = tmp_path / "x.gguf"
    texts = ["é" * n for n in (0, 1, 70_000, 3)] + ["x" * (i % 97) for i in range(5000)] + ["y" * (1 << 16), "", "z"]
    with open(path, "wb") as file:
        gguf_file.write(file, {"texts": texts, "behind them": 7}, [])
    values = gguf_file.read(path).values
    assert values["texts"].strings() == texts and values["behind them"] == 7
    for n in (100, 1 << 16, 1 << 18):
        path.write_bytes(path.read_bytes()[:-n])
        with pytest.raises(CheckpointError, match=r"x\.gguf: texts: .* bytes are wanted at byte"):
            gguf_file.read(path)
        with pytest.raises(CheckpointError, match=r"x\.gguf: texts: .* bytes are wanted at byte"):
            values["texts"].strings()


VALUES = [
    ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2', must be 'gpt2' or 'llama'"),
    ({"general.architecture": 3}, "general.architecture: is 3, must be a str"),
    ({"llama.block_count": None}, "llama.block_count is missing"),
    ({"llama.block_count": 10**9}, "lacks most of the 1,000,000,000 layers"),
    ({"llama.block_count": 3}, r"lacks layers\.2"),
    ({"llama.block_count": 1}, r"has blk\.1\.[a-z_]+\.weight, which the model of its header has not"),
    ({"llama.embedding_length": 32}, "has shape"),
    ({"llama.embedding_length": True}, "embedding_length: is True, must be a int"),
    ({"llama.attention.head_count": 3}, "n_head|n_embd|n_kv_head"),
    ({"llama.attention.head_count": 0}, "n_head"),
    ({"llama.attention.head_count_kv": 0}, "n_kv_head"),
    ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "norm_eps"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "norm_eps"),
    ({"llama.attention.value_length": 2}, "value_length is 2, must be the head's 4"),
    (
        {"llama.attention.key_length": 2**24, "llama.attention.value_length": 2**24}
        | {"llama.rope.dimension_count": 2**24},
        r"blk\.0\.attn_q\.weight has shape \(16, 16\)",
    ),
    ({"llama.rope.dimension_count": 2}, "dimension_count is 2, must be the head's 4"),
    ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn', must be 'none'"),
    ({"llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.factor is 2.0: not supported"),
    ({"llama.expert_count": 8}, "llama.expert_count is 8: not supported"),
    ({"split.count": 2}, "is one of several files"),
    ({"general.alignment": 3}, "general.alignment: is 3, must be a power of two"),
    ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert', must be 'gpt2' or 'llama'"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is 'not said', must be one of"),
    ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    ({"tokenizer.ggml.tokens": ["a"]}, "token_type has 300 entries, tokens has 1"),
    ({"tokenizer.ggml.scores": np.zeros(2, np.float32)}, "scores has 2 entries, tokens has 300"),
    ({"tokenizer.ggml.scores": ["a"] * 300}, "scores: numbers are expected"),
    ({"tokenizer.ggml.tokens": np.zeros(300, np.int32)}, "tokens: strings are expected"),
    ({"tokenizer.ggml.token_type": np.full(300, 7, np.int32)}, "7 is no kind of piece|the byte"),
    ({"tokenizer.ggml.bos_token_id": 299}, "no token that begins a text"),
    ({"tokenizer.ggml.bos_token_id": "1"}, "tokenizer.ggml.bos_token_id: is '1', must be a int"),
    ({"tokenizer.ggml.add_bos_token": 1}, "tokenizer.ggml.add_bos_token: is 1, must be a bool"),
]


@pytest.mark.parametrize(("values", "says"), VALUES, ids=lambda v: str(v)[:40])
def test_a_value_that_is_not_true(values, says, small, tmp_path):
    refused(tmp_path / "a.gguf", rewritten_gguf(small, values), says)


def test_a_tensor_that_is_not_true(small, tmp_path):
    extra = rewritten_gguf(small, tensors={"blk.0.attn_q_norm.weight": np.ones(4, np.float32)})
    refused(tmp_path / "a.gguf", extra, r"has blk\.0\.attn_q_norm\.weight, which the model of its header has not")
    data, name = small.read_bytes(), b"blk.0.attn_q.weight"
    at = data.index(name) + len(name)
    for change, says in (
        ({0: struct.pack("<I", 0)}, "has 0 dimensions, must have 1 to 4"),
        ({0: struct.pack("<I", 9)}, "has 9 dimensions"),
        ({4: struct.pack("<Q", 2**60)}, "is not within the file's"),
        ({4: struct.pack("<Q", 0)}, "is not within the file's"),
        ({4: struct.pack("<Q", 15)}, "has shape \\(16, 15\\), its header says \\(16, 16\\)"),
        ({20: struct.pack("<I", 12)}, "has type Q4_K, must be one of F32, F16"),
        ({20: struct.pack("<I", 99)}, "has type number 99"),
        ({20: struct.pack("<I", 8)}, "rows of 16 values are no whole units of Q8_0"),
        ({24: struct.pack("<Q", 2**63)}, "is not within the file's"),
        ({-19: b"blk.0.attn_k.weight"}, "comes twice"),
    ):
        changed = bytearray(data)
        for offset, new in change.items():
            changed[at + offset : at + offset + len(new)] = new
        refused(tmp_path / "a.gguf", changed, says)


def test_any_cut_of_any_file_is_refused(small, tmp_path):
    write_llama2c(random_model(LLAMA), tmp_path / "b")
    llmc.write(Source.of_model(random_model(LLMC | dict(n_inner=64))), tmp_path / "c")
    for path in (small, tmp_path / "b", tmp_path / "c"):
        data = path.read_bytes()
        for n in [*range(0, 80, 7), *range(0, len(data) - 32, len(data) // 50), len(data) - 33]:
            refused(tmp_path / "x", data[:n], "")
        if path != small:  # a GGUF file may have anything behind its tensors
            refused(tmp_path / "x", data + b"\0", "")


def test_llama2c_needs_its_exact_size(tmp_path):
    numbers = [16, 40, 2, 4, 2, 37, 24]
    for i in range(7):
        for value in (0, -1, -(2**31), 2**31 - 1):
            changed = [*numbers]
            changed[i] = value
            (tmp_path / "x").write_bytes(struct.pack("<7i", *changed) + bytes(400))
            assert not llama2c.is_model(tmp_path / "x")
            with pytest.raises(CheckpointError, match=r"x: "):
                llama2c.read(tmp_path / "x")


def test_a_file_that_becomes_shorter_while_it_is_read(small, tmp_path):
    (tmp_path / "a.gguf").write_bytes(small.read_bytes())
    source = gguf.read(tmp_path / "a.gguf")
    os.truncate(tmp_path / "a.gguf", 5000)
    with pytest.raises(CheckpointError, match=r"a\.gguf: cannot be read"):
        values_of(source)
    (tmp_path / "a.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"a\.gguf: cannot be read"):
        values_of(source)


# ---- files that appear whole or not at all


def test_a_failing_export_leaves_what_was_there(tmp_path):
    model = random_model(LLAMA)
    gguf.write(Source.of_model(model), tmp_path / "a.gguf")
    before = (tmp_path / "a.gguf").read_bytes()
    model.params["layers.1.mlp.up_proj.weight"][0, 0] = 1e9
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight: 1e\+09 is too large for F16"):
        gguf.write(Source.of_model(model), tmp_path / "a.gguf", "F16")
    assert (tmp_path / "a.gguf").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "a").write_text("mine")
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(FileExistsError, match="exists and is no GGUF file"):
            gguf.write(Source.of_model(random_model(LLAMA)), path)
        with pytest.raises(FileExistsError, match=r"exists and is no checkpoint of llm\.c"):
            llmc.write(Source.of_model(random_model(LLMC | dict(n_inner=64))), path)
    assert (tmp_path / "a").read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "deep" / "a"
    for text in (b"one", b"two"):
        with whole_file(path, lambda path: True, "thing") as file:
            file.write(text)
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == text
    with pytest.raises(KeyboardInterrupt), whole_file(path, lambda path: True, "thing") as file:
        file.write(b"three")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"two" and [p.name for p in path.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("field", [dict(act="gelu_erf"), dict(tied=False), dict(n_inner=33), dict(norm_eps=1e-6)])
def test_llmc_refuses_what_it_does_not_compute(field, tmp_path):
    with pytest.raises(ValueError, match=f"llm.c has GPT-2 only: {next(iter(field))} is"):
        llmc.write(Source.of_model(random_model(LLMC | dict(n_inner=64) | field)), tmp_path / "a")


def test_kinds_that_a_form_has_not(tmp_path):
    source = Source.of_model(random_model(LLMC | dict(n_inner=64)))
    with pytest.raises(ValueError, match="kind: is 'Q4_K', must be one of F32, F16, Q8_0, BF16"):
        gguf.write(source, tmp_path / "a", "Q4_K")
    with pytest.raises(ValueError, match="kind: is 'F16', must be one of F32, BF16"):
        llmc.write(source, tmp_path / "a", "F16")


# ---- memory

CONVERTING = """
import sys
from pathlib import Path
from barelm import checkpoint
from barelm.convert import gguf
from barelm.convert.recognise import open_source
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
folder = Path(sys.argv[1])
before = peak()
gguf.write(open_source(folder / "a"), folder / "a.gguf", "BF16")
checkpoint.write(open_source(folder / "a.gguf"), folder / "b", "F32", 50_000_000)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_converting_takes_little_more_than_a_tensor(tmp_path):
    """170 MB of weights, 80 MB the largest: what is mapped, and a few parts."""
    Model(Config(n_layer=4, n_embd=1024, n_head=8, vocab_size=20000, context=64)).save(tmp_path / "a")
    command = [sys.executable, "-c", CONVERTING, str(tmp_path)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak < 80e6
