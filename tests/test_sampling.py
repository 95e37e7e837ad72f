"""Sampling: which token a number draws, and what text comes out of tokens."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from barelm import Config, Model, Tokenizer, engine
from barelm import __main__ as command
from barelm.drawing import Sampling, draw, options, penalised
from barelm.engine import generate
from conftest import GPT2
from sessions import PlainSession

LOGITS = np.log([0.1, 0.4, 0.2, 0.3])
US = (np.arange(1000) + 0.5) / 1000  # an even grid in place of random numbers: shares come out exactly


def one(logits, u, **options):
    """The token that u draws, and its log-probability."""
    (id,), (logprob,) = draw([logits], [Sampling(**options)], [u])
    return id, logprob


def shares(logits=LOGITS, **options):
    ids, _ = draw([logits] * len(US), [Sampling(**options)] * len(US), US)
    return (np.bincount(ids, minlength=len(logits)) / len(US)).tolist()


def test_tokens_come_as_often_as_their_probability_says():
    assert shares() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.002)


def test_temperature_sharpens_and_flattens():
    p = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    assert shares(temperature=0.5) == pytest.approx(p / p.sum(), abs=0.002)
    assert shares(temperature=1e9) == pytest.approx([0.25] * 4, abs=0.002)


def test_temperature_zero_and_tiny_are_greedy():
    assert shares(temperature=0) == shares(temperature=1e-300) == [0, 1, 0, 0]
    assert one([1.0, 2.0, 2.0], 0.99, temperature=0) == (1, 0.0)  # the first of equals


def test_top_k_keeps_the_k_most_likely():
    assert shares(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.002)
    assert shares(top_k=1) == [0, 1, 0, 0]
    assert shares(top_k=99) == shares()
    assert shares(np.zeros(4), top_k=2) == [0.5, 0.5, 0, 0]  # of equals the lower ids stay


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    assert shares(top_p=0.39) == [0, 1, 0, 0]
    assert shares(top_p=0.41) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.002)
    assert shares(top_p=0.71) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.002)
    assert shares(top_p=1e-9) == [0, 1, 0, 0]


def test_top_p_counts_what_top_k_left():
    assert shares(top_k=2, top_p=0.56) == [0, 1, 0, 0]  # 4/7 of what is left reach 0.56
    assert shares(top_p=0.56) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.002)


def test_min_p_keeps_what_is_nearly_as_likely_as_the_likeliest():
    assert shares(min_p=0.76) == [0, 1, 0, 0]
    assert shares(min_p=0.74) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.002)
    assert shares(min_p=0.49) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.002)
    assert shares(min_p=0.0) == shares()
    assert shares(np.zeros(4), min_p=0.99) == [0.25] * 4  # all of the likeliest stay


def test_min_p_looks_at_probabilities_after_the_temperature_and_after_top_k():
    assert shares(temperature=0.5, min_p=0.74) == [0, 1, 0, 0]  # (3/4)^2
    assert shares(top_k=3, min_p=0.49) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.002)
    assert shares(top_k=3, min_p=0.51) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.002)


def test_a_token_of_no_probability_never_comes():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    below_one = np.nextafter(1.0, 0)
    assert [one(logits, u)[0] for u in (0.0, below_one)] == [1, 3]
    assert one(logits, below_one, top_k=4, top_p=0.99)[0] == 3


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_logits_from_which_nothing_can_be_drawn_are_refused(logits):
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="logits"):
            one(logits, 0.5, temperature=temperature)


def test_float32_logits_far_from_zero_are_drawn_alike():
    assert shares((LOGITS + 80).astype(np.float32)) == pytest.approx(shares(), abs=0.002)


def test_options_that_no_float_holds_are_taken_for_the_nearest():
    assert shares(top_p=1e-300) == shares(temperature=1e-300) == shares(min_p=1 - 2**-53) == [0, 1, 0, 0]
    assert shares(temperature=1e300) == pytest.approx([0.25] * 4, abs=0.002)
    assert shares(top_p=1 - 2**-53) == shares(top_k=2**60) == shares()
    with np.errstate(over="raise"):
        far = Sampling(temperature=1e300, top_k=2**60, top_p=1e-300, min_p=1 - 2**-53)
        temperature, top_k, top_p, min_p = np.array(options(far, 4), np.float32)
    assert temperature < np.inf and top_k == 0 < top_p and min_p < 1  # what the operator's contract asks for


def near(logprob):
    """The operator's bound for a probability is (2 + 2 |y|) 2^-23, |y| being at most |logprob|; twice, for it and for
    the sum it is divided by; and the result is rounded."""
    return pytest.approx(logprob, rel=0, abs=2**-23 * (4 + 5 * abs(logprob)))


def exact_logprob(logits, token, s):
    """log p(token) of what Sampling leaves, straight from the definitions; None where it cannot come."""
    p = {id: math.exp((float(x) - float(max(logits))) / s.temperature) for id, x in enumerate(logits)}
    ranked = sorted(p, key=lambda id: (-p[id], id))[: s.top_k]
    total, kept = math.fsum(p[id] for id in ranked), []
    while not kept or math.fsum(p[id] for id in kept) < s.top_p * total:
        kept.append(ranked[len(kept)])
        if len(kept) == len(ranked):
            break
    kept = [id for id in kept if p[id] >= s.min_p * p[ranked[0]]]
    return math.log(p[token] / math.fsum(p[id] for id in kept)) if token in kept else None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_sampled_logprob_is_that_of_what_is_left(rng, options):
    for _ in range(20):
        logits, u = rng.normal(0, 3, 50).astype(np.float32), rng.random()
        s = Sampling(**options)
        (token,), (logprob,) = draw([logits], [s], [u])
        assert logprob == near(exact_logprob(logits, token, s))


def test_rows_of_one_draw_have_options_and_numbers_of_their_own(rng):
    logits = rng.normal(0, 2, (4, 30)).astype(np.float32)
    each = [Sampling(temperature=0), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(min_p=0.3, temperature=2.0)]
    u = rng.random(4)
    ids, logprobs = draw(logits, each, u)
    for i, s in enumerate(each):
        (id,), (logprob,) = draw(logits[i : i + 1], [s], u[i : i + 1])
        assert (id, logprob) == (ids[i], logprobs[i])


def test_a_penalty_makes_what_is_there_less_likely_and_nothing_else():
    logits = np.array([2.0, -2.0, 0.0, 3.0, -np.inf], np.float32)
    assert penalised(logits, [0, 1, 1, 2, 4, 99], 2.0).tolist() == [1.0, -4.0, 0.0, 3.0, -np.inf]
    assert penalised(logits, [], 2.0).tolist() == logits.tolist() == [2.0, -2.0, 0.0, 3.0, -np.inf]


# ---- generate -----------------------------------------------------------------------------------------------------


class Script:
    """A model that writes given ids one after the other, whatever it reads, and keeps what it was shown."""

    def __init__(self, ids, context=8, vocab_size=300):
        self.ids, self.shown = list(ids), []
        self.config = SimpleNamespace(context=context, vocab_size=vocab_size)

    def logits(self, tokens, last=True):
        assert last and tokens.dtype == np.int32 and tokens.shape[0] == 1
        self.shown.append(tokens[0].tolist())
        out = np.full((1, self.config.vocab_size), -50.0, np.float32)
        out[0, self.ids[len(self.shown) - 1]] = 50.0
        out[0, 299:] = 1e9  # padding that no token has must never be drawn
        return out

    def forward(self, tokens, targets):
        return np.zeros(tokens.shape, np.float32)


class EveryTime(PlainSession):
    """Asks the model at every step, even about ids that it was asked about before: it is a script."""

    def __init__(self, model, max_tokens):
        super().__init__(model, max_tokens)
        self._logits = lambda version, ids: model.logits(np.array([ids], np.int32))[0]


TOK = Tokenizer.bytes()


def scripted(script, prompt="", **options):
    """generate, for what is no real model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Session", EveryTime)
        return generate(script, TOK, prompt, **options)


def write(data, prompt="", **options):
    script = Script([*data, TOK.eot])
    return list(scripted(script, prompt, **options)), script


def test_text_comes_piece_by_piece_until_the_end_of_text():
    pieces, script = write(b"hello", "say: ")
    assert pieces == list("hello")
    assert len(script.shown) == 6


def test_a_character_waits_for_its_last_byte():
    assert write("aé🦙b".encode())[0] == ["a", "é", "🦙", "b"]


def test_a_character_that_never_ends_becomes_a_replacement():
    assert write(b"a\xf0\x9f")[0] == ["a", "\ufffd"]
    assert "".join(write(b"a\xf0\x9fb\xffc")[0]) == "a\ufffdb\ufffdc"


def test_max_tokens_ends_the_text():
    assert write(b"hello", max_tokens=2)[0] == ["h", "e"]
    assert write(b"hello", max_tokens=0)[0] == []


def test_the_prompt_is_read_and_cut_to_the_context():
    assert write(b"abc", "0123456789")[1].shown[0] == list(b"23456789")
    assert write(b"a", "")[1].shown[0] == [TOK.eot]
    assert write(b"a", [65, 256])[1].shown[0] == [65, 256]


def test_a_full_context_goes_on_from_its_last_half():
    assert [len(ids) for ids in write(b"x" * 12, "0123456")[1].shown] == [7, 8, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4]
    assert write(b"abcdef", "0123456")[1].shown[2] == list(b"56ab")
    assert [len(ids) for ids in write(b"x" * 3, "0123456789")[1].shown] == [8, 4, 5, 6]


def test_text_ends_before_a_stop_string_and_none_of_it_slips_out():
    assert "".join(write(b"one\n\ntwo", stop="\n\n")[0]) == "one"
    assert "".join(write(b"one END two", stop=["zzz", "END"])[0]) == "one "
    assert write(b"stop", stop="stop")[0] == []
    assert "".join(write(b"a EN EN", stop="END")[0]) == "a EN EN"  # it only looked like one
    assert "".join(write(b"aaab", stop="aab")[0]) == "a"


def test_greedy_takes_the_best_and_the_seed_decides_otherwise():
    class Flat(Script):
        def logits(self, tokens, last=True):
            return np.zeros((1, 300), np.float32)

    def text(**options):
        return "".join(scripted(Flat([]), "x", max_tokens=40, **options))

    assert text(temperature=0) == "\0" * 40
    assert text(seed=1) == text(seed=1)
    assert len({text(seed=1), text(seed=2), text(seed=1, row=1)}) == 3


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("alternatives", -1),
        ("stop_ids", [300]),
        ("stop_ids", [-1]),
        ("seed", -1),
        ("row", -1),
        ("stop", [""]),
        ("prompt", [300]),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(name, value):
    options = {"prompt": "x"} | {name: value}
    with pytest.raises(ValueError, match=f"^{name}:"):
        scripted(Script([]), **options)


@pytest.mark.parametrize(
    "name", ["max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "alternatives", "prompt"]
)
def test_an_argument_of_a_wrong_type_is_named(name):
    with pytest.raises(TypeError, match=f"^{name}:"):
        scripted(Script([]), **({"prompt": "x"} | {name: [1.5] if name == "prompt" else "1"}))


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        scripted(Script([]), "x", temprature=1.0)


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"^tok:"):
        scripted(Script([], vocab_size=256), "x")


# ---- barelm sample ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    Model(Config(**(GPT2 | dict(vocab_size=300, context=60)))).save(folder)  # untrained: all tokens nearly alike
    TOK.save(folder)
    return str(folder)


def sampled(capsys, checkpoint, *flags):
    assert command.main(["sample", "--checkpoint", checkpoint, *flags]) == 0
    return capsys.readouterr().out


def records(capsys, checkpoint, *flags):
    return [json.loads(line) for line in sampled(capsys, checkpoint, "--json", *flags).splitlines()]


def test_samples_of_one_batch_are_those_written_one_by_one(checkpoint, capsys):
    flags = ["--prompt", "def ", "--max-tokens", "30", "--seed", "3", "--temperature", "1.0"]
    model, tok = Model.load(checkpoint), Tokenizer.load(checkpoint)
    texts = [generate(model, tok, "def ", row=row, max_tokens=30, seed=3) for row in range(20)]  # four must wait
    many = records(capsys, checkpoint, "--n", "20", *flags)
    assert [record["text"] for record in many] == ["".join(text) for text in texts]
    assert {record["finish"] for record in many} <= {"length", "stop"} and many[0]["prompt"] == "def "
    plain = sampled(capsys, checkpoint, "--n", "20", *flags)
    whole = "\n".join(f"--- {i} of 20 ---\ndef {record['text']}\n" for i, record in enumerate(many, 1))
    assert plain == whole
    assert sampled(capsys, checkpoint, *flags) == f"def {many[0]['text']}\n"


def test_ids_and_logprobs_are_those_of_the_text(checkpoint, capsys):
    flags = ["--max-tokens", "200", "--temperature", "3", "--prompt", "x"]
    many = records(capsys, checkpoint, "--n", "8", *flags)
    assert {record["finish"] for record in many} == {"stop", "length"}
    for record in many:
        assert TOK.decode(record["ids"]) == record["text"] and TOK.eot not in record["ids"]
        assert len(record["logprobs"]) == len(record["ids"]) and all(lp < 0 for lp in record["logprobs"])


def test_flags_of_sample_reach_what_draws(checkpoint, capsys):
    def text(*flags):
        (record,) = records(capsys, checkpoint, "--prompt", "abc", "--max-tokens", "40", *flags)
        return record["text"]

    plain = text()
    assert text("--min-p", "0.9999") == text("--temperature", "0") == text("--top-k", "1") != plain
    assert text("--repetition-penalty", "5") != plain != text("--top-p", "0.5")
    assert text("--stop", plain[4:6]) == plain[: plain.find(plain[4:6])]
    (exact,) = records(capsys, checkpoint, "--prompt", "abc", "--max-tokens", "1")
    (close,) = records(capsys, checkpoint, "--prompt", "abc", "--max-tokens", "1", "--weights", "int8")
    assert exact["ids"] == close["ids"] and 0 < abs(exact["logprobs"][0] - close["logprobs"][0]) < 0.05
    assert command.main(["sample", "--checkpoint", checkpoint, "--weights", "int4"]) == 2
    assert "weights: is 'int4', must be one of 'fp32', 'bf16', 'int8'" in capsys.readouterr().err
    assert command.main(["sample", "--checkpoint", checkpoint, "--min-p", "2"]) == 2
    assert capsys.readouterr().err == "barelm: min_p: must be in [0, 1), got 2.0\n"


@pytest.mark.parametrize("n", ["1", "3"])
def test_ctrl_c_ends_sample_and_keeps_what_is_whole(checkpoint, capsys, monkeypatch, n):
    flags = ["sample", "--checkpoint", checkpoint, "--prompt", "abc", "--max-tokens", "30", "--n", n, "--seed", "5"]
    assert command.main(flags) == 0
    whole = capsys.readouterr().out
    step, steps = engine.Engine.step, iter(range(99))

    def interrupted(self):
        if next(steps) == 4:
            if n == "3":
                assert len(self.rows) == 3
                self.rows[1].cancel()  # the second has ended before the first
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(engine.Engine, "step", interrupted)
    assert command.main(flags) == 130
    out, err = capsys.readouterr()
    assert err == "barelm: interrupted\n" and out.endswith("\n")
    if n == "1":
        assert whole.startswith(out[:-1]) and len(out) >= 4
    else:
        assert out.startswith("\n--- 2 of 3 ---\nabc") and "1 of 3" not in out and "3 of 3" not in out
