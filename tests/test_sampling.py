"""Sampling: which token a number draws, and what text comes out of tokens."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from barelm import Tokenizer, generate
from barelm.engine import sample_token

LOGITS = np.log([0.1, 0.4, 0.2, 0.3])
US = (np.arange(1000) + 0.5) / 1000  # an even grid in place of random numbers: shares come out exactly


def shares(logits=LOGITS, temperature=1.0, top_k=None, top_p=1.0):
    drawn = Counter(sample_token(logits, temperature, top_k, top_p, u) for u in US)
    return [drawn[token] / len(US) for token in range(len(logits))]


def test_tokens_come_as_often_as_their_probability_says():
    assert shares() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.002)


def test_temperature_sharpens_and_flattens():
    p = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    assert shares(temperature=0.5) == pytest.approx(p / p.sum(), abs=0.002)
    assert shares(temperature=1e9) == pytest.approx([0.25] * 4, abs=0.002)


def test_temperature_zero_and_tiny_are_greedy():
    assert shares(temperature=0) == shares(temperature=1e-300) == [0, 1, 0, 0]
    assert sample_token([1.0, 2.0, 2.0], 0, None, 1.0, 0.99) == 1  # the first of equals


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


def test_a_token_of_no_probability_never_comes():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    below_one = np.nextafter(1.0, 0)
    assert [sample_token(logits, 1.0, None, 1.0, u) for u in (0.0, below_one)] == [1, 3]
    assert sample_token(logits, 1.0, 4, 0.99, below_one) == 3


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf], []])
def test_logits_from_which_nothing_can_be_drawn_are_refused(logits):
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="logits"):
            sample_token(np.array(logits), temperature, None, 1.0, 0.5)


def test_float32_logits_far_from_zero_are_drawn_alike():
    assert shares((LOGITS + 80).astype(np.float32)) == pytest.approx(shares(), abs=0.002)


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


TOK = Tokenizer.bytes()


def write(data, prompt="", **options):
    script = Script([*data, TOK.eot])
    return list(generate(script, TOK, prompt, **options)), script


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
    _, script = write(b"abc", "0123456789")
    assert script.shown[0] == list(b"23456789") and script.shown[1] == list(b"3456789a")
    assert write(b"a", "")[1].shown[0] == [TOK.eot]
    assert write(b"a", [65, 256])[1].shown[0] == [65, 256]


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
        return "".join(generate(Flat([]), TOK, "x", max_tokens=40, **options))

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
        ("seed", -1),
        ("row", -1),
        ("stop", [""]),
        ("prompt", [300]),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(name, value):
    options = {"prompt": "x"} | {name: value}
    with pytest.raises(ValueError, match=f"^{name}:"):
        generate(Script([]), TOK, **options)


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"^tok:"):
        generate(Script([], vocab_size=256), TOK, "x")
