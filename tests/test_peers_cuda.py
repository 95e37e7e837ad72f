"""Whole models through the kernels of cuda/ beside PyTorch: logits, gradients, ten steps; and on a GPU a training run
beside the CPU's.  BARELM_CUDA_LIBRARY as in test_cuda_model.py: without it small models run in the emulation, beside
PyTorch on the CPU; with it GPT-2 124M's width on the GPU, beside PyTorch there.
"""

import os

import numpy as np
import pytest
from barelm import Config, Model
from barelm.loop import step
from conftest import GPT2, LLAMA
from emulated import COMPILER

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import torch_gpt2  # noqa: E402 (it needs torch)
from test_peers import empty_twin, loss_weights, named  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.skipif(not COMPILER, reason="no C++ compiler (CXX)")]

ON_GPU = "BARELM_CUDA_LIBRARY" in os.environ and torch.cuda.is_available()
THERE = "cuda" if ON_GPU else "cpu"
SIZES = dict(n_layer=2, n_embd=768, n_head=12, vocab_size=50257, context=300) if ON_GPU else dict(n_layer=1)
CONFIGS = {
    "gpt2": GPT2 | SIZES,
    "llama": LLAMA | SIZES | (dict(n_kv_head=4, n_inner=2048, head_size=64) if ON_GPU else {}),
}
B, T = (2, 300) if ON_GPU else (2, 9)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return Config(**request.param)


@pytest.fixture
def batch(config, rng):
    tokens, targets = (rng.integers(0, config.vocab_size, (B, T), dtype=np.int32) for _ in range(2))
    targets[rng.random((B, T)) < 0.2] = -1
    return tokens, targets


def pair(config, precision):
    """The same random weights on the device and in PyTorch, in float32."""
    model = Model(config, seed=3, precision=precision, device="cuda")
    twin = empty_twin(config).to(THERE)
    rng = np.random.default_rng(4)
    with torch.no_grad():
        for name, p in named(twin).items():
            values = model.params[name].copy()
            if values.ndim == 1:  # they begin as 0 or 1, where much would not show
                values += rng.normal(0, 0.2, values.shape).astype(np.float32)
                model.put(name, 0, values)
            p.copy_(torch.tensor(values))
    return model, twin


def run(twin, tokens, targets):
    """Logits, loss and gradients of PyTorch, as float32 arrays."""
    ids, wanted = (torch.tensor(a, device=THERE).long() for a in (tokens, targets))
    twin.zero_grad()
    logits = twin(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=-1)
    loss.backward()
    grads = {name: p.grad.float().cpu().numpy() for name, p in named(twin).items()}
    return logits.detach().float().cpu().numpy(), loss.item(), grads


def error(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measured(model, tokens, targets):
    logits = model.logits(tokens, last=False)
    loss = model.forward_backward(tokens, targets, loss_weights(targets))
    return logits, loss, dict(model.grads)


def test_logits_and_gradients_in_fp32(device, config, batch):
    """Both sides are float32 and add up in another order.  A key bias has the gradient 0, all of it rounding."""
    model, twin = pair(config, "fp32")
    (logits, loss, grads), (want, want_loss, want_grads) = measured(model, *batch), run(twin, *batch)
    assert error(logits, want) < 1e-5 and loss == pytest.approx(want_loss, rel=1e-6)
    assert grads.keys() == want_grads.keys()
    for name, g in want_grads.items():
        assert error(grads[name], g) < 2e-5 or name.endswith("k_proj.bias"), name


def test_bf16_is_as_close_to_float32_as_pytorchs(device, config, batch):
    """The yardstick is PyTorch's model with weights and activations in bf16; ours has weights in float32, rounded for
    products alone."""
    model, twin = pair(config, "bf16")
    want, want_loss, want_grads = run(twin, *batch)
    theirs, their_loss, their_grads = run(twin.bfloat16(), *batch)
    logits, loss, grads = measured(model, *batch)
    assert error(logits, want) < 1.5 * error(theirs, want)
    assert abs(loss - want_loss) < 1.5 * abs(their_loss - want_loss) + 2e-3 * want_loss
    ours = {name: error(grads[name], g) for name, g in want_grads.items() if not name.endswith("k_proj.bias")}
    yardstick = {name: error(their_grads[name], want_grads[name]) for name in ours}
    assert np.mean(list(ours.values())) < 1.2 * np.mean(list(yardstick.values()))
    for name in ours:
        assert ours[name] < 2 * yardstick[name] + 2e-3, name


@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_ten_steps(device, config, batch, precision, close):
    model, twin = pair(config, precision)
    lr, hyper, clip = 1e-3, dict(betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1), 0.5
    optimizer = torch_gpt2.adamw(twin, lr, **hyper)
    losses = []
    for _ in range(10):
        _, loss, _ = run(twin, *batch)
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip).item()
        optimizer.step()
        result = step(model, [batch], lr, clip=clip, **hyper)
        assert result.loss == pytest.approx(loss, rel=close) and result.norm == pytest.approx(norm, rel=5 * close)
        losses.append(loss)
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not ON_GPU, reason="a training run: minutes in the emulation")
def test_a_training_run_is_the_cpus(device, test_data):
    """200 steps of a small model in bf16 on real text: the CPU's loss within 0.5 % at every tenth step, and the same
    bits in a second run."""
    data = np.frombuffer((test_data / "text" / "tinystories_2MB.txt").read_bytes(), np.uint8).astype(np.int32)
    config, losses = Config(n_layer=4, n_head=4, n_embd=128, vocab_size=256, context=128), []
    for place in ("cpu", "cuda", "cuda"):
        model, rng = Model(config, seed=1, precision="bf16", device=place), np.random.default_rng(3)
        found = []
        for _ in range(200):
            rows = np.stack([data[i : i + 129] for i in rng.integers(0, data.size - 129, 8)])
            batch = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
            found.append(step(model, [batch], 1e-3).loss)
        losses.append(found)
    assert losses[1] == losses[2]
    np.testing.assert_allclose(losses[1][9::10], losses[0][9::10], rtol=5e-3)
    assert losses[1][-1] < 0.6 * losses[1][0]
