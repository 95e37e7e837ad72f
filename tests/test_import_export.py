"""`barelm import` and `barelm export`: what they say, what they write, what they leave alone; other commands on what
was imported."""

import json

import numpy as np
import pytest
from barelm import Model, Tokenizer, checkpoint
from barelm.__main__ import main
from barelm.convert import gguf
from barelm.convert.recognise import open_source
from barelm.convert.source import Source
from conftest import GPT2, LLAMA
from formats import small_pieces, write_llama2c, write_llama2c_tokenizer
from models import assert_all_same_bits, copies, random_model

TOK = small_pieces()
CONFIG = LLAMA | dict(vocab_size=TOK.n_vocab, context=32)


@pytest.fixture
def model():
    return random_model(CONFIG)


@pytest.fixture
def imported(model, tmp_path):
    """A checkpoint, from llama2.c's files."""
    write_llama2c(model, tmp_path / "model.bin")
    write_llama2c_tokenizer(TOK, tmp_path / "tok.bin")
    assert run("import", tmp_path / "model.bin", tmp_path / "a", "--tokenizer", tmp_path / "tok.bin") == 0
    return tmp_path / "a"


def run(*argv):
    return main([str(word) for word in argv])


def test_what_is_said(imported, tmp_path, capsys):
    capsys.readouterr()
    assert run("import", imported, tmp_path / "b", "--dtype", "bf16") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "found     a checkpoint folder, F32"
    assert out[1].startswith("model     llama, 14 k parameters: ") and out[1].endswith(
        f"2 layers, 4 heads (2 of keys and values), 16 channels, {TOK.n_vocab} tokens, context 32"
    )
    assert out[2] == f"tokenizer SentencePiece, {TOK.n_vocab} tokens"
    assert out[3].startswith(f"written   {tmp_path / 'b'}, bf16, in 0:0") and len(out) == 4
    assert run("export", tmp_path / "b", tmp_path / "c.gguf", "--format", "gguf", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokenizer"] == {"kind": "SentencePiece", "n_vocab": TOK.n_vocab, "sha256": TOK.hash()}
    assert (said["format"], said["architecture"], said["stored"]) == ("a checkpoint folder", "llama", ["BF16"])
    assert (said["out"], said["dtype"], said["sizes"]["n_kv_head"]) == (str(tmp_path / "c.gguf"), "f32", 2)
    assert said["parameters"] == Model.load(imported).n_params


def test_there_and_back_is_the_same_to_the_byte(imported, model, tmp_path):
    assert_all_same_bits(copies(Model.load(imported).params), copies(model.params))
    run("export", imported, tmp_path / "b.gguf", "--format", "gguf")
    run("import", tmp_path / "b.gguf", tmp_path / "b")
    run("export", imported, tmp_path / "c", "--shard-size", "0.00001")
    assert len(list((tmp_path / "c").glob("model-*.safetensors"))) > 3
    run("import", tmp_path / "c", tmp_path / "d")
    for other in ("b", "d"):
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (tmp_path / other / name).read_bytes() == (imported / name).read_bytes(), (other, name)
    assert checkpoint.verify(tmp_path / "d")["step"] == 0


def test_gpt2_through_llmc(tmp_path):
    model = random_model(GPT2 | dict(vocab_size=257))
    files = {"tokenizer.json": Tokenizer.bytes().to_json().encode()}
    checkpoint.save(model, tmp_path / "a", files=files)
    run("export", tmp_path / "a", tmp_path / "b.bin", "--format", "llm.c")
    run("import", tmp_path / "b.bin", tmp_path / "c", "--tokenizer", tmp_path / "a" / "tokenizer.json")
    assert_all_same_bits(copies(Model.load(tmp_path / "c").params), copies(model.params))
    assert Tokenizer.load(tmp_path / "c").hash() == Tokenizer.bytes().hash()


def test_other_commands_take_what_was_imported(imported, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("ab a b é\n" * 300)
    assert run("sample", "--checkpoint", imported, "--prompt", "ab", "--max-tokens", 9, "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "ab"
    assert run("eval", "--checkpoint", imported, "--data", tmp_path / "text.txt", "--json") == 0
    assert json.loads(capsys.readouterr().out)["all"]["tokens"] > 300
    assert run("tokenizer", "encode", "--tokenizer", imported, "--text", "ab a") == 0
    assert capsys.readouterr().out.split() == [str(id) for id in TOK.encode("ab a")]
    sizes = ["--n-layer", 1, "--n-head", 2, "--n-embd", 8, "--context", 8, "--batch", 2, "--steps", 2]
    data = ["--data", tmp_path / "text.txt", "--tokenizer", imported, "--out", tmp_path / "run"]
    assert run("train", *data, *sizes, "--no-tensorboard") == 0
    assert Tokenizer.load(tmp_path / "run" / "step_2").hash() == TOK.hash()
    assert run("train", "--resume", "--out", tmp_path / "run", "--steps", 3, "--no-tensorboard") == 0
    assert run("export", tmp_path / "run", tmp_path / "run.gguf", "--format", "gguf") == 0
    source = open_source(tmp_path / "run.gguf")
    assert_all_same_bits(
        {name: np.concatenate(list(source.rows(name))) for name in source.shapes},
        copies(Model.load(tmp_path / "run" / "step_3").params),
    )


def test_a_tokenizer_may_be_left_out_or_another(imported, tmp_path, capsys):
    assert run("import", imported, tmp_path / "b", "--tokenizer", "none") == 0
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    assert "tokenizer none" in capsys.readouterr().out
    (imported / "state.json").unlink()
    (imported / "tokenizer.json").write_text("{}")
    assert run("import", imported, tmp_path / "b") == 2
    assert "model: only a BPE model can be read; --tokenizer names another, or none" in capsys.readouterr().err
    assert run("import", imported, tmp_path / "b", "--tokenizer", tmp_path / "tok.bin") == 0
    assert Tokenizer.load(tmp_path / "b").hash() == TOK.hash()


MISTAKES = [
    (["import"], "SOURCE must be given; barelm import --help lists the flags"),
    (["import", "A"], "FOLDER must be given; barelm import --help lists the flags"),
    (["import", "A", "B", "C"], "'C' stands alone: every value follows its flag"),
    (["import", "A", "B", "--dtyp", "f16"], "unknown flag '--dtyp', did you mean '--dtype'?"),
    (["import", "A", "B", "--dtype", "q8_0"], "--dtype: invalid choice: 'q8_0'"),
    (["imprt", "A", "B"], "unknown command 'imprt', did you mean 'import'?"),
    (["import", "nowhere", "B"], "nowhere: is not there"),
    (["import", "TEXT", "B"], "text.txt: is no model that is known"),
    (["import", "A", "TEXT"], "text.txt: exists and is no checkpoint"),
    (["import", "A", "FULL"], "full: exists and is no checkpoint"),
    (["import", "A", "B", "--tokenizer", "nowhere"], "nowhere: no such file"),
    (["import", "A", "B", "--tokenizer", "LARGE"], "tokenizer: its ids go up to 267, the model's vocabulary has 266"),
    (["import", "FULL", "B"], "full: is no checkpoint, config.json is missing"),
    (["export", "A", "B", "--format", "ggml"], "--format: invalid choice: 'ggml'"),
    (["export", "A", "B", "--dtype", "q8_0"], "--dtype: hf has no q8_0, but f32, f16, bf16"),
    (["export", "A", "B", "--format", "llm.c", "--dtype", "f16"], "--dtype: llm.c has no f16, but f32, bf16"),
    (["export", "A", "B", "--format", "llm.c"], "llm.c has GPT-2 only: n_kv_head is 2, must be 4"),
    (["export", "A", "B", "--shard-size", "0"], "--shard-size: must be above 0"),
    (["export", "A", "A"], "a: cannot be written over itself"),
    (["import", "A", "A"], "a: cannot be written over itself"),
    (["export", "A", "TEXT", "--format", "gguf"], "text.txt: exists and is no GGUF file"),
    (["export", "FULL", "B"], "full: is no checkpoint, config.json is missing"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else None)
def test_mistakes_are_one_line_and_change_nothing(words, says, imported, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    Tokenizer.train(["abcdefgh" * 9], 320, min_count=1).save(tmp_path / "large")
    names = dict(A=imported, B=tmp_path / "b", TEXT=tmp_path / "text.txt", FULL=tmp_path / "full")
    names["LARGE"] = tmp_path / "large"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(*(names.get(word, word) for word in words)) == 2
    said = capsys.readouterr().err.splitlines()
    assert says in said[-1] and said[-1].startswith("barelm: ")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_help_names_the_words_and_the_flags(capsys):
    assert run("export", "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: barelm export FOLDER TARGET [--flag value ...]")
    assert "--shard-size" in out and "{hf,gguf,llm.c}" in out and "TARGET " in out


def test_a_value_too_large_for_the_dtype(imported, tmp_path, capsys):
    model = Model.load(imported)
    model.params["norm.weight"][3] = 1e6
    model.save(tmp_path / "large")
    assert run("export", tmp_path / "large", tmp_path / "b", "--dtype", "f16") == 2
    assert "norm.weight: 1e+06 is too large for F16" in capsys.readouterr().err and not (tmp_path / "b").exists()
    gguf.write(Source.of_model(model), tmp_path / "b.gguf", "F16")  # where vectors are F32
