"""benchmarks/bench_decode.py on tiny models: every contender is timed and computes the same model, ratios are those of
rounds, and the loss through sessions is that of the model."""

import sys
from pathlib import Path

import numpy as np
import pytest
from barelm import Model, Tokenizer
from barelm.data.documents import Documents
from barelm.data.shards import write_dataset
from barelm.evaluate import evaluate
from models import random_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_decode as bench
import decoders

TINY = decoders.Workload(
    dict(n_layer=2, n_head=4, n_embd=64, vocab_size=301, context=160), context=70, tokens=3, batch=3, prompt=100
)


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(bench, "PAUSE", 0)


def what(found):
    return [(r["name"], r["what"], r["rows"]) for r in found["results"]]


def check_times(found, rounds):
    for r in found["results"]:
        assert len(r["seconds"]) == rounds and min(r["seconds"]) > 0 and r["tokens_per_second"] > 0
        assert r["share_of_bandwidth"] is None or r["share_of_bandwidth"] > 0


@pytest.mark.slow
def test_every_session_is_timed(capsys):
    found = bench.race(TINY, list(bench.OWN), rounds=2, bandwidth_seconds=0.01)
    assert what(found) == [
        (name, activity, rows)
        for name in bench.OWN
        for activity, rows in (("decode", 1), ("decode", 3), ("prefill", 1), ("forward", 1))
        if (name, activity) != ("barelm int8", "forward")
    ]
    check_times(found, 2)
    assert len(found["bandwidth"]) == 2 * 6 and not found["left_out"] and len(found["ratios"]) == 8
    for m in found["memory"]:
        assert m["peak"] >= m["start"] + m["weights"] + m["cache"] and m["tokens"] == 160
    bench.show(found, TINY)
    assert "| barelm int8 | decode, 3 rows |" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_not_installed_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda package: None if package == "gguf" else True)
    found = bench.race(TINY, ["barelm fp32", "llama.cpp Q8_0"], rounds=1, bandwidth_seconds=0.01)
    assert found["left_out"] == {"llama.cpp Q8_0": "gguf not installed"}
    assert {name for name, *_ in what(found)} == {"barelm fp32"}


def test_shares_and_ratios_are_taken_within_a_round():
    def result(name, seconds):
        return {"name": name, "what": "decode", "rows": 1, "tokens": 15, "bytes": 1e9, "seconds": seconds}

    # the machine is slow after the first round: our times double, the bandwidth halves
    ours, theirs = result("barelm int8", [0.15, 0.30, 0.30]), result("llama.cpp Q8_0", [0.30, 0.60, 0.45])
    (ratio,) = bench.ratios([ours, theirs])
    assert ratio["of"] == "barelm int8, decode, 1 row" and ratio["times"] == pytest.approx(2)
    ours["bandwidth"] = [200e9, 100e9, 100e9]
    summary = bench.summary(ours, decoders.Workload(tokens=15))
    assert summary["share_of_bandwidth"] == pytest.approx(0.5)
    assert summary["step"] == pytest.approx(0.02) and summary["tokens_per_second"] == pytest.approx(50)


def test_the_faster_of_two_halves_is_the_rival():
    rates = {"barelm bf16": 1.0, "llama.cpp F16": 2.0, "llama.cpp BF16": 1.6}
    results = [{"name": n, "what": "decode", "rows": 1, "tokens": 1, "seconds": [s, s]} for n, s in rates.items()]
    (ratio,) = bench.ratios(results)
    assert ratio["to"] == "llama.cpp BF16, decode, 1 row" and ratio["times"] == pytest.approx(1.6)


def test_another_model_is_refused():
    model = random_model(TINY.sizes)
    want = model.logits(TINY.prompts()[:1])[0]
    first, second = model.params["h.1.attn.c_proj.bias"], model.params["h.1.mlp.c_proj.bias"]
    first[...], second[...] = second.copy(), first.copy()
    got = model.logits(TINY.prompts()[:1])[0]
    with pytest.raises(RuntimeError, match="barelm int8: its logits differ"):
        bench.check_logits("barelm int8", got, want)
    with pytest.raises(RuntimeError):
        bench.check_logits("barelm int8", np.full_like(want, np.nan), want)


@pytest.fixture
def run(tmp_path, rng):
    """The folder of a run with its data; the weights are random."""
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_bytes(bytes(rng.integers(97, 123, 400, dtype=np.uint8)))
    documents = Documents(tmp_path / "text")
    tok = Tokenizer.train((d.data for d in documents), 280)
    write_dataset(documents, tok, tmp_path / "data", val_fraction=0.3)
    random_model(TINY.sizes | dict(context=64)).save(tmp_path / "step_3")
    tok.save(tmp_path / "step_3")
    return tmp_path


def test_the_loss_of_fp32_sessions_is_the_models(run):
    found = bench.losses(run, n_tokens=500, rows=4)
    tok, model = Tokenizer.load(run / "step_3"), Model.load(run / "step_3")
    tokens = bench.Dataset.open(run / "data", tok).validation.read(0, 257).reshape(1, -1)
    want = model.forward(
        np.ascontiguousarray(tokens[:, :-1].reshape(4, 64)), np.ascontiguousarray(tokens[:, 1:].reshape(4, 64))
    )
    assert found["tokens"] == 256 and found["text"] == "held-out side of the run"
    assert found["nats"]["fp32"] == pytest.approx(-want.mean(dtype=np.float64), rel=1e-12)
    scored = evaluate(model, bench.Dataset.open(run / "data", tok).validation, B=4, T=64, batches=1)
    assert found["bytes"] == scored.n_bytes
    assert found["bits_per_byte"]["fp32"] == pytest.approx(scored.bits_per_byte, rel=1e-12)
    assert 0 == found["rms"]["fp32"] < found["rms"]["bf16"] < found["rms"]["int8"] < 0.2


def save(folder):
    model = random_model(TINY.sizes)
    model.save(folder, optimizer=False)
    return model


def test_turns_of_a_session_begin_alike(tmp_path):
    save(tmp_path)
    barelm = decoders.Barelm(TINY, "bf16", tmp_path)
    barelm.first()
    room = barelm.session.room
    for rows in (1, 3):
        assert barelm.decode(rows) > 0 and barelm.prefill(1) > 0
        assert [barelm.session.length(row) for row in barelm.rows] == [70] * 3 and barelm.session.room == room
    # 70 tokens, one that is not timed, then keys 72, 73 and 74; 2 layers, keys and values of 64 channels in bf16
    assert barelm.bytes_read(3) - barelm.bytes_read(1) == 2 * (2 * 2 * 64 * 2 * 73)


@pytest.mark.peers
def test_turns_of_peers_begin_alike(tmp_path):
    for package in ("torch", "transformers", "xllamacpp", "gguf"):
        pytest.importorskip(package)
    bench.write_gguf(save(tmp_path), tmp_path, "F16")
    transformers, llama = decoders.Transformers(TINY, "fp32", tmp_path), decoders.Llama(TINY, "F16", tmp_path)
    for peer in (transformers, llama):
        peer.first()
        assert peer.decode(1) > 0 and peer.decode(1) > 0
    assert transformers.cache.get_seq_length() == llama.llama.length == 70


@pytest.mark.peers
def test_every_peer_decodes_the_same_model():
    for package in {package for packages in bench.PEERS.values() for package in packages}:
        pytest.importorskip(package)
    found = bench.race(TINY, list(bench.PEERS), rounds=1, bandwidth_seconds=0.01)
    assert what(found) == [(name, "decode", 1) for name in bench.PEERS] and not found["left_out"]
    check_times(found, 1)


@pytest.mark.peers
@pytest.mark.parametrize("kind, tolerance", [("F32", 1e-3), ("F16", 2e-3), ("BF16", 1e-2), ("Q8_0", 4e-2)])
def test_llama_cpp_gives_our_logits(tmp_path, kind, tolerance):
    """Tolerances: rounding of the matrices, and keys and values in F16, about twice what is met."""
    pytest.importorskip("xllamacpp"), pytest.importorskip("gguf")
    import llama_cpp

    model = random_model(TINY.sizes)
    matrices = sum(p.size for n, p in model.params.items() if p.ndim == 2 and n != "wpe.weight")
    vectors = sum(p.size for p in model.params.values() if p.ndim == 1)
    size = {"F32": 4, "F16": 2, "BF16": 2, "Q8_0": 34 / 32}[kind]
    assert llama_cpp.write(model, tmp_path / "model.gguf", kind) == size * matrices + 4 * vectors
    llama = llama_cpp.LlamaCpp(tmp_path / "model.gguf", 301, 2)
    tokens = TINY.prompts()[:1, :40]
    want = model.logits(tokens)[0]

    def error(got):
        return np.sqrt(np.mean((got - want) ** 2)) / want.std()

    assert error(llama.step(tokens[0])) < tolerance
    llama.cut(30)
    for token in tokens[0, 30:]:
        got = llama.step([token])
    assert error(got) < tolerance and llama.length == 40
