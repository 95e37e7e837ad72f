"""barelm beside PyTorch, transformers and tokenizers: the same names, shapes, logits, gradients, updates, files, ids
and loss in the end.  Nothing is fetched: models are built from configs, with random weights.

Tolerances: both sides are fp32 and add up in another order, so they differ by a few units in the last place of the
largest value of an array (CLOSE, of that value; the largest difference met is 2e-6 of it).
"""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import recipe
from barelm import Config, Model, Tokenizer
from barelm.convert import huggingface as hf
from barelm.loop import step
from conftest import GPT2, LLAMA
from models import threads
from test_tokenizer import TOKENIZERS

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
import torch_gpt2  # noqa: E402 (it needs torch)

pytestmark = pytest.mark.peers

# Wavelengths of 16 channels are 6, 20, 63, 199 ...; this stretch leaves the first as it is, bends the next two (between
# 64 / 4 and 64 / 1 positions) and divides the rest.
STRETCH = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
CONFIGS = {
    "gpt2": GPT2,
    "gpt2, erf": GPT2 | dict(act="gelu_erf"),
    "gpt2, untied, odd sizes": GPT2 | dict(tied=False, n_head=3, n_kv_head=3, n_embd=21, n_inner=33, norm_eps=1e-3),
    "llama, grouped queries": LLAMA,
    "llama, tied": LLAMA | dict(tied=True, rope_theta=500000.0),
    "llama, wide heads, biases": LLAMA | dict(head_size=10, bias=True, norm_eps=1e-6),
    "llama, stretched": LLAMA | dict(head_size=16, context=128, rope_scaling=STRETCH),
}
CLOSE = 5e-6


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request, rng):
    """A barelm model whose every parameter is random: none is 0 or 1 as after initialisation."""
    model = Model(Config(**request.param))
    for name, p in model.params.items():
        if p.ndim == 2:
            p[...] = rng.normal(0, 0.2, p.shape)
        else:
            p[...] = rng.normal(1 if "bias" not in name else 0, 0.3, p.shape)
    return model


def empty_twin(config):
    """What transformers makes of our config.json."""
    description = hf.config_to_hf(config)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**description))


def named(twin):
    """transformers' parameters under our names."""
    return {name.removeprefix("transformer.").removeprefix("model."): p for name, p in twin.named_parameters()}


@pytest.fixture
def twin(model):
    """transformers' model with the same weights."""
    twin = empty_twin(model.config)
    with torch.no_grad():
        for name, p in named(twin).items():
            p.copy_(torch.tensor(model.params[name]))
    return twin


@pytest.fixture
def batch(model, rng):
    """tokens, targets (B, T) int32; some targets are -1."""
    shape = (3, model.config.context - 1)
    tokens, targets = (rng.integers(0, model.config.vocab_size, shape, dtype=np.int32) for _ in range(2))
    targets[rng.random(shape) < 0.2] = -1
    return tokens, targets


def logits_of(twin, tokens):
    with torch.no_grad():
        return twin(torch.tensor(tokens).long()).logits.numpy()


def cross_entropy(twin, tokens, targets):
    """Mean over the targets that are not -1."""
    logits, targets = twin(torch.tensor(tokens).long()).logits.flatten(0, 1), torch.tensor(targets).long().flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1)


def loss_weights(targets):
    return np.where(targets >= 0, 1 / np.count_nonzero(targets >= 0), 0).astype(np.float32)


def assert_close(name, got, want, tol=CLOSE):
    assert got.shape == want.shape, name
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * np.abs(want).max(), err_msg=name)


# ---- the transformers


def test_names_and_shapes(model):
    theirs = {name: tuple(p.shape) for name, p in named(empty_twin(model.config)).items()}
    assert {name: p.shape for name, p in model.params.items()} == theirs


def test_logits(model, twin, batch):
    tokens, _ = batch
    want = logits_of(twin, tokens)
    assert_close("logits", model.logits(tokens, last=False), want)
    assert_close("logits", model.logits(tokens), want[:, -1])


def test_gradients(model, twin, batch):
    loss = cross_entropy(twin, *batch)
    loss.backward()
    assert model.forward_backward(*batch, loss_weights(batch[1])) == pytest.approx(loss.item(), rel=1e-6)
    largest = max(p.grad.abs().max().item() for p in twin.parameters())
    for name, p in named(twin).items():
        want = p.grad.numpy()
        # A key bias moves all scores of a query alike: its gradient is 0, and rounding errors are all there is to see.
        size = largest if name.endswith("k_proj.bias") else np.abs(want).max()
        np.testing.assert_allclose(model.grads[name], want, rtol=0, atol=CLOSE * size, err_msg=name)


def test_ten_steps_of_adamw(model, twin, batch):
    # eps is far above the rounding errors of gradients: where a gradient is 0 but for them (a key bias), a small eps
    # would make whole steps out of them, with signs at random.  Gradients are some 1e-2, so AdamW still divides.
    lr, hyper, clip = 3e-3, dict(betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1), 0.2
    optimizer = torch_gpt2.adamw(twin, lr, **hyper)
    clipped = 0
    for _ in range(10):
        optimizer.zero_grad()
        loss = cross_entropy(twin, *batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip).item()
        optimizer.step()
        result = step(model, [batch], lr, clip=clip, **hyper)
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.norm == pytest.approx(norm, rel=1e-5)
        clipped += norm > clip
    assert clipped >= 5
    for name, p in named(twin).items():
        assert_close(name, model.params[name], p.detach().numpy())


# ---- files


def test_transformers_opens_our_folder(model, batch, tmp_path):
    model.save(tmp_path / "saved")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, p in named(twin).items():
        np.testing.assert_array_equal(p.detach().numpy(), model.params[name], err_msg=name)
    tokens, _ = batch
    assert_close("logits", model.logits(tokens, last=False), logits_of(twin, tokens))


def test_we_open_a_folder_of_transformers(model, twin, batch, tmp_path):
    twin.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["transformers_version"]
    loaded = Model.load(tmp_path)
    assert loaded.config == model.config
    for name, p in model.params.items():
        np.testing.assert_array_equal(loaded.params[name], p, err_msg=name)
    tokens, _ = batch
    np.testing.assert_array_equal(loaded.logits(tokens), model.logits(tokens))


# ---- the tokenizer

TEXTS = [
    "",
    "Hello world",
    "  spaces   and\n\n\n lines \t",
    "l'été, 東京 and 🙂🙃",
    "it's we'll I'D 12345 3.14",
    "hello w\u0301he\u00e9",
    "\x00\x7f\u200b",
    "a" * 500,
    " " * 500 + "x",
]


def assert_same_ids(tok, folder, texts):
    theirs = tokenizers.Tokenizer.from_file(str(tok.save(folder)))
    for text in texts:
        ids = theirs.encode(text).ids
        assert tok.encode(text) == ids
        assert theirs.decode(ids) == tok.decode(ids)
    for special in tok.special:
        text = f"one{special}two {special}"
        assert tok.encode(text, special=True) == theirs.encode(text).ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_opens_our_file(name, tmp_path):
    assert_same_ids(TOKENIZERS[name], tmp_path, TEXTS)


def test_tokenizers_opens_gpt2s_vocabulary_as_we_write_it(test_data, tmp_path):
    tok = Tokenizer.gpt2(test_data / "tok" / "gpt2_vocab.bpe", test_data / "tok" / "gpt2_encoder.json")
    long = (test_data / "text" / "wiki_demo.txt").read_text()[:100_000]
    assert_same_ids(tok, tmp_path, [*TEXTS, long])


# ---- training


@pytest.fixture
def one_thread_each():
    """For two that train side by side: threads of both on the same cores spin much longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threads(1):
        yield
    torch.set_num_threads(before)


SIDE_BY_SIDE = 300  # steps that PyTorch takes too; of 2,000 it would take most of the time of all these tests


def train_torch(twin, text):
    """The first steps of nanoGPT's recipe in PyTorch; its loss over the whole validation part."""
    rng = np.random.default_rng(0)
    optimizer = torch_gpt2.adamw(twin, recipe.LR, **recipe.ADAMW, fused=True)
    for n in range(SIDE_BY_SIDE):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(n)
        tokens, targets = (torch.from_numpy(a).long() for a in text.batch(rng))
        twin(tokens, targets).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), recipe.CLIP)
        optimizer.step()
        optimizer.zero_grad()

    def logprobs(tokens, targets):
        with torch.no_grad():
            return -twin(torch.from_numpy(tokens).long(), torch.from_numpy(targets).long(), reduction="none").numpy()

    return recipe.validation_loss(logprobs, text)


@pytest.mark.slow
def test_nanogpts_recipe_reaches_its_loss_and_pytorchs(test_data, one_thread_each):
    text = recipe.Text.read(test_data / "text" / "tinyshakespeare.txt")
    model, rng = recipe.make_model(text), np.random.default_rng(0)
    twin = torch_gpt2.GPT2(model.config).load(model.params)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(train_torch, twin, text)
        for n in range(recipe.STEPS):
            if n == SIDE_BY_SIDE:
                halfway = recipe.validation_loss(model.forward, text)
            step(model, [text.batch(rng)], recipe.learning_rate(n), clip=recipe.CLIP, **recipe.ADAMW)
        ours = recipe.validation_loss(model.forward, text)
    # nanoGPT's README says 1.88, from 20 batches at random.  Over the whole part, in windows side by side, seeds give
    # 1.897 to 1.902.
    assert ours <= 1.91
    assert ours > 1.7, "better than the recipe can be: it has seen the answers"
    # Rounding errors of 2,000 steps have come to 3e-7, and may grow otherwise elsewhere; another seed makes 3e-3.
    assert abs(halfway - theirs.result()) < 1e-3


SIZE_OF_124M = dict(vocab_size=50257, context=1024, n_layer=12, n_head=12, n_embd=768)
LARGE = {
    "gpt2": Config.preset("gpt2"),
    "llama": Config(**LLAMA | SIZE_OF_124M | dict(n_kv_head=4, head_size=64, n_inner=2048, tied=True)),
}


@pytest.mark.parametrize("config", LARGE.values(), ids=LARGE.keys())
def test_models_of_124m(config, tmp_path):
    """Out to transformers, logits and gradients there, and back in with the same bits.  Sums over 768 channels and 12
    layers: ten times what the small models leave."""
    model = Model(config, seed=5)
    model.save(tmp_path / "ours", optimizer=False)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    rng = np.random.default_rng(6)
    batch = [rng.integers(0, config.vocab_size, (1, 32), dtype=np.int32) for _ in range(2)]
    assert_close("logits", model.logits(batch[0], last=False), logits_of(twin, batch[0]), 10 * CLOSE)
    loss = cross_entropy(twin, *batch)
    loss.backward()
    assert model.forward_backward(*batch, loss_weights(batch[1])) == pytest.approx(loss.item(), rel=1e-6)
    for name, p in named(twin).items():
        assert_close(name, model.grads[name], p.grad.numpy(), 10 * CLOSE)
    twin.save_pretrained(tmp_path / "theirs")
    again = Model.load(tmp_path / "theirs")
    assert again.config == config
    assert all((again.params[name] == p).all() for name, p in model.params.items())
