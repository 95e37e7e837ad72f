"""`--profile`: every operator that a step calls is in the table, at its size, and timing changes no bit."""

import json
import subprocess
import sys

import pytest

STEPS = """
import json, sys
from dataclasses import asdict
import numpy as np
from barelm import Config, Model
from barelm.profile import Profile

before = Model(Config(**json.loads(sys.argv[1])), seed=1)
profile = Profile()
model = Model(Config(**json.loads(sys.argv[1])), seed=1)
rng = np.random.default_rng(0)
tokens, targets = rng.integers(0, model.config.vocab_size, (2, 3, 20)).astype(np.int32)
weights = np.full((3, 20), 1 / 60, np.float32)

def step(model):
    model.forward_backward(tokens, targets, weights)
    model.update(1e-3)

for _ in range(int(sys.argv[2])):
    step(before)
    with profile.step():
        step(model)
    step(before)
    step(model)  # not within a step
same = all((p == before.params[name]).all() for name, p in model.params.items())
lines = [asdict(line) for line in profile.lines()]
print(json.dumps({"steps": profile.steps, "seconds": profile.seconds, "same": same, "lines": lines,
                  "table": profile.table(1e11, least=float(sys.argv[3]))}))
"""
SIZES = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=100, context=32)
GPT2, LLAMA = SIZES, SIZES | dict(norm="rmsnorm", act="swiglu", pos="rope", n_kv_head=2, bias=False, tied=False)


def profiled(config, steps=3, least=0.0):
    """In a process of its own: there, every model from then on is timed."""
    command = [sys.executable, "-c", STEPS, json.dumps(config), str(steps), str(least)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def calls(found):
    """{operator: calls a step}, over all sizes"""
    out = {}
    for line in found["lines"]:
        out[line["operator"]] = out.get(line["operator"], 0) + line["calls"]
    return out


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_steps_operators(config):
    found, L = profiled(config), 2
    assert found["same"]
    assert found["steps"] == 2  # the first is left out
    count = calls(found)
    assert count["linear_forward"] == 4 * L + 1 and count["linear_backward_weight"] == 4 * L + 1
    assert count["attention_forward"] == count["attention_backward"] == L
    norm = "layernorm" if config is GPT2 else "rmsnorm"
    assert count[f"{norm}_forward"] == count[f"{norm}_backward"] == 2 * L + 1
    assert count.get("swiglu_backward", 0) == (0 if config is GPT2 else L)
    assert all(line["seconds"] > 0 for line in found["lines"][:-1])


def test_the_shares_are_those_of_the_step():
    found = profiled(GPT2)
    lines = found["lines"]
    assert sum(line["share"] for line in lines) == pytest.approx(1)
    assert sum(line["seconds"] for line in lines) * found["steps"] == pytest.approx(found["seconds"])
    assert lines[-1]["operator"] == "" and 0 < lines[-1]["share"] < 1
    assert [line["seconds"] for line in lines[:-1]] == sorted((line["seconds"] for line in lines[:-1]), reverse=True)


def test_sizes_and_rates():
    lines = {(line["operator"], tuple(line["sizes"].items())): line for line in profiled(GPT2)["lines"]}
    product = lines["linear_forward", (("held", 0), ("fn", 1), ("prec", 0), ("N", 60), ("C", 32), ("OC", 128))]
    assert product["flops"] == pytest.approx(2 * 60 * 32 * 128 * product["calls"] / product["seconds"])
    scores = lines["attention_forward", (("prec", 0), ("B", 3), ("T", 20), ("NH", 4), ("NKV", 4), ("HS", 8))]
    pairs = 3 * 4 * (20 * 21 // 2)  # of a query and a key that it sees
    assert scores["flops"] == pytest.approx(2 * 2 * 8 * pairs * scores["calls"] / scores["seconds"])
    norm = lines["layernorm_forward", (("N", 60), ("C", 32))]
    assert norm["bytes"] == pytest.approx(2 * 4 * 60 * 32 * norm["calls"] / norm["seconds"]) and norm["flops"] is None


def test_a_single_step_counts():
    assert profiled(GPT2, steps=1)["steps"] == 1


def test_the_table():
    table = profiled(GPT2)["table"].splitlines()
    assert table[0].split() == ["operator", "size", "calls", "ms", "%", "GFLOP/s", "%", "of", "peak", "GB/s"]
    assert table[-1].startswith("between them")
    assert any("N 60 x C 32 x OC 96" in line for line in table)
    short = profiled(GPT2, least=0.9)["table"].splitlines()
    assert len(short) == 3 and " more " in short[1] and short[2].startswith("between them")


def test_barelm_train_profile(tmp_path):
    sizes = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--context", "16", "--batch", "2", "--steps", "2"]
    (tmp_path / "text.txt").write_text("some text to learn from, again and again\n" * 50)
    data = ["--data", str(tmp_path / "text.txt"), "--split-at", "\n", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "barelm", "train", "--profile", "--json", *sizes, *data]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "between them" in done.stderr
    result = json.loads(done.stdout)
    assert {"linear_forward", "adamw", ""} <= {line["operator"] for line in result["profile"]}
    resumed = [
        sys.executable,
        "-m",
        "barelm",
        "train",
        "--resume",
        "--steps",
        "3",
        "--json",
        "--out",
        str(tmp_path / "run"),
    ]
    assert json.loads(subprocess.run(resumed, capture_output=True, text=True, check=True).stdout)["profile"] == []
