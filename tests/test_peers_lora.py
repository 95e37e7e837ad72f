"""Adapters beside PEFT: its files in both directions, logits, gradients and AdamW steps.

Tolerances as in test_peers.py: both sides are fp32 and add up in another order (CLOSE, of an array's largest value).
"""

import numpy as np
import pytest
from barelm import Config, Lora, Model
from conftest import GPT2, LLAMA
from test_peers import CLOSE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore"),  # PEFT's of GPT-2's Conv1D, and those of what it imports
]

CASES = {
    "gpt2, all": (GPT2, dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2, one": (GPT2, dict(r=3, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, use_rslora=True)),
    "llama, q and v": (LLAMA, dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])),
    "llama, all": (LLAMA | dict(bias=True), dict(r=5, lora_alpha=2, target_modules="all-linear")),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def pair(request, tmp_path, rng):
    """PEFT's model with random A's and B's, saved; the folder; barelm's model of that folder."""
    config, options = request.param
    base = Model(Config(**config))
    for p in base.params.values():
        p[...] = rng.normal(0, 0.2, p.shape) + (p.ndim == 1)
    base.save(tmp_path / "base")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    twin = peft.get_peft_model(twin, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if "lora_" in name:
                p.copy_(torch.tensor(rng.normal(0, 0.2, p.shape)))
    twin.save_pretrained(tmp_path / "adapter")
    return twin, tmp_path, Model.load(tmp_path / "adapter")


def batch(model, rng):
    shape = (3, model.config.context - 1)
    return (rng.integers(0, model.config.vocab_size, shape, dtype=np.int32) for _ in range(2))


def close(got, want, what=""):
    want = want.detach().numpy() if hasattr(want, "detach") else want
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE * np.abs(want).max(), err_msg=what)


def own_name(name):
    """PEFT's name of a parameter as ours."""
    name = name.removeprefix("base_model.model.").removeprefix("transformer.").removeprefix("model.")
    return name.replace(".default.", ".")


def test_logits_and_gradients_and_steps(pair, rng):
    twin, _, model = pair
    tokens, targets = batch(model, rng)
    ids, labels = torch.tensor(tokens).long(), torch.tensor(targets).long()
    close(model.logits(tokens, last=False), twin(ids).logits)
    optimizer = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    for step in range(5):
        loss = torch.nn.functional.cross_entropy(twin(ids).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        weights = np.full(tokens.shape, 1 / tokens.size, np.float32)
        assert model.forward_backward(tokens, targets, weights) == pytest.approx(loss.item(), rel=1e-5)
        wanted = {own_name(n): p.grad for n, p in twin.named_parameters() if p.requires_grad}
        assert wanted.keys() == model.grads.keys()
        if step == 0:  # later ones differ by what AdamW made of the last bits of small gradients
            for name, g in wanted.items():
                close(model.grads[name], g, name)
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        assert model.update(lr=1e-2) == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
    for name, p in twin.named_parameters():
        if p.requires_grad:
            np.testing.assert_allclose(model.adapter_params[own_name(name)], p.detach().numpy(), rtol=0, atol=2e-4)


def test_peft_reads_what_we_write(pair, rng):
    _, folder, model = pair
    tokens, targets = batch(model, rng)
    model.forward_backward(tokens, targets, np.full(tokens.shape, 1 / tokens.size, np.float32))
    model.update(1e-2)
    model.save(folder / "ours")
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    twin = peft.PeftModel.from_pretrained(twin, folder / "ours")
    close(model.logits(tokens, last=False), twin(torch.tensor(tokens).long()).logits)
    merged = twin.merge_and_unload()
    close(model.logits(tokens, last=False), merged(torch.tensor(tokens).long()).logits)


def test_the_same_modules_are_targets(pair):
    twin, _, model = pair
    theirs = {own_name(n).rpartition(".lora_")[0] for n, _ in twin.named_parameters() if "lora_" in n}
    ours = {name.rpartition(".lora_")[0] for name in model.adapter_params}
    assert ours == theirs
    assert Lora(targets="all-linear").modules(model.config)
