"""Where a text ends: what a model's files say of it, and that it goes with the model wherever that goes."""

import json
import shutil

import numpy as np
import pytest
from barelm import Config, Model, Tokenizer, checkpoint, generate
from barelm.__main__ import main
from barelm.convert import generation, gguf, gguf_file
from barelm.convert.recognise import open_source
from barelm.convert.source import CheckpointError, Source
from formats import rewritten_gguf, small_pieces

NAMES = ["<|endoftext|>", "<|begin_of_text|>", "<|eom_id|>", "<|eot_id|>"]
EOT, BEGIN, EOM, TURN = range(256, 260)


def vocabulary():
    tok = Tokenizer({bytes([b]): b for b in range(256)}, [], dict(zip(NAMES, range(256, 260), strict=True)), bos=BEGIN)
    tok.end_at([TURN, EOM])
    return tok


def a_model(tok):
    return Model(Config(n_layer=1, n_head=1, n_embd=4, vocab_size=tok.n_vocab, context=16), seed=1)


def checkpoint_of(tok, folder):
    checkpoint.write(Source.of_model(a_model(tok)), folder, files=generation.files_of(tok))
    return folder


def said(folder, name, **values):
    folder.mkdir(exist_ok=True)
    vocabulary().save(folder)
    (folder / name).write_text(json.dumps(values))
    return folder


def test_ends_are_added_to_those_of_the_vocabulary():
    tok = vocabulary()
    assert tok.ends == {EOT, BEGIN, TURN, EOM} and tok.eot == EOT


@pytest.mark.parametrize("tok", [vocabulary(), Tokenizer.bytes(), small_pieces()], ids=["turns", "bytes", "pieces"])
def test_ends_go_through_a_folder_and_gguf(tok, tmp_path):
    source = open_source(checkpoint_of(tok, tmp_path / "a"))
    assert source.tokenizer.ends == tok.ends and source.tokenizer.hash() == tok.hash()
    gguf.write(source, tmp_path / "a.gguf")
    assert open_source(tmp_path / "a.gguf").tokenizer.ends == tok.ends


def test_what_llama_cpp_is_told(tmp_path):
    gguf.write(Source.of_model(a_model(vocabulary()), vocabulary()), tmp_path / "a.gguf")
    values = gguf_file.read(tmp_path / "a.gguf").values
    told = {name: values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    assert told == dict(bos=BEGIN, eos=EOT, eot=TURN, eom=EOM)


def test_commands_keep_them(tmp_path, capsys):
    tok = vocabulary()
    start = checkpoint_of(tok, tmp_path / "a")
    (tmp_path / "text.txt").write_text("some text to learn from " * 20)
    out = tmp_path / "run"
    assert main(["export", str(start), str(tmp_path / "a.gguf"), "--format", "gguf"]) == 0
    assert main(["import", str(tmp_path / "a.gguf"), str(tmp_path / "b")]) == 0
    train = ["train", "--init", str(tmp_path / "b"), "--data", str(tmp_path / "text.txt"), "--out", str(out)]
    assert main([*train, "--steps", "1", "--context", "8", "--batch", "2"]) == 0
    assert main(["train", "--resume", "--out", str(out), "--steps", "2"]) == 0
    assert main(["export", str(out / "step_2"), str(tmp_path / "c")]) == 0
    for folder in (tmp_path / "b", out / "step_1", out / "step_2", tmp_path / "c"):
        assert Tokenizer.load(folder).ends == tok.ends


@pytest.mark.parametrize("named", [["--init"], ["--depth", "1", "--tokenizer"]], ids=["init", "tokenizer"])
def test_a_run_that_begins_again_keeps_them(named, tmp_path):
    """It died before its first checkpoint, and the shards that it wrote say nothing of them."""
    start, out = checkpoint_of(vocabulary(), tmp_path / "a"), tmp_path / "run"
    (tmp_path / "text.txt").write_text("some text to learn from " * 20)
    train = ["train", *named, str(start), "--data", str(tmp_path / "text.txt"), "--out", str(out)]
    assert main([*train, "--steps", "1", "--context", "8", "--batch", "2"]) == 0
    shutil.rmtree(out / "step_1")
    if named != ["--init"]:
        shutil.rmtree(start)
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert Tokenizer.load(out / "step_1").ends == vocabulary().ends


@pytest.mark.parametrize("end", [TURN, [TURN], [7, 10**20, TURN]], ids=str)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_what_others_say(name, end, tmp_path):
    """7 is a byte, and no end, whoever says so: transformers' Llama ends at 2 until another is named."""
    tok = Tokenizer.load(said(tmp_path, name, eos_token_id=end, bos_token_id=0))
    assert tok.ends == {EOT, BEGIN, TURN} and tok.eot == EOT


def test_generation_config_is_the_one_that_counts(tmp_path):
    said(tmp_path, "config.json", eos_token_id=EOM)
    assert Tokenizer.load(tmp_path).ends == {EOT, BEGIN, EOM}
    said(tmp_path, "generation_config.json", eos_token_id=TURN)
    assert Tokenizer.load(tmp_path).ends == {EOT, BEGIN, TURN}
    said(tmp_path, "generation_config.json", temperature=0.6)
    assert Tokenizer.load(tmp_path).ends == {EOT, BEGIN, EOM}


@pytest.mark.parametrize(
    "wrong", ["</s>", 2.0, True, -1, [[3]], {}, [TURN, None], [3] * 2000], ids=lambda v: str(v)[:20]
)
def test_an_end_that_is_none_is_named(wrong, tmp_path):
    said(tmp_path, "generation_config.json", eos_token_id=wrong)
    with pytest.raises(
        ValueError, match=r"generation_config\.json: eos_token_id: is .*, must be a token's id"
    ) as error:
        Tokenizer.load(tmp_path)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ({"eos_token_id": TURN, "eot_token_id": None, "eom_token_id": None}, {EOT, BEGIN, TURN}),
        ({"eos_token_id": None, "eot_token_id": None, "eom_token_id": None}, {EOT, BEGIN}),
        ({"eos_token_id": 7, "eot_token_id": 100_000}, {EOT, BEGIN, EOM}),
    ],
    ids=str,
)
def test_what_a_gguf_file_says(values, ends, tmp_path):
    gguf.write(Source.of_model(a_model(vocabulary()), vocabulary()), tmp_path / "a.gguf")
    values = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    (tmp_path / "b.gguf").write_bytes(rewritten_gguf(tmp_path / "a.gguf", values))
    assert Tokenizer.load(tmp_path / "b.gguf").ends == ends


def test_an_end_of_gguf_that_is_no_number(tmp_path):
    gguf.write(Source.of_model(a_model(vocabulary()), vocabulary()), tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(rewritten_gguf(tmp_path / "a.gguf", {"tokenizer.ggml.eos_token_id": "2"}))
    with pytest.raises(CheckpointError, match="eos_token_id: is '2', must be a int"):
        Tokenizer.load(tmp_path / "b.gguf")


def writes_only(model, id):
    """The weights of the last norm are 0, so that every hidden state is its bias: this token's embedding."""
    model.params["ln_f.weight"][:] = 0
    model.params["ln_f.bias"][:] = 100 * model.params["wte.weight"][id]
    model.params["wte.weight"][np.arange(model.config.vocab_size) != id] *= 0.1
    return model


def test_a_text_ends_there(tmp_path):
    model = writes_only(a_model(vocabulary()), TURN)
    checkpoint.write(Source.of_model(model), tmp_path / "a", files=generation.files_of(vocabulary()))
    told = Tokenizer.load(tmp_path / "a")
    untold = Tokenizer.load(tmp_path / "a" / "tokenizer.json")  # which does not say it
    assert list(generate(model, told, "ab", max_tokens=5, temperature=0)) == []
    assert "".join(generate(model, untold, "ab", max_tokens=5, temperature=0)) == NAMES[3] * 5
