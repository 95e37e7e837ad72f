"""Multiple choice: how texts become tokens, what is scored, what is told of it, and `barelm eval --tasks`."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from barelm import Model, Tokenizer, checkpoint, choice, kept
from barelm import __main__ as command
from barelm.choice import accuracy, chance, encode_pair, fits, right, score
from barelm.evaluate import EvalConfig, main
from barelm.tasks import Item, Request
from conftest import GPT2, LLAMA
from formats import small_pieces
from hypothesis import given
from hypothesis import strategies as st
from models import random_model
from taskfiles import QUIZ, SWAG, hellaswag, olmo

TOK = Tokenizer.bytes()
PIECES = small_pieces()
MERGED = Tokenizer.train(["the cat sat. the cat ran.  ab  ab\n\nab "] * 3, 290)
TOKENIZERS = {"bytes": TOK, "merged": MERGED, "pieces": PIECES}
CONFIG = GPT2 | dict(vocab_size=300, context=64)
ITEMS = [
    Item(tuple(Request(context, f" {choice}") for choice in choices), gold, f"item {i}")
    for i, (context, gold, choices) in enumerate([*SWAG, *QUIZ])
]


@pytest.fixture(scope="module", params=[CONFIG, LLAMA | dict(vocab_size=300, context=64)], ids=["gpt2", "llama"])
def model(request):
    return random_model(request.param)


# ---- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tok", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_space_between_belongs_to_the_continuation(tok):
    assert encode_pair(tok, "the cat", " sat.") == encode_pair(tok, "the cat ", "sat.")
    assert encode_pair(tok, "the cat.\n \t", "sat") == encode_pair(tok, "the cat.", "\n \tsat")
    assert encode_pair(tok, "  ", "sat") == ([tok.bos], tok.encode("  sat"))


def test_context_and_continuation_are_encoded_together():
    context, continuation = encode_pair(MERGED, "the", " cat sat")
    assert context[1:] + continuation == MERGED.encode("the cat sat")
    assert MERGED.encode(" cat")[0] in continuation  # a token that begins with the space
    # a SentencePiece vocabulary puts a space before a text: not before a continuation
    assert encode_pair(PIECES, "ab", "ab") == ([1, *PIECES.encode("ab")], PIECES.encode("abab")[1:])


def test_a_border_within_a_token_leaves_the_continuation_to_itself():
    tok = Tokenizer({bytes([b]): b for b in range(256)} | {b"ab": 256}, [(b"a", b"b")], {"<|endoftext|>": 257})
    assert tok.encode("ab") == [256]
    assert encode_pair(tok, "a", "b") == ([257, 97], [98])


texts = st.text(st.sampled_from("ab the cat.\n\té"), max_size=12) | st.text(st.characters(codec="utf-8"), max_size=8)


@given(st.sampled_from(sorted(TOKENIZERS)), texts, texts.filter(bool))
def test_any_pair(name, context, continuation):
    """What lm-evaluation-harness makes of a pair, in other words: the context without the space behind it is encoded
    as it would be alone, and the whole text as it would be at once."""
    tok = TOKENIZERS[name]
    first, ids = encode_pair(tok, context, continuation)
    bare = context
    while bare and bare[-1].isspace():
        bare = bare[:-1]
    assert first == [tok.bos, *tok.encode(bare)]
    whole = tok.encode(context + continuation)
    n = len(tok.encode(bare))
    assert ids and (ids == whole[n:] if len(whole) > n else ids == tok.encode((context + continuation)[len(bare) :]))
    if name == "bytes":
        assert tok.decode_bytes(first[1:] + ids) == (context + continuation).encode()


# ---- sums ---------------------------------------------------------------------------------------------------------


def directly(model, tok, request):
    """The sum of a continuation, one token at a time, from logits in float64."""
    context, continuation = encode_pair(tok, *request)
    total = 0.0
    for i, id in enumerate(continuation):
        seen = (context + continuation[:i])[-model.config.context :]
        logits = model.logits(np.array([seen], np.int32))[0].astype(np.float64)
        total += logits[id] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    return total


def test_the_sums_are_what_the_model_says(model):
    for record, item in zip(score(model, MERGED, ITEMS, batch=5), ITEMS, strict=True):
        want = [directly(model, MERGED, request) for request in item.requests]
        # a log-probability is a float32 sum of logits of about 10: some 1e-6 of each of up to 20 tokens
        assert record["logprobs"] == pytest.approx(want, abs=1e-4)
        assert record["gold"] == item.gold and record["name"] == item.name and record["cut"] == 0
        assert record["bytes"] == [len(request.continuation.encode()) - 1 for request in item.requests]
        assert record["chars"] == [len(request.continuation) - 1 for request in item.requests]
        assert record["tokens"] == [len(encode_pair(MERGED, *request)[1]) for request in item.requests]
        assert fits(record, item) and not fits(record | {"gold": 9}, item)


def test_a_row_does_not_depend_on_its_batch(model):
    alone = score(model, MERGED, ITEMS, batch=1)
    for batch in (2, 7, 1000):
        assert score(model, MERGED, ITEMS, batch=batch) == alone  # to the bit
    assert score(model, MERGED, ITEMS[::-1], batch=3) == alone[::-1]


class Noise:
    """A model whose log-probabilities have all their bits, from tiny to large, and depend on place and token alone."""

    config = SimpleNamespace(context=2000)

    def forward(self, tokens, targets):
        values = np.sin(np.arange(tokens.shape[1]) * 12.9898 + tokens * 78.233)
        return np.where(targets < 0, 0, -np.exp(20 * values)).astype(np.float32)


def test_a_sum_does_not_depend_on_how_far_its_row_is_filled_up():
    sizes = [3, 40, 130, 170, 300, 450]
    items = [Item((Request("a" * n, " " + "xyz" * n), Request("b", " c")), 0, str(n)) for n in sizes]
    assert score(Noise(), TOK, items, batch=1) == score(Noise(), TOK, items, batch=100)


@pytest.mark.parametrize("T", [20, 33, 64])
def test_of_a_long_context_the_last_tokens_are_read(model, T):
    choices = [" yes", " no, never", " " + "x" * (T - 1)]  # the last has T tokens: of the context one is left
    long = Item(tuple(Request("q" * 30 + "w" * 30, choice) for choice in choices), 0, "long")
    (record,) = score(model, TOK, [long], T=T)
    for i, request in enumerate(long.requests):
        n = len(request.continuation)
        ids = ([TOK.eot, *TOK.encode(request.context + request.continuation)])[-(T + 1) :]
        targets = np.full((1, len(ids) - 1), -1, np.int32)
        targets[0, -n:] = ids[-n:]
        want = model.forward(np.array([ids[:-1]], np.int32), targets).sum(dtype=np.float64)
        assert record["logprobs"][i] == pytest.approx(float(want), rel=1e-14)  # the same numbers, in another order
    assert record["cut"] == 61 + T - (T + 1) and record["tokens"] == [4, 10, T]


def test_a_choice_that_is_too_long_is_refused(model):
    long = Item((Request("a", " b"), Request("a", " " + "x" * 64)), 0, "item 5")
    with pytest.raises(ValueError, match="item 5: a choice has 65 tokens, the model sees 64 at once"):
        score(model, TOK, [long])


# ---- what it comes to ---------------------------------------------------------------------------------------------


def test_which_choice_is_taken():
    record = {"logprobs": [-4.0, -3.0, -3.0], "chars": [8, 2, 3], "gold": 1}
    assert right(record, "acc") and not right(record | {"gold": 2}, "acc")  # of equals the first
    assert right(record | {"gold": 0}, "acc_norm") and not right(record, "acc_norm")


@given(st.lists(st.booleans(), min_size=1))
def test_the_standard_error_is_that_of_a_mean(hits):
    found = accuracy(iter(hits))
    assert found.items == len(hits) and found.value == pytest.approx(np.mean(hits))
    if len(hits) == 1:
        assert found.stderr is None
    else:
        assert found.stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))


def test_chance_is_that_of_one_who_chooses_blindly():
    assert chance([{"logprobs": [0, 0]}, {"logprobs": [0] * 4}, {"logprobs": [0] * 4}]) == pytest.approx(1 / 3)


# ---- barelm eval --tasks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    checkpoint.save(random_model(CONFIG), path, files={"tokenizer.json": MERGED.to_json().encode()})
    return path


@pytest.fixture
def folder(stored, tmp_path):
    """A checkpoint with which a test may do what it likes."""
    shutil.copytree(stored, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "swag.txt", tmp_path / "quiz.jsonl"]
    paths[0].write_bytes(hellaswag(SWAG))
    paths[1].write_bytes(olmo(QUIZ))
    return paths


def run(capsys, folder, *more):
    code = command.main(["eval", "--checkpoint", str(folder), *map(str, more)])
    return code, *capsys.readouterr()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_says_and_keeps_what_was_scored(folder, files, capsys):
    code, out, _ = run(capsys, folder, "--tasks", f"{files[0]},{files[1]}", "--json")
    found = json.loads(out)
    assert code == 0 and found["out"] == str(folder / "evals") and found["context"] == 64
    swag, quiz = found["tasks"]
    records = score(Model.load(folder), MERGED, [*ITEMS[: len(SWAG)]], batch=2)
    hits = [right(record, "acc_norm") for record in records]
    assert (swag["task"], swag["by"], swag["items"], swag["of"]) == ("hellaswag", "acc_norm", 7, 7)
    assert swag["acc_norm"] == sum(hits) / 7
    assert swag["acc_norm_stderr"] == pytest.approx(np.std(hits, ddof=1) / math.sqrt(7))
    assert (quiz["task"], quiz["by"], quiz["items"]) == ("quiz", "acc", 3)
    assert (swag["chance"], quiz["chance"]) == (0.25, pytest.approx((1 / 3 + 1 / 2 + 1 / 5) / 3))
    lines = (folder / "evals" / "hellaswag" / "items.jsonl").read_text().splitlines()
    for i, (line, record) in enumerate(zip(lines, records, strict=True)):
        kept_of_it = json.loads(line)
        assert kept_of_it["item"] == i and kept_of_it["logprobs"] == record["logprobs"]
    summary = json.loads((folder / "evals" / "hellaswag" / "summary.json").read_text())
    assert summary["result"] == swag and summary["done"] is True


def test_the_table(folder, files, capsys):
    found = json.loads(run(capsys, folder, "--tasks", f"{files[0]},{files[1]}", "--items", 2, "--json")[1])
    code, out, _ = run(capsys, folder, "--tasks", f"{files[0]},{files[1]}", "--items", 2)
    head, swag, quiz, where = out.splitlines()
    assert code == 0 and head.split() == ["task", "compared", "by", "acc", "acc_norm", "chance", "items"]
    assert f"{found['tasks'][0]['acc']:.4f} ± {found['tasks'][0]['acc_stderr']:.4f}" in swag and "2 of 7" in swag
    assert quiz.startswith("quiz") and where == f"kept in {folder / 'evals'}"


def test_prompts_that_lose_their_beginning_are_counted(folder, files, capsys):
    code, out, _ = run(capsys, folder, "--tasks", files[0], "--context", 24)
    assert code == 0 and "hellaswag: 7 prompts did not fit into the model's context" in out


def test_what_was_stopped_goes_on(folder, files, tmp_path, capsys, monkeypatch):
    whole = run(capsys, folder, "--tasks", files[0], "--json", "--out", tmp_path / "whole")[1]
    monkeypatch.setattr(kept, "AT_ONCE", 3)
    real, calls = choice.score, []

    def stops(*arguments):
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(choice, "score", stops)
    code, out, err = run(capsys, folder, "--tasks", files[0], "--json", "--out", tmp_path / "parts")
    assert code == 130 and out == ""
    assert "6 of 7 items are kept in" in err and err.endswith("barelm: interrupted\n")
    items = tmp_path / "parts" / "hellaswag" / "items.jsonl"
    with open(items, "ab") as file:
        file.write(b'{"item": 6, "na')  # as a crash leaves it
    code, out, _ = run(capsys, folder, "--tasks", files[0], "--json", "--out", tmp_path / "parts")
    assert code == 0 and calls == [3, 3, 1, 1]  # six were not computed again
    assert json.loads(out)["tasks"] == json.loads(whole)["tasks"]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_more_items_go_on_from_fewer(folder, files, capsys, monkeypatch):
    run(capsys, folder, "--tasks", files[0], "--items", 3)
    sizes = []
    real = choice.score
    monkeypatch.setattr(choice, "score", lambda *a: sizes.append(len(a[2])) or real(*a))
    assert json.loads(run(capsys, folder, "--tasks", files[0], "--json")[1])["tasks"][0]["items"] == 7
    assert json.loads(run(capsys, folder, "--tasks", files[0], "--items", 2, "--json")[1])["tasks"][0]["items"] == 2
    assert sizes == [4]


def test_results_of_something_else_are_never_mixed(folder, files, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, folder, "--tasks", files[0], "--out", out)[0] == 0
    before = contents(out)

    def refused(says, *flags):
        code, _, err = run(capsys, folder, "--tasks", files[0], "--out", out, *flags)
        assert code == 2 and f"holds results with other {says}; --out names another folder" in err
        assert contents(out) == before

    refused("precision", "--precision", "bf16")
    refused("context", "--context", 40)
    files[0].write_bytes(hellaswag(SWAG[:-1]))
    refused("file")
    files[0].write_bytes(hellaswag(SWAG))
    model = Model.load(folder)
    model.params["h.0.mlp.c_fc.bias"][3] += 1e-3
    checkpoint.save(model, folder, files={"tokenizer.json": MERGED.to_json().encode()})
    refused("weights")
    checkpoint.save(random_model(CONFIG), folder, files={"tokenizer.json": TOK.to_json().encode()})
    refused("tokenizer")


@pytest.mark.parametrize(
    "name, damage, says",
    [
        ("items.jsonl", lambda data: data.replace(b'"item": 1', b'"item": 5'), "line 2 is not the result of item 1"),
        ("items.jsonl", lambda data: b"[]\n" + data, "line 1 is not the result of item 0"),
        ("items.jsonl", lambda data: data.replace(b'"logprobs": [', b'"logprobs": [0,', 1), "is not its result"),
        ("items.jsonl", lambda data: data.replace(b'"chars": [', b'"chars": ["",', 1), "is not its result"),
        ("items.jsonl", lambda data: data.replace(b'"gold": 0', b'"gold": 3', 1), "is not its result"),
        ("summary.json", lambda data: data[:40], "is no summary of results"),
        ("summary.json", lambda data: b"[]", "is no summary of results"),
        ("summary.json", lambda data: b'{"of": 5}', "is no summary of results"),
        ("summary.json", None, "there is no summary.json"),
    ],
)
def test_damaged_results_are_refused(folder, files, capsys, name, damage, says):
    run(capsys, folder, "--tasks", files[0])
    path = folder / "evals" / "hellaswag" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    code, _, err = run(capsys, folder, "--tasks", files[0])
    assert code == 2 and says in err and err.count("\n") == 1


def test_a_runs_results_lie_in_its_folder_by_step(tmp_path):
    (tmp_path / "run" / "step_20").mkdir(parents=True)
    assert kept.evals_folder(tmp_path / "run" / "step_20", "") == tmp_path / "run" / "step_20" / "evals"
    (tmp_path / "run" / "run.json").touch()
    assert kept.evals_folder(tmp_path / "run" / "step_20", "") == tmp_path / "run" / "evals" / "step_20"
    assert kept.evals_folder(tmp_path / "run" / "step_20", "x") == kept.Path("x")


def test_equal_weights_have_one_digest_whatever_holds_them(folder, tmp_path):
    source = checkpoint.Weights(folder)
    checkpoint.write(source, tmp_path / "parts", shard_size=2000)
    checkpoint.write(source, tmp_path / "half", "BF16")
    assert kept.weights_digest(tmp_path / "parts") == kept.weights_digest(folder)
    assert kept.weights_digest(tmp_path / "half") != kept.weights_digest(folder)


HOSTILE = [
    (["--items", 3], "--items: goes with --tasks only"),
    (["--shots", "1"], "--shots: goes with --in-context only"),
    (["--out", "x"], "--out: goes with --tasks or --regurgitation or --in-context only"),
    (["--prompt-tokens", 50], "--prompt-tokens: goes with --regurgitation only"),  # though it is the default
    (["--tasks", "FILE", "--data", "x"], "--data: does not go with --tasks"),
    (["--tasks", "FILE", "--max-tokens", 5], "--max-tokens: does not go with --tasks"),
    (["--tasks", "FILE", "--questions", 5], "--questions: does not go with --tasks"),
    (["--tasks", "FILE", "--in-context"], "--tasks and --in-context are two questions"),
    (["--regurgitation", "--context", 8], "--context: does not go with --regurgitation"),
    (["--in-context", "--items", 8], "--items: does not go with --in-context"),
    (["--tasks", "FILE", "--items", -1], "--items: must be 0 or more"),
    (["--tasks", "FILE", "--context", 65], "--context: 65 is more than the 64 tokens"),
    (["--tasks", "FILE,,FILE"], "--tasks: a name is missing"),
    (["--tasks", "FILE,FILE"], "are both of hellaswag; name one at a time"),
    (["--tasks", "nothing/here"], "nothing/here: no such file"),
    (["--tasks", "FILE", "--context", 10], "a choice has"),
]


@pytest.mark.parametrize("flags, says", HOSTILE, ids=[" ".join(map(str, flags)) for flags, _ in HOSTILE])
def test_mistakes_are_one_line(folder, files, capsys, flags, says):
    code, out, err = run(capsys, folder, *(str(word).replace("FILE", str(files[0])) for word in flags))
    assert code == 2 and out == ""
    assert says in err and err.startswith("barelm: ") and err.count("\n") == 1
    if "a choice has" in says:
        assert f"{files[0]}: item 1 (line 1): " in err


def test_a_config_made_by_hand_is_checked_too(folder):
    with pytest.raises(ValueError, match="--items: goes with --tasks only"):
        main(EvalConfig(str(folder), items=5))


def test_a_folder_that_cannot_be_written_says_how_to_name_another(folder, files, tmp_path, capsys):
    (tmp_path / "taken").touch()
    code, _, err = run(capsys, folder, "--tasks", files[0], "--out", tmp_path / "taken")
    assert code == 2 and "--out names another folder" in err and err.count("\n") == 1
