"""Whole models through the kernels of cuda/, on the CPU thread by thread (cuda/emulate), beside the CPU's own: what
model.c and session.c do with a backend whose memory is not the host's and whose activations are bf16.

With BARELM_CUDA_LIBRARY=.../libbarelm_cuda.so the same runs on a GPU.
"""

import ctypes
import json
from functools import partial

import numpy as np
import pytest
from barelm import Config, Lora, Model, Session
from barelm import __main__ as command
from barelm.drawing import Sampling, draw
from emulated import COMPILER, ON_GPU
from models import assert_all_same_bits, assert_same_bits, copies, random_batch, random_model
from test_threads import at_once

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler (CXX)")

SIZES = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=70, context=20)
CONFIGS = {
    "gpt2": SIZES,
    "llama": SIZES
    | dict(norm="rmsnorm", act="swiglu", pos="rope", bias=False, tied=False, n_kv_head=1, n_inner=24, head_size=8),
}
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture
def schedule(cuda_library, device):
    """Set the schedule of the emulation; a GPU has its own."""
    library = ctypes.CDLL(str(cuda_library))
    yield lambda seed: hasattr(library, "emulate_schedule") and library.emulate_schedule(ctypes.c_uint64(seed))
    if hasattr(library, "emulate_schedule"):
        library.emulate_schedule(ctypes.c_uint64(0))


def twins(config, precision, lora=None):
    """The same random weights on both devices."""
    cpu = random_model(config, precision)
    gpu = Model.empty(cpu.config, precision, "cuda")
    for name, p in cpu.params.items():
        gpu.put(name, 0, np.ascontiguousarray(p.T if name in gpu.transposed else p))
    for model in (cpu, gpu) if lora else ():
        adapt(model, lora)
    return cpu, gpu


def adapt(model, lora):
    """An adapter of random values."""
    model.adapt(lora, seed=3)
    for name, p in copies(model.adapter_params).items():
        values = np.random.default_rng(len(name)).normal(0, 0.2, p.shape).astype(np.float32)
        model.put(name, 0, values, "adapter")


def weights_of(targets):
    return (np.float32(1 / np.count_nonzero(targets >= 0)) * (targets >= 0)).astype(np.float32)


def step(model, tokens, targets):
    """A whole step: loss, gradients, norm, and the weights after it."""
    loss = model.forward_backward(tokens, targets, weights_of(targets))
    grads = copies(model.grads)
    return loss, grads, model.update(1e-2)


def with_heads_of_64(config):
    """For which attention is a Hopper's own too."""
    return config | dict(n_embd=64, n_head=1, **(dict(head_size=64) if "head_size" in config else {}))


@pytest.fixture
def hopper(cuda_library):
    """The emulated GPU is a Hopper, whose kernels are those of *_sm90.cu; a real one is what it is."""
    library = ctypes.CDLL(str(cuda_library))
    if not hasattr(library, "emulate_sm90"):
        pytest.skip("of the emulation")
    library.emulate_sm90(1)
    yield
    library.emulate_sm90(0)


both = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
adapters = pytest.mark.parametrize("lora", [None, Lora(rank=3, alpha=5.0)], ids=["all weights", "an adapter"])


@adapters
@both
def test_a_step_in_fp32_is_the_cpus(device, config, lora):
    """Sums in another order: a few units in the last place of the largest value, through two layers; 2e-5 is ten times
    what was met.  After AdamW's first step, which is a sign for tiny gradients, 1e-3 of lr in a few weights."""
    cpu, gpu = twins(config, "fp32", lora)
    tokens, targets = random_batch(config, 2, 9)
    starts = np.array([[0, 1, 1, 1, 4, 4, 4, 4, 4]] * 2, np.int32)
    for more in (None, starts):
        np.testing.assert_allclose(
            gpu.forward(tokens, targets, starts=more), cpu.forward(tokens, targets, starts=more), rtol=0, atol=2e-5
        )
    (loss, grads, norm), (want, want_grads, want_norm) = step(gpu, tokens, targets), step(cpu, tokens, targets)
    assert loss == pytest.approx(want, rel=1e-6) and norm == pytest.approx(want_norm, rel=1e-5)
    assert grads.keys() == want_grads.keys()
    for name, g in want_grads.items():
        np.testing.assert_allclose(grads[name], g, rtol=0, atol=2e-5 * np.abs(g).max(), err_msg=name)
    assert gpu.forward_backward(tokens, targets, weights_of(targets)) == pytest.approx(
        cpu.forward_backward(tokens, targets, weights_of(targets)), rel=1e-4
    )


@both
def test_a_step_in_bf16_is_close(device, config):
    """Activations are rounded to bf16 where the CPU keeps floats: 2^-9 a value and layer."""
    cpu, gpu = twins(config, "bf16")
    tokens, targets = random_batch(config, 2, 9)
    (loss, grads, norm), (want, want_grads, want_norm) = step(gpu, tokens, targets), step(cpu, tokens, targets)
    assert loss == pytest.approx(want, rel=0.02) and norm == pytest.approx(want_norm, rel=0.05)
    for name, g in want_grads.items():
        cosine = (grads[name] * g).sum() / np.sqrt((grads[name] ** 2).sum() * (g**2).sum())
        assert cosine > 0.98, name
    after = [m.forward_backward(tokens, targets, weights_of(targets)) for m in (gpu, cpu)]
    assert after[0] == pytest.approx(after[1], rel=0.05) and after[0] < loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@both
def test_a_step_has_the_same_bits_under_every_schedule(device, schedule, config, precision):
    tokens, targets = random_batch(config, 2, 9)
    results = []
    for seed in range(2 if ON_GPU else 4):  # which has but its own
        schedule(seed)
        _, gpu = twins(config, precision)
        loss, grads, norm = step(gpu, tokens, targets)
        results.append(grads | copies(gpu.params) | {"loss": np.float32(loss), "norm": np.float32(norm)})
    for other in results[1:]:
        assert_all_same_bits(other, results[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@both
def test_a_row_has_the_bits_it_has_alone_and_a_prefix_those_of_the_whole(device, config, precision):
    _, gpu = twins(config, precision)
    tokens, targets = random_batch(config, 3, 12)
    whole = gpu.forward(tokens, targets)
    assert_same_bits(gpu.forward(tokens[1:2].copy(), targets[1:2].copy()), whole[1:2])
    assert_same_bits(gpu.forward(tokens[:, :7].copy(), targets[:, :7].copy()), whole[:, :7])


@both
def test_a_hopper_is_as_close_and_keeps_the_bits_of_rows(device, hopper, config):
    config = with_heads_of_64(config)
    test_a_step_in_bf16_is_close(device, config)
    test_a_row_has_the_bits_it_has_alone_and_a_prefix_those_of_the_whole(device, config, "bf16")


@both
def test_doors_traces_and_logits(device, config):
    cpu, gpu = twins(config, "fp32")
    tokens, targets = random_batch(config, 2, 9)
    got, want = (m.forward(tokens, targets, hidden=True, entropy=True, temperature=0.7) for m in (gpu, cpu))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))
    dhidden = np.random.default_rng(1).normal(size=(2, 9, 16)).astype(np.float32)
    for m in (gpu, cpu):
        m.backward(-weights_of(targets), dhidden)
    for name, g in cpu.grads.items():
        np.testing.assert_allclose(gpu.grads[name], g, rtol=0, atol=2e-5 * np.abs(g).max(), err_msg=name)
    for name, a in cpu.trace(tokens).items():
        np.testing.assert_allclose(gpu.trace(tokens)[name], a, rtol=0, atol=2e-5 * max(1, np.abs(a).max()))
    np.testing.assert_allclose(gpu.logits(tokens, last=False), cpu.logits(tokens, last=False), rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights, off", [("fp32", 2e-5), ("bf16", 0.2), ("int8", 0.4)])
@both
def test_a_session_decodes(device, config, weights, off):
    """In fp32 as the model on the same device, up to the order of sums; rounded weights by what they round."""
    _, gpu = twins(config, "fp32")
    tokens, targets = random_batch(config, 2, 12, untrained=0)
    want, session = gpu.forward(tokens, targets), Session(gpu, 200, weights)
    rows, at = [session.add(), session.add()], 0
    for n in (5, 1, 1, 4):
        session.step(rows, [row[at : at + n] for row in tokens])
        at += n
        got = session.logprobs(targets[:, at - 1])
        np.testing.assert_allclose(got, want[:, at - 1], rtol=0, atol=off * (1 + np.abs(want[:, at - 1]).max() / 10))
    fork = session.fork(rows[0])[0]
    logits = session.step([fork], [[3]])
    assert_same_bits(session.step([rows[0]], [[3]]), logits)
    session.advance(rows, [[4], [5]])
    logits, samplings, u = session.logits(), [Sampling(temperature=0), Sampling(top_k=3)], [0.0, 0.6]
    ids, logprobs, sampled = session.draw(samplings, u)
    want_ids, want_sampled = draw(logits, samplings, u)
    assert ids.tolist() == want_ids.tolist()
    np.testing.assert_allclose(sampled, want_sampled, rtol=0, atol=1e-5)
    assert_same_bits(logprobs, session.logprobs(ids))


def check_recorded_steps(cuda_library, config, precision, weights):
    """Rows that come, go on alone and together, over the border of a page; beside each step a new session, which has
    recorded nothing, takes all tokens at once."""
    library = ctypes.CDLL(str(cuda_library))
    _, gpu = twins(config | dict(n_layer=1, context=80), precision)
    text = np.random.default_rng(5).integers(0, 70, (19, 80)).tolist()
    session = Session(gpu, 1600, weights)
    rows, length = [session.add() for _ in text], [0 for _ in text]
    turns = [{0: 62}, {0: 1}, {0: 1}, {0: 1}, {0: 1}, {1: 3}, {0: 1, 1: 1}, {0: 1, 1: 1}, {0: 1, 1: 1}, {0: 1}, {1: 1}]
    turns += [{0: 2}, {1: 2}, {1: 2}, {1: 2}, {0: 1, 1: 1}]
    turns += 3 * [dict.fromkeys(range(2, 19), 1)] + [{2: 17}]  # as many tokens on as many pages
    turns += [{3: 70}, {0: 1}]  # activations lie elsewhere from then on
    for i, turn in enumerate(turns):
        if i == 8 and hasattr(library, "emulate_move_scratch"):
            library.emulate_move_scratch()
        new = [text[r][length[r] : length[r] + n] for r, n in turn.items()]
        got = session.step([rows[r] for r in turn], new)
        for r, logits in zip(turn, got, strict=True):
            length[r] += turn[r]
            fresh = Session(gpu, 200, weights)
            assert_same_bits(fresh.step([fresh.add()], [text[r][: length[r]]])[0], logits)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@both
def test_a_recorded_step_of_a_session_has_the_bits_of_a_prompt(device, cuda_library, config, weights):
    check_recorded_steps(cuda_library, config, "fp32", weights)


@both
def test_a_recorded_step_on_a_hopper_has_the_bits_of_a_prompt(device, hopper, cuda_library, config):
    check_recorded_steps(cuda_library, with_heads_of_64(config), "bf16", "bf16")


@both
def test_other_weights_and_an_adapter_count_from_the_next_step_of_a_session_on(device, config):
    """What was recorded with those before is not used."""
    cpu, gpu = twins(config, "fp32")
    tokens, targets = random_batch(config, 1, 6)
    session = Session(gpu, 200)
    session.step([session.add()], [[1] * 18])  # room for activations that need not grow
    for change in (lambda m: step(m, tokens, targets), lambda m: adapt(m, Lora(rank=2))):
        for m in (gpu, cpu):
            change(m)
        session.refresh()
        row = session.add()
        for at in range(4):
            got = session.step([row], [tokens[0, at : at + 1].tolist()])
        want = Session(cpu, 200)
        want = want.step([want.add()], [tokens[0, :4].tolist()])
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
        session.free(row)


@both
def test_weights_packed_anew_count_from_the_next_step_of_a_session_on(device, config):
    """Products of few rows bring weights in bf16 before the kernels in front of them are complete."""
    _, gpu = twins(config, "fp32")
    tokens, targets = random_batch(config, 1, 6)
    session, seen = Session(gpu, 200, "bf16"), []
    for _ in range(2):
        row, fresh = session.add(), Session(gpu, 200, "bf16")
        seen.append([session.step([row], [[t]])[0] for t in tokens[0, :3].tolist()])
        assert_same_bits(fresh.step([fresh.add()], [tokens[0, :3].tolist()])[0], seen[-1][-1])
        step(gpu, tokens, targets)
        session.refresh()
        session.free(row)
    assert not np.array_equal(*seen)


@both
def test_a_checkpoint_goes_from_device_to_device(device, config, tmp_path):
    """Saved on one and loaded on the other, with moments: the next step is the same up to the order of sums."""
    _, gpu = twins(config, "fp32")
    tokens, targets = random_batch(config, 2, 9)
    step(gpu, tokens, targets)
    gpu.save(tmp_path / "a")
    cpu, again = Model.load(tmp_path / "a"), Model.load(tmp_path / "a", device="cuda")
    assert_all_same_bits(copies(again.params), copies(gpu.params))
    assert_all_same_bits(copies(again.moments[1]), copies(gpu.moments[1]))
    assert_all_same_bits(copies(cpu.moments[0]), copies(gpu.moments[0]))
    assert (cpu.step, again.step) == (1, 1)
    assert step(cpu, tokens, targets)[0] == pytest.approx(step(again, tokens, targets)[0], rel=1e-5)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@both
def test_an_adapter_on_weights_that_are_held_in_less(device, config, weights):
    """The same rounding on both devices, and then sums in another order, as in fp32."""
    made = []
    for place in ("cpu", "cuda"):
        model = Model.empty(Config(**config), "fp32", place, weights)
        for name, p in random_model(config).params.items():
            model.put(name, 0, np.ascontiguousarray(p.T if name in model.transposed else p))
        model.adapt(Lora(rank=3, alpha=5.0), seed=3)
        made.append(model)
    cpu, gpu = made
    assert_all_same_bits(copies(gpu.params), copies(cpu.params))
    tokens, targets = random_batch(config, 2, 9)
    for _ in range(2):
        (loss, grads, norm), (want, want_grads, want_norm) = step(gpu, tokens, targets), step(cpu, tokens, targets)
        assert loss == pytest.approx(want, rel=1e-5) and norm == pytest.approx(want_norm, rel=1e-4)
        for name, g in want_grads.items():
            np.testing.assert_allclose(grads[name], g, rtol=0, atol=1e-4 * np.abs(g).max() + 1e-8, err_msg=name)


def state_of(model):
    """All that a step changes."""
    first, second = (copies(moments) for moments in model.moments)
    return copies(model.params), first, second


def with_state(model, state, step):
    """Another model of the kind that has done nothing yet."""
    fresh = Model.empty(model.config, model.precision, "cuda")
    fresh.moments  # noqa: B018 (they exist from here on)
    for block, values in zip(("weights", "first moment", "second moment"), state, strict=True):
        for name, a in values.items():
            fresh.put(name, 0, np.ascontiguousarray(a.T if name in fresh.transposed else a), block)
    fresh.step = step
    return fresh


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@both
def test_a_step_that_is_recorded_has_the_bits_of_one_that_is_not(device, cuda_library, config, precision):
    """Of several micro-batches, with and without starts, of other sizes now and then, and with other numbers each time.
    What a model does for the first time is not recorded: a new one takes each step too."""
    library = ctypes.CDLL(str(cuda_library))
    config = config | dict(n_layer=1)
    _, gpu = twins(config, precision)
    starts = np.array([[0, 1, 1, 1, 4, 4, 4, 4, 4]] * 2, np.int32)
    others = {2: (2, 9, 0.5), 3: (1, 9, 1.0), 4: (2, 5, 1.0), 6: (3, 12, 1.0)}  # B, T, temperature
    for i in range(8):
        batches = [(*random_batch(config, 2, 9, seed=10 * i + j), None, 1.0) for j in range(2)]
        batches[1] = (*batches[1][:2], starts, 1.0)
        if i in others:
            B, T, temperature = others[i]
            batches.insert(0, (*random_batch(config, B, T, seed=99), None, temperature))
        if i == 5 and hasattr(library, "emulate_move_scratch"):
            library.emulate_move_scratch()
        fresh = with_state(gpu, state_of(gpu), gpu.step)
        norms = []
        for model in (gpu, fresh):
            for tokens, targets, more, temperature in batches:
                model.accumulate(tokens, targets, weights_of(targets) / 3, temperature, starts=more)
            norms.append(model.update(1e-2 / (i + 1), weight_decay=0.1 * i, clip=0.5 + i, loss_above=1e6))
        assert norms[0] == norms[1] and gpu.loss == fresh.loss > 0 and gpu.step == i + 1
        for a, b in zip(state_of(gpu), state_of(fresh), strict=True):
            assert_all_same_bits(a, b)


def test_a_step_above_a_limit_is_not_made(device):
    _, gpu = twins(CONFIGS["gpt2"], "bf16")
    tokens, targets = random_batch(CONFIGS["gpt2"], 2, 9)
    step(gpu, tokens, targets)
    before = state_of(gpu)
    for limits in (dict(skip_above=1e-6), dict(loss_above=1e-6)) * 3:
        gpu.accumulate(tokens, targets, weights_of(targets))
        assert gpu.update(1e-2, **limits) > 1e-6 and gpu.loss > 1e-6 and gpu.step == 1
    for a, b in zip(state_of(gpu), before, strict=True):
        assert_all_same_bits(a, b)


@both
def test_written_weights_count_from_the_next_pass_on(device, config):
    """Products read a copy in bf16, which `put` and `update` must not leave behind."""
    _, gpu = twins(config, "bf16")
    tokens, targets = random_batch(config, 2, 9)
    other = random_model(config, seed=7).params
    for _ in range(3):
        step(gpu, tokens, targets)
        assert_same_bits(
            gpu.forward(tokens, targets), with_state(gpu, state_of(gpu), gpu.step).forward(tokens, targets)
        )
    before = gpu.forward(tokens, targets)
    for name, a in other.items():
        gpu.put(name, 0, np.ascontiguousarray(a.T if name in gpu.transposed else a))
    after = gpu.forward(tokens, targets)
    assert (before != after).any()
    assert_same_bits(after, with_state(gpu, state_of(gpu), 0).forward(tokens, targets))


def test_a_bad_weight_is_named_when_the_step_ends(device):
    _, gpu = twins(CONFIGS["gpt2"], "bf16")
    tokens, targets = random_batch(CONFIGS["gpt2"], 2, 9)
    gpu.put("h.1.ln_2.bias", 0, np.full(16, np.inf, np.float32))
    for _ in range(3):
        gpu.accumulate(tokens, targets, weights_of(targets))
        with pytest.raises(FloatingPointError, match=r"weights: h\.1\.ln_2\.bias"):
            gpu.update(1e-2)
    with pytest.raises(FloatingPointError, match=r"weights: h\.1\.ln_2\.bias"):
        gpu.forward_backward(tokens, targets, weights_of(targets))


def test_models_of_two_threads_take_turns(device):
    """Their kernels share a stream and its working memory; each is made, trained, asked and freed by its own thread."""

    def work(config, seed):
        model = Model(Config(**config), device="cuda", seed=seed)
        for step in range(4):
            tokens, targets = random_batch(config, 2, 9, seed=seed + step)
            model.forward_backward(tokens, targets, weights_of(targets))
            model.update(1e-2)
        session = Session(model, 64)
        logits = session.step([session.add()], [tokens[0]])
        return copies(model.params) | {"logits": np.array(logits)}

    calls = [partial(work, config, seed) for seed, config in enumerate(CONFIGS.values())]
    for got, want in zip(at_once(*calls), [call() for call in calls], strict=True):
        assert_all_same_bits(got, want)


def test_values_are_copies_and_cannot_be_written(device):
    model = Model(Config(**SIZES), device="cuda")
    assert not model.has_views and model.device == "cuda"
    with pytest.raises(ValueError, match="read-only"):
        model.params["wte.weight"][0, 0] = 1
    with pytest.raises(KeyError):
        model.params["nothing"]


def test_a_gradient_that_is_not_finite_is_named(device):
    config = CONFIGS["llama"]
    _, gpu = twins(config, "fp32")
    tokens, targets = random_batch(config, 2, 9)
    gpu.forward_backward(tokens, targets, weights_of(targets))
    before = copies(gpu.params)
    gpu.put("layers.1.mlp.up_proj.weight", 3, np.full((1, 16), np.nan, np.float32), "gradients")
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        gpu.update(1e-2)
    assert_all_same_bits(copies(gpu.params), before)


def test_what_is_missing_is_said(device, monkeypatch, tmp_path):
    config = Config(**SIZES)
    with pytest.raises(ValueError, match="device: is 'gpu', must be 'cpu', 'cuda' or 'cuda:1'"):
        Model(config, device="gpu")
    with pytest.raises(RuntimeError, match="device: "):
        Model(config, device="cuda:7")
    monkeypatch.setenv("BARELM_CUDA_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(RuntimeError, match=r"device: .*none\.so"):
        Model(config, device="cuda")
    import barelm._core

    monkeypatch.setenv("BARELM_CUDA_LIBRARY", barelm._core.__file__)
    with pytest.raises(RuntimeError, match="is no library of barelm's CUDA kernels"):
        Model(config, device="cuda")


def test_training_sampling_and_scoring_on_it(device, tmp_path, capsys):
    """The commands, on the smallest of models; the loss falls, and a resumed run goes on."""
    (tmp_path / "text.txt").write_text("ab ab ab. " * 40)
    words = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--device", "cuda"]
    words += ["--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--context", "8", "--batch", "2", "--steps", "6"]
    words += ["--tokens-per-step", "16", "--eval-batches", "2", "--no-tensorboard", "--json", "--lr", "0.02"]
    assert command.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["after"]["loss"] < result["before"]["loss"]
    more = ["train", "--resume", "--out", str(tmp_path / "run"), "--device", "cuda", "--steps", "7"]
    assert command.main(more) == 0
    run = ["--checkpoint", str(tmp_path / "run"), "--device", "cuda"]
    assert command.main(["eval", *run, "--data", str(tmp_path / "text.txt"), "--max-tokens", "40"]) == 0
    assert command.main(["sample", *run, "--max-tokens", "4", "--temperature", "0"]) == 0
