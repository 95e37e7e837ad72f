"""Evaluation: bits per byte against a direct computation, its standard error against a bootstrap, and `barelm eval`."""

import json
import math

import numpy as np
import pytest
from barelm import Config, Model, Tokenizer, checkpoint
from barelm import __main__ as command
from barelm.data.documents import Documents
from barelm.data.shards import write_dataset
from barelm.data.tokens import Tokens
from barelm.evaluate import Scores, evaluate, evaluation, score, together
from hypothesis import given
from hypothesis import strategies as st

TEXT = "".join(f"{i} and {i} are {2 * i}.\n" for i in range(60))
TOK = Tokenizer.bytes()


class Uniform:
    """Every token is as likely as any other."""

    def __init__(self, n_vocab):
        self.n_vocab = n_vocab

    def forward(self, tokens, targets):
        return np.where(targets < 0, 0, -math.log(self.n_vocab)).astype(np.float32)


def tokens_of(*texts):
    return Tokens.encode([(str(i), text) for i, text in enumerate(texts)], TOK)


@pytest.fixture(scope="module")
def model():
    return Model(Config(n_layer=1, n_head=2, n_embd=16, vocab_size=TOK.n_vocab, context=24), seed=3)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A checkpoint of the model."""
    path = tmp_path_factory.mktemp("checkpoint") / "step_0"
    checkpoint.save(model, path, files={"tokenizer.json": TOK.to_json().encode()})
    return path


@pytest.fixture
def texts(tmp_path):
    """Two files of text."""
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text(TEXT)
    paths[1].write_text("Something else altogether, and shorter: éè.")
    return paths


def directly(model, text, T):
    """(nats, targets) of a text, window by window, from the model's own log-probabilities."""
    ids = np.array([TOK.eot, *TOK.encode(text)], np.int32)
    nats, n = 0.0, 0
    for start in range(0, len(ids) - 1, T):
        window = ids[start : start + T + 1]
        nats -= float(model.forward(window[None, :-1].copy(), window[None, 1:].copy()).sum(dtype=np.float64))
        n += len(window) - 1
    return nats, n


# ---- scoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_vocab", [2, 257, 50257])
def test_a_uniform_model_needs_log2_of_its_vocabulary_a_token(n_vocab):
    result = evaluate(Uniform(n_vocab), tokens_of("x" * 1000), B=4, T=32)
    assert (result.tokens, result.n_bytes) == (1000, 1000)
    # the log-probabilities are float32: half a unit in the last place is 6e-8 of each
    assert result.bits_per_byte == pytest.approx(math.log2(n_vocab), rel=1e-7)
    assert result.loss == pytest.approx(math.log(n_vocab), rel=1e-7)
    assert result.stderr == pytest.approx(0, abs=1e-9)  # no window differs from another


@pytest.mark.parametrize("B, T", [(1, 24), (3, 24), (5, 7), (64, 1)])
def test_it_is_what_the_model_says(model, B, T):
    nats, n = directly(model, TEXT, T)
    result = evaluate(model, tokens_of(TEXT), B, T)
    assert (result.tokens, result.n_bytes) == (n, len(TEXT.encode()))
    # a row has the same bits alone and in a batch; the sums are float64 in another order
    assert result.loss == pytest.approx(nats / n, rel=1e-12)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-12)


@pytest.mark.parametrize("n", [1, 23, 24, 25, 100, 10**6])
def test_max_tokens_scores_the_first_ones(model, n):
    data = tokens_of(TEXT)
    some, cut = score(model, data, 3, 24, max_tokens=n), score(model, data.cut(0, n + 1), 3, 24)
    assert some.tokens == min(n, len(data) - 1)
    np.testing.assert_array_equal(some.nats, cut.nats)
    np.testing.assert_array_equal(some.n_bytes, cut.n_bytes)


def test_texts_together_are_the_sum_of_their_windows(model):
    parts = [score(model, tokens_of(text), 4, 24) for text in (TEXT, TEXT[:50])]
    both, (a, b) = evaluation(together(parts)), map(evaluation, parts)
    assert (both.tokens, both.n_bytes) == (a.tokens + b.tokens, a.n_bytes + b.n_bytes)
    bits = a.bits_per_byte * a.n_bytes + b.bits_per_byte * b.n_bytes
    assert both.bits_per_byte == pytest.approx(bits / both.n_bytes, rel=1e-12)


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no text to score"):
        evaluate(Uniform(257), tokens_of(), T=8)
    with pytest.raises(ValueError, match="no text to score"):
        evaluate(Uniform(257), tokens_of("", ""), T=8)  # end-of-text tokens alone


# ---- the standard error -------------------------------------------------------------------------------------------


def test_the_standard_error_is_that_of_a_bootstrap(rng):
    n, draws = 500, 4000
    n_bytes = rng.integers(40, 400, n).astype(float)
    nats = n_bytes * rng.normal(0.8, 0.15, n) + rng.normal(0, 10, n)  # long windows cost more, and each its own way
    result = evaluation(Scores(nats, n_bytes, 10_000))
    chosen = rng.integers(0, n, (draws, n))
    ratios = nats[chosen].sum(1) / math.log(2) / n_bytes[chosen].sum(1)
    # of 4000 draws the deviation is known to 1 / sqrt(2 * 4000) = 1.1 %; the two differ by some 1 / n themselves
    assert result.stderr == pytest.approx(ratios.std(), rel=0.05)
    # as if every window stood for as many bytes, it would be far off
    assert result.stderr < 0.5 * (nats / math.log(2)).std() / math.sqrt(n) / n_bytes.mean()


def test_the_standard_error_covers_the_truth(rng):
    """95 % of the intervals hold the ratio that the windows are drawn around."""
    hits, tries = 0, 1000
    for _ in range(tries):
        n_bytes = rng.integers(40, 400, 100).astype(float)
        result = evaluation(Scores(n_bytes * rng.normal(0.8, 0.15, 100), n_bytes, 1))
        hits += abs(result.bits_per_byte - 0.8 / math.log(2)) < 1.96 * result.stderr
    assert hits / tries == pytest.approx(0.95, abs=0.03)  # four deviations of the share itself, and t for 1.96


def test_one_window_has_no_standard_error():
    assert evaluation(Scores(np.array([3.0]), np.array([5.0]), 4)).stderr is None


nats = st.just(0.0) | st.floats(1e-6, 1e4)  # the square of something smaller would lose digits, and says nothing
windows = st.lists(st.tuples(nats, st.integers(1, 1000)), min_size=2, max_size=30)


@given(windows, st.integers(2, 5))
def test_copies_of_the_windows_only_make_it_surer(rows, copies):
    nats, n_bytes = np.array(rows, float).T
    one = evaluation(Scores(nats, n_bytes, 1))
    more = evaluation(Scores(np.tile(nats, copies), np.tile(n_bytes, copies), 1))
    assert more.bits_per_byte == pytest.approx(one.bits_per_byte, rel=1e-12)
    n = len(rows)
    want = one.stderr * math.sqrt((n - 1) / (copies * n - 1))  # n grows, and so does n - 1 below
    assert more.stderr == pytest.approx(want, rel=1e-9, abs=1e-12 * one.bits_per_byte)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=30), st.floats(0.01, 10))
def test_windows_of_one_ratio_leave_no_doubt(sizes, ratio):
    n_bytes = np.array(sizes, float)
    result = evaluation(Scores(ratio * n_bytes, n_bytes, 1))
    assert result.stderr == pytest.approx(0, abs=1e-12 * result.bits_per_byte)


# ---- barelm eval --------------------------------------------------------------------------------------------------


def run(capsys, folder, *more):
    """(exit code, standard output, standard error) of `barelm eval`."""
    code = command.main(["eval", "--checkpoint", str(folder), *map(str, more)])
    return code, *capsys.readouterr()


def test_the_command_says_what_the_model_says(model, folder, texts, capsys):
    code, out, _ = run(capsys, folder, "--data", texts[0], "--batch", 3, "--json")
    found = json.loads(out)
    nats, n = directly(model, TEXT, 24)
    assert code == 0 and found["step"] == 0 and found["context"] == 24
    assert found["all"]["tokens"] == n and found["all"]["bytes"] == len(TEXT.encode())
    assert found["all"]["loss"] == pytest.approx(nats / n, rel=1e-12)
    assert found["all"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-12)
    assert found["all"]["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-12)


def test_several_texts_by_themselves_and_together(folder, texts, capsys):
    code, out, _ = run(capsys, folder, "--data", f"{texts[0]},{texts[1]}", "--context", 8, "--json")
    found = json.loads(out)
    assert code == 0 and [row["name"] for row in found["texts"]] == [str(path) for path in texts]
    for path, row in zip(texts, found["texts"], strict=True):
        alone = json.loads(run(capsys, folder, "--data", path, "--context", 8, "--json")[1])
        assert alone["all"] == {name: value for name, value in row.items() if name != "name"}
        assert row["bytes"] == path.stat().st_size
    assert found["all"]["tokens"] == sum(row["tokens"] for row in found["texts"])
    code, out, _ = run(capsys, folder, "--data", f"{texts[0]},{texts[1]}", "--context", 8)
    lines = out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [*map(str, texts), "all together"]
    assert f"{found['all']['bits_per_byte']:.4f} ± {found['all']['stderr']:.4f} bits per byte" in lines[-1]


def test_of_token_shards_the_held_out_side_is_scored(folder, texts, tmp_path, capsys):
    dataset = write_dataset(Documents([str(path) for path in texts]), TOK, tmp_path / "shards", val_fraction=0.5)
    code, out, _ = run(capsys, folder, "--data", tmp_path / "shards", "--json")
    assert code == 0 and json.loads(out)["all"]["tokens"] == len(dataset.validation) - 1


def test_a_rounded_model_is_scored_rounded(folder, texts, capsys):
    loss = [
        json.loads(run(capsys, folder, "--data", texts[0], "--precision", precision, "--json")[1])["all"]["loss"]
        for precision in ("fp32", "bf16")
    ]
    assert loss[0] != loss[1] and loss[0] == pytest.approx(loss[1], rel=0.01)  # bf16 keeps 8 bits


HOSTILE = [
    (["--batch", 0], "--batch: must be above 0, got 0"),
    (["--batch", 2**31], "--batch: 2147483648 is too large"),
    (["--batch", "many"], "--batch: 'many' is not a whole number"),
    (["--context", -1], "--context: must be 0 or more"),
    (["--context", 25], "--context: 25 is more than the 24 tokens that the model sees"),
    (["--max-tokens", -5], "--max-tokens: must be 0 or more"),
    (["--threads", -1], "--threads: must be 0 or more"),
    (["--data", "nothing/here"], "nothing/here: no such file or folder"),
    (["--data", "a,,b"], "--data: a name is missing"),
    (["--data", "a,a"], "--data: a is named twice"),
    (["--precision", "fp8"], "fp8"),
    (["--contxt", 8], "did you mean '--context'?"),
]


@pytest.mark.parametrize("flags, says", HOSTILE, ids=[" ".join(map(str, flags)) for flags, _ in HOSTILE])
def test_mistakes_are_one_line(folder, texts, capsys, flags, says):
    data = [] if "--data" in flags else ["--data", texts[0]]
    code, out, err = run(capsys, folder, *flags, *data)
    assert code == 2 and out == ""
    assert says in err and err.startswith("barelm: ") and err.count("\n") == 1


def test_texts_that_are_none_are_refused(folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "zero.bin").write_bytes(b"\0\1\2")
    for name in ("empty.txt", "zero.bin"):
        code, _, err = run(capsys, folder, "--data", tmp_path / name)
        assert code == 2 and name in err and "no text here" in err and err.count("\n") == 1


def test_a_checkpoint_that_is_none_is_refused(tmp_path, texts, capsys):
    for path, says in ((tmp_path, "neither a checkpoint"), (tmp_path / "gone", "no such folder")):
        code, _, err = run(capsys, path, "--data", texts[0])
        assert code == 2 and says in err and err.count("\n") == 1


def test_ctrl_c_is_a_line(folder, texts, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "forward", interrupted)
    code, out, err = run(capsys, folder, "--data", texts[0], "--json")
    assert (code, out, err) == (130, "", "barelm: interrupted\n")
