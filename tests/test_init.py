"""`barelm train --init`: fine-tuning begins at the model that is there, stops and resumes as any run, and says by flag
what cannot be."""

import json
import shutil

import numpy as np
import pytest
from barelm import Config, Lora, Model, Tokenizer, checkpoint
from barelm import __main__ as command
from barelm.convert import gguf, llama2c
from barelm.convert.source import Source
from barelm.data.documents import Documents
from barelm.data.shards import Dataset, write_dataset
from barelm.loop import flops_per_token
from barelm.plan import PlanConfig, plan
from barelm.settings import TrainConfig, settle
from conftest import GPT2, LLAMA
from formats import small_pieces
from models import assert_all_same_bits, copies, random_model
from test_train import log, refused, same_run

TOK = small_pieces()
TEXT = "".join(f"ab a {i} ab\n" for i in range(400))
CONFIG = LLAMA | dict(n_layer=1, vocab_size=TOK.n_vocab + 5, context=32)  # five ids of padding
FLAGS = {"steps": 4, "batch": 4, "context": 16, "eval-batches": 0, "threads": 1, "lr": 0.01}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def start(tmp_path):
    """A checkpoint of a random model with its vocabulary."""
    return written(random_model(CONFIG), tmp_path / "start")


def written(model, folder, tok=TOK):
    checkpoint.write(Source.of_model(model), folder, files={"tokenizer.json": tok.to_json().encode()} if tok else {})
    return folder


def arguments(init, data, out, *more, **flags):
    flags = FLAGS | {"init": init, "data": data, "out": out} | {k.replace("_", "-"): v for k, v in flags.items()}
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return ["train", "--no-tensorboard", *words, *map(str, more)]


def run(init, data, out, *more, **flags):
    return command.main(arguments(init, data, out, *more, **flags))


def resume(out):
    return command.main(["train", "--resume", "--out", str(out)])


def first_losses(out):
    """(held-out loss before anything was learnt, loss of the first step)"""
    records = log(out)
    return records[0]["val_loss"], records[1]["loss"]


# ---- where it begins ------------------------------------------------------------------------------------------------


def test_stories260k_goes_on_from_its_own_loss_and_learns(test_data, tmp_path, capsys):
    tok = Tokenizer.load(test_data / "ckpt" / "tok512.bin")
    source, folder = llama2c.read(test_data / "ckpt" / "stories260K.bin"), tmp_path / "stories"
    checkpoint.write(source, folder, files={"tokenizer.json": tok.to_json().encode()})
    (tmp_path / "text.txt").write_bytes((test_data / "text" / "tinystories_2MB.txt").read_bytes()[:60_000])
    flags = dict(split_at="<|endoftext|>", context=96, steps=40, batch=8, lr=None)
    assert run(folder, tmp_path / "text.txt", tmp_path / "run", "--json", **flags) == 0
    result = json.loads(capsys.readouterr().out)
    words = ["--checkpoint", folder, "--data", tmp_path / "run" / "data", "--context", 96, "--json"]
    assert command.main(["eval", *map(str, words)]) == 0
    own = json.loads(capsys.readouterr().out)["all"]
    assert result["before"]["loss"] == own["loss"] and result["before"]["n_bytes"] == own["bytes"]
    assert result["after"]["loss"] < own["loss"] - 0.02
    assert result["init"] == str(folder) and result["step"] == 40
    assert Model.load(tmp_path / "run" / "step_40").config == source.config  # its context too
    assert Tokenizer.load(tmp_path / "run" / "step_40").hash() == tok.hash()


def test_what_was_fine_tuned_is_told(start, text, tmp_path, capsys):
    assert run(start, text, tmp_path / "run") == 0
    said, report = capsys.readouterr().out, (tmp_path / "run" / "report.md").read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())["init"]
    assert record["folder"] == str(start) and len(record["sha256"]) == 64
    assert f"init      {start}, its weights' sha256 {record['sha256'][:12]}\n" in said
    assert "model     llama: 1 layers, 4 heads, 16 channels, context 16, 271 ids" in said
    assert "4 steps of 128 tokens (2 x 4 x 16)" in said
    assert report.startswith("# Fine-tuning run\n") and f"| init | {start}, its weights'" in report


def test_a_run_goes_on_from_its_newest_step_without_its_moments(start, text, tmp_path):
    assert run(start, text, tmp_path / "old", save_every=2) == 0
    newest = tmp_path / "old" / "step_4"
    assert Model.load(newest).step == 4 and (newest / "optimizer.safetensors").exists()
    assert run(tmp_path / "old", text, tmp_path / "a") == 0
    assert run(written(Model.load(newest), tmp_path / "weights"), text, tmp_path / "b") == 0
    assert Model.load(tmp_path / "a" / "step_4").step == 4
    same_run(tmp_path / "a", tmp_path / "b", 4)
    runs = [json.loads((tmp_path / name / "run.json").read_text())["init"] for name in "ab"]
    assert runs[0]["sha256"] == runs[1]["sha256"] and runs[0]["folder"] == str(newest)


def test_a_file_of_others_is_the_folder_that_is_made_of_it(start, text, tmp_path):
    gguf.write(checkpoint.Weights(start), tmp_path / "a.gguf")
    assert run(start, text, tmp_path / "a") == run(tmp_path / "a.gguf", text, tmp_path / "b") == 0
    same_run(tmp_path / "a", tmp_path / "b", 4)


# ---- adapters ----

LORA = {"lora-rank": 3, "lora-targets": "q_proj,down_proj", "lr": 0.05}


def test_an_adapter_is_trained_on_it(text, start, tmp_path, capsys):
    """The held-out loss begins at the model's own and falls, the model's folder stays as it was, and a checkpoint of
    the run is an adapter on it, which every command reads."""
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    assert run(start, text, tmp_path / "run", "--json", **LORA, steps=12) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["after"]["loss"] < result["before"]["loss"] - 0.1
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before
    folder = tmp_path / "run" / "step_12"
    assert checkpoint.is_adapter(folder) and (folder / "tokenizer.json").is_file()
    model = Model.load(folder)
    assert (model.adapter.rank, model.adapter.alpha, model.step) == (3, 6.0, 12)
    assert model.adapter.targets == ("self_attn.q_proj", "mlp.down_proj")
    for words in (
        ["sample", "--checkpoint", str(tmp_path / "run"), "--max-tokens", "3", "--temperature", "0"],
        ["eval", "--checkpoint", str(tmp_path / "run"), "--data", str(text)],
        ["export", str(tmp_path / "run"), str(tmp_path / "merged")],
        ["sample", "--checkpoint", str(tmp_path / "merged"), "--max-tokens", "3", "--temperature", "0"],
    ):
        assert command.main(words) == 0
    texts = capsys.readouterr().out.splitlines()
    assert texts[0] == texts[-1]  # merged, the same text
    (folder / "state.json").unlink()
    (folder / "tokenizer.json").unlink()  # as others write adapters: the base model's vocabulary is theirs
    assert checkpoint.load_tokenizer(folder).hash() == TOK.hash()
    tokens = np.arange(20, dtype=np.int32)[None]
    merged = Model.load(tmp_path / "merged").logits(tokens)
    np.testing.assert_allclose(merged, model.logits(tokens), rtol=0, atol=1e-4)  # W + s B A is rounded once


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_run_of_an_adapter_that_was_stopped_ends_in_the_same_bits(text, start, tmp_path, weights):
    options = LORA | {"weights": weights, "save-every": 2}
    assert run(start, text, tmp_path / "whole", **options, steps=6) == 0
    assert run(start, text, tmp_path / "parts", **options, steps=6) == 0
    for number in (4, 6):
        shutil.rmtree(tmp_path / "parts" / f"step_{number}")
    shutil.move(start, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="start"):  # its model is still needed
        command._run(["train", "--resume", "--out", str(tmp_path / "parts")])
    words = ["train", "--resume", "--out", str(tmp_path / "parts"), "--init", str(tmp_path / "moved")]
    assert command.main(words) == 0
    whole, parts = (Model.load(tmp_path / name / "step_6", base=tmp_path / "moved") for name in ("whole", "parts"))
    assert_all_same_bits(copies(parts.adapter_params), copies(whole.adapter_params))
    assert_all_same_bits(copies(parts.moments[1]), copies(whole.moments[1]))


def test_an_adapter_is_not_continued_on_other_weights(text, start, tmp_path, capsys):
    assert run(start, text, tmp_path / "run", **LORA) == 0
    written(random_model(CONFIG, seed=5), start)
    assert resume(tmp_path / "run") == 2
    assert "has other weights than when the run was begun" in capsys.readouterr().err


REFUSED_LORA = {
    "alpha alone": ({"lora-alpha": 2}, "--lora-alpha: goes with --lora-rank only"),
    "weights alone": ({"weights": "bf16"}, "--weights: goes with --lora-rank only"),
    "rank": ({"lora-rank": 70000}, "--lora-rank: is 70000"),
    "target": ({"lora-rank": 2, "lora-targets": "c_attn"}, "--lora-targets: there is no 'c_attn', but self_attn"),
    "empty target": ({"lora-rank": 2, "lora-targets": "q_proj,"}, "--lora-targets: is"),
}


@pytest.mark.parametrize("flags, says", REFUSED_LORA.values(), ids=REFUSED_LORA.keys())
def test_an_adapter_that_cannot_be_is_refused_by_flag(text, start, tmp_path, capsys, flags, says):
    words = arguments(start, text, tmp_path / "run", **flags)
    assert command.main(words) == 2
    assert says in capsys.readouterr().err


def test_an_adapter_needs_a_model(text, tmp_path, capsys):
    assert command.main(["train", "--data", str(text), "--out", str(tmp_path / "run"), "--lora-rank", "2"]) == 2
    assert "--lora-rank: goes with --init only" in capsys.readouterr().err


def test_an_adapter_needs_a_folder_that_it_finds_again(text, start, tmp_path, capsys):
    gguf.write(checkpoint.open_weights(start), tmp_path / "model.gguf")
    assert run(tmp_path / "model.gguf", text, tmp_path / "run", **LORA) == 2
    assert "--lora-rank" in capsys.readouterr().err
    assert run(start, text, tmp_path / "first", **LORA) == 0
    assert run(tmp_path / "first", text, tmp_path / "second", **LORA) == 2
    assert "is no folder with a whole model" in capsys.readouterr().err
    assert run(tmp_path / "first", text, tmp_path / "third") == 0  # all of the merged model: no adapter any more
    assert Model.load(tmp_path / "third" / "step_4").adapter is None


def test_what_an_adapter_takes_is_planned(start):
    config = dict(init=str(start), tokens=1000, measure=True, batch=2)
    whole, small = plan(PlanConfig(**config)), plan(PlanConfig(**config, lora_rank=2, weights="bf16"))
    assert small["parameters"]["trained"] == Lora(rank=2).size(checkpoint.read_config(start))
    for purpose in ("gradients", "moments", "weights"):
        assert small["memory"]["purposes"][purpose] <= whole["memory"]["purposes"][purpose]
    assert small["flops"]["per_token"] < whole["flops"]["per_token"] and small["time"]["step"] > 0


@pytest.mark.peers
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_step_is_that_of_transformers(family, text, tmp_path):
    """From a folder that transformers wrote.  Both compute in fp32: sums of some thousand products of size 1 differ by
    about 1e-6 of their size, a norm over all of them by less than 1e-5."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    written(random_model(CONFIG if family == "llama" else GPT2 | dict(vocab_size=TOK.n_vocab)), tmp_path / "ours")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    TOK.save(tmp_path / "theirs")
    assert run(tmp_path / "theirs", text, tmp_path / "run", steps=1, seed=3) == 0
    train = Dataset.open(tmp_path / "run" / "data").train
    micro_batches = [train.batch(0, micro, 4, 16, 3) for micro in range(2)]
    tokens, targets = (torch.tensor(np.concatenate(part)).long() for part in zip(*micro_batches, strict=True))
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").train()
    twin.config.use_cache = False
    loss = torch.nn.functional.cross_entropy(twin(tokens).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in twin.parameters()))
    step = log(tmp_path / "run")[1]
    np.testing.assert_allclose([step["loss"], step["norm"]], [loss.item(), norm.item()], rtol=1e-5)


# ---- stop and resume ------------------------------------------------------------------------------------------------


def foreign(text, folder):
    """Shards as others make them, which do not say whose ids they hold."""
    write_dataset(Documents(text), TOK, folder)
    for name in ("dataset.json", "tokenizer.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("data", ["text", "shards", "shards of others"])
def test_a_resumed_run_has_the_same_bits_and_needs_no_folder(start, text, tmp_path, data):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    if data != "text":
        write_dataset(Documents(text), TOK, tmp_path / "shards")
    paths = {"text": text, "shards": tmp_path / "shards"}
    path = paths[data] if data in paths else foreign(text, tmp_path / "foreign")
    assert run(start, path, whole, steps=8, save_every=3, eval_every=2, keep=0) == 0
    before = json.loads((whole / "run.json").read_text())["init"]
    shutil.copytree(whole, halves)
    shutil.rmtree(start)
    for late in ("step_6", "step_8"):
        shutil.rmtree(halves / late)
    assert resume(halves) == 0
    same_run(whole, halves, 8)
    assert json.loads((halves / "run.json").read_text())["init"] == before
    assert "| init |" in (halves / "report.md").read_text()


def test_a_run_that_died_at_once_begins_again_with_the_same_weights_only(start, text, tmp_path, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    for folder in (out, whole):
        assert run(start, text, folder, tokenizer=start) == 0
    shutil.rmtree(out / "step_4")
    written(random_model(CONFIG, seed=1), start)
    assert f"--init: {start} has other weights than when the run" in refused(
        capsys, ["train", "--resume", "--out", out]
    )
    written(random_model(CONFIG), start)
    assert resume(out) == 0
    same_run(out, whole, 4)


def test_resume_refuses_another_model(start, text, tmp_path, capsys):
    assert run(start, text, tmp_path / "run") == 0
    assert run(start, text, tmp_path / "run", "--resume", steps=5) == 0
    said = refused(capsys, ["train", "--resume", "--out", tmp_path / "run", "--init", text])
    assert f"--init: {text} contradicts the run" in said


# ---- vocabularies ---------------------------------------------------------------------------------------------------


def test_a_padded_vocabulary_stays_as_it_is(start, text, tmp_path):
    assert run(start, text, tmp_path / "run") == 0
    before, after = Model.load(start), Model.load(tmp_path / "run" / "step_4")
    assert after.config == before.config and after.config.vocab_size == TOK.n_vocab + 5
    assert (np.array(after.params["embed_tokens.weight"]) != np.array(before.params["embed_tokens.weight"])).any()


def test_a_folder_without_a_tokenizer_needs_one(text, tmp_path, capsys):
    model = random_model(CONFIG)
    bare, whole = written(model, tmp_path / "bare", None), written(model, tmp_path / "whole")
    out = tmp_path / "run"
    assert f"--tokenizer: must be given, for {bare} has none" in refused(capsys, arguments(bare, text, out))
    assert run(bare, text, out, tokenizer=TOK.save(tmp_path / "tok")) == run(whole, text, tmp_path / "same") == 0
    same_run(out, tmp_path / "same", 4)
    assert run(bare, text, tmp_path / "bytes", tokenizer="bytes") == 0
    assert Tokenizer.load(tmp_path / "bytes" / "step_4").n_vocab == 257
    Tokenizer({bytes([b]): b for b in range(256)}, [], {"<|endoftext|>": 271}).save(tmp_path / "large")
    said = refused(capsys, arguments(bare, text, tmp_path / "no", tokenizer=tmp_path / "large"))
    assert f"--tokenizer: its ids go up to 271, the vocabulary of {bare} has 271" in said
    assert not (tmp_path / "no").exists()


def test_two_tokenizers_are_one_too_many(start, text, tmp_path, capsys):
    assert run(start, text, tmp_path / "same", tokenizer=TOK.save(tmp_path / "tok")) == 0
    for other in ("bytes", written(random_model(CONFIG), tmp_path / "other", small_pieces(adds_bos=False))):
        said = refused(capsys, arguments(start, text, tmp_path / "run", tokenizer=other))
        assert f"--tokenizer: {start} has another (<SentencePiece" in said
    (start / "state.json").unlink()
    (start / "tokenizer.json").write_text("{}")
    said = refused(capsys, arguments(start, text, tmp_path / "run"))
    assert (
        "tokenizer.json: model: only a BPE model can be read; `barelm import` makes a checkpoint with another" in said
    )


def test_shards_of_another_tokenizer_are_refused(start, text, tmp_path, capsys):
    write_dataset(Documents(text), Tokenizer.bytes(), tmp_path / "shards")
    said = refused(capsys, arguments(start, tmp_path / "shards", tmp_path / "run"))
    assert f"tokenizer: {tmp_path / 'shards'} was made with another vocabulary" in said


# ---- what is asked --------------------------------------------------------------------------------------------------

OF_THE_MODEL = {"preset": "gpt2", "depth": 2, "family": "gpt2", "n-layer": 1, "n-head": 4, "n-kv-head": 2, "n-embd": 16}


@pytest.mark.parametrize("name", OF_THE_MODEL)
def test_what_the_model_has_is_not_asked_for(name, start, text, tmp_path, capsys):
    """Not even as it is, or as it would be without the flag."""
    said = refused(capsys, [*arguments(start, text, tmp_path / "run"), f"--{name}", OF_THE_MODEL[name]])
    assert said == f"barelm: --{name}: the model of --init has its own; leave one of the two out\n"
    assert not (tmp_path / "run").exists()


def test_windows_are_no_longer_than_the_model_sees(start, text, tmp_path, capsys):
    said = refused(capsys, arguments(start, text, tmp_path / "run", context=33))
    assert "--context: is 33, the model of --init sees 32 tokens at most" in said
    assert run(start, text, tmp_path / "run", context=32) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "start: is no checkpoint, config.json is missing"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "pytorch_model.bin: is pickled"),
        ({"config.json": "{}", "model.safetensors": ""}, "model_type: is None, must be 'gpt2', 'llama' or 'barelm'"),
        (None, "start: is not there"),
    ],
)
def test_what_is_no_model(content, says, text, tmp_path, capsys):
    if content is not None:
        (tmp_path / "start").mkdir()
        for name, data in content.items():
            (tmp_path / "start" / name).write_text(data)
    assert says in refused(capsys, arguments(tmp_path / "start", text, tmp_path / "run"))


def test_what_is_not_named_follows_from_the_model_and_the_text():
    def settled(tokens, model="gpt2", **flags):
        return settle(TrainConfig(init="x", **flags), 0, Config.preset(model), tokens)

    usual = settled(819_200)
    assert (usual.context, usual.batch, usual.tokens_per_step) == (1024, 4, 8 * 1024)
    assert (usual.steps, usual.warmup, usual.lr) == (200, 6, 4.2e-5)  # two passes, 3 %
    assert (usual.n_layer, usual.n_embd, usual.preset) == (0, 0, "")
    assert settled(10, "gpt2-xl").lr == 2.9e-5 and settled(10, "gpt2-xl").steps == 1
    assert settled(10, "llama-3.2-1b").context == 1024 and settled(10, "stories260k").context == 512
    again = settled(5, **{name: getattr(usual, name) for name in ("context", "batch", "steps", "warmup", "lr")})
    assert again == usual
    named = settled(819_200, context=100, batch=3, lr=1e-3, minutes=2.0)
    assert (named.tokens_per_step, named.lr, named.steps, named.warmup) == (900, 1e-3, 0, 20)
    with pytest.raises(ValueError, match="--n-layer: the model of --init has its own"):
        settled(10, n_layer=12)


def test_a_run_is_two_passes_long_where_nothing_else_is_asked(start, text, tmp_path):
    assert run(start, text, tmp_path / "run", steps=None, context=32, batch=8) == 0
    tokens = len(Dataset.open(tmp_path / "run" / "data").train)
    assert log(tmp_path / "run")[-1]["step"] == round(2 * tokens / 256) > 20


def test_plan_is_of_the_run_that_train_would_make(start, capsys):
    found = plan(PlanConfig(init=str(start), tokens=5120, context=16, batch=2, measure=False))
    assert found["model"]["config"] == checkpoint.read_config(start).to_dict()
    assert found["parameters"]["total"] == Model.load(start).n_params
    assert found["flops"]["per_token"] == flops_per_token(checkpoint.read_config(start), 16)
    run = found["run"]
    assert (run["context"], run["batch"], run["accumulate"], run["steps"]) == (16, 2, 4, 40)
    assert run["lr"] == settle(TrainConfig(init="x"), 0, checkpoint.read_config(start)).lr
    for flags, says in {
        ("--vocab", 7): "--vocab: the model of --init has its own",
        ("--depth", 7): "--depth: the model of --init has its own",
        ("--tokens", 0): "--tokens: must be given with --init",
    }.items():
        assert says in refused(capsys, ["plan", "--init", start, "--tokens", 100, *flags])


def test_the_model_is_the_one_in_the_folder(start, text, tmp_path):
    assert run(start, text, tmp_path / "run", lr=1e-30) == 0  # too little to change anything
    assert_all_same_bits(copies(Model.load(tmp_path / "run" / "step_4").params), copies(Model.load(start).params))
