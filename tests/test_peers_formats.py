"""Files beside the programs that they are for: llama.cpp, the gguf package, transformers and tokenizers.

Tolerances: transformers computes in fp32 as we do, so results differ by a few units in the last place of the largest
(CLOSE, of that value).  llama.cpp keeps keys and values in F16, and rounds rows to the kind of the weights (to 8 bits
for Q8_0) before a product; on these random models that has moved logits by 0.003, 0.011 and 0.036 of the largest one
(LLAMA_CPP).  Queries and keys in the wrong order move them by more than 0.2.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import test_ends
from barelm import Config, Model, Tokenizer, checkpoint, generate
from barelm.convert import generation, gguf, llama2c
from barelm.convert.numbers import from_float32, to_float32
from barelm.convert.recognise import open_source
from barelm.convert.source import Source
from barelm.sentencepiece import SentencePiece
from conftest import GPT2, LLAMA
from formats import small_pieces
from models import assert_all_same_bits, assert_same_bits, copies, random_model
from test_formats import published, values_of
from test_tokenizer import load_gpt2

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
peer_gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from llama_cpp import LlamaCpp, int32, library, pointer, write  # noqa: E402 (they need xllamacpp)

pytestmark = pytest.mark.peers

CLOSE = 5e-6
LLAMA_CPP = {"F32": 5e-3, "F16": 5e-3, "BF16": 2e-2, "Q8_0": 6e-2}
STRETCH = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
WIDE = dict(n_embd=64, n_head=4, n_inner=96, vocab_size=300, context=64)  # rows of whole blocks of Q8_0
CONFIGS = {
    "gpt2": GPT2 | WIDE | dict(n_kv_head=4),
    "gpt2, untied": GPT2 | WIDE | dict(n_kv_head=4, tied=False),
    "llama": LLAMA | WIDE,
    "llama, tied, biases": LLAMA | WIDE | dict(tied=True, bias=True, n_kv_head=1),
    "llama, wide heads": LLAMA | WIDE | dict(head_size=32),
    "llama, stretched": LLAMA | WIDE | dict(context=256, rope_theta=500000.0, head_size=32, rope_scaling=STRETCH),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param])


@pytest.fixture
def stories(test_data, tmp_path):
    """(a folder with stories260K, its tokenizer)"""
    tok = Tokenizer.load(test_data / "ckpt" / "tok512.bin")
    source = llama2c.read(test_data / "ckpt" / "stories260K.bin")
    checkpoint.write(source, tmp_path / "stories", files=generation.files_of(tok))
    return tmp_path / "stories", tok


def tokens_of(config, n):
    return np.random.default_rng(5).integers(0, config.vocab_size, (1, n)).astype(np.int32)


def theirs(folder, tokens, **options):
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return twin(torch.tensor(tokens).long()).logits.float().numpy()


def assert_close(got, want, tol):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * np.abs(want).max())


# ---- llama.cpp


@pytest.mark.parametrize("kind", gguf.KINDS)
def test_llama_cpp_computes_the_same_logits(model, kind, tmp_path):
    gguf.write(Source.of_model(model), tmp_path / "a.gguf", kind)
    checkpoint.write(gguf.read(tmp_path / "a.gguf"), tmp_path / "rounded")
    tokens = tokens_of(model.config, model.config.context - 1)
    want = Model.load(tmp_path / "rounded").logits(tokens)[0]
    peer = LlamaCpp(tmp_path / "a.gguf", model.config.vocab_size, 1)
    assert_close(np.array(peer.step(tokens[0])), want, LLAMA_CPP[kind])


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_llama_cpp_writes_stories260ks_published_text(stories, kind, test_data, tmp_path):
    folder, tok = stories
    gguf.write(open_source(folder), tmp_path / "a.gguf", kind)
    peer, ids = LlamaCpp(tmp_path / "a.gguf", tok.n_vocab, 1), [tok.bos]
    while len(ids) < 257:
        ids.append(int(peer.step(ids[-1:]).argmax()))
    assert tok.decode(ids[1:]) == published(test_data)


class Vocabulary:
    """llama.cpp's own tokenizer of a GGUF file."""

    def __init__(self, path):
        self.lib = library()
        for name, result, *arguments in (
            ("llama_model_get_vocab", pointer, pointer),
            ("llama_vocab_eos", int32, pointer),
            ("llama_vocab_bos", int32, pointer),
            ("llama_tokenize", int32, pointer, ctypes.c_char_p, int32, pointer, int32, ctypes.c_bool, ctypes.c_bool),
        ):
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model, "llama.cpp does not load the file"
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def encode(self, text, special=False, begins=False):
        """special: special tokens in the text are no text; begins: bos is put in front where the file says so."""
        data = text.encode()
        ids = np.zeros(2 * len(data) + 8, np.int32)
        n = self.lib.llama_tokenize(self.vocab, data, len(data), ids.ctypes.data, len(ids), begins, special)
        assert n >= 0
        return ids[:n].tolist()


TEXTS = [
    "",
    "Once upon a time, Lily's mom said hello.",
    "  two  spaces   and\n\nlines\t\r\n",
    "l'été, 東京 and 🙂🙃 ß",
    "12345 3.14 I'LL don't",
    "aaaaaaaaaaaaaaaa aaa",
    "<0x0A> <s> </s>",
]


def tiny_with(tok, path):
    model = Model(Config(**LLAMA | dict(vocab_size=tok.n_vocab + 3)))
    gguf.write(Source.of_model(model, tok), path)
    return Vocabulary(path)


def test_llama_cpp_reads_our_vocabularies(test_data, tmp_path):
    story = (test_data / "text" / "tinystories_2MB.txt").read_text()[:20_000]
    for name, tok in {
        "sentencepiece": Tokenizer.load(test_data / "ckpt" / "tok512.bin"),
        "small pieces": small_pieces(),
        "trained gpt2": Tokenizer.train([story], 600, "gpt2"),
        "trained gpt4": Tokenizer.train([story], 600, "gpt4"),
        "with bos": Tokenizer({bytes([b]): b for b in range(256)}, [], {"<|endoftext|>": 256, "<|a|>": 257}, bos=257),
        "no bos": small_pieces(adds_bos=False),
        "gpt2": load_gpt2(test_data / "tok" / "gpt2_vocab.bpe", test_data / "tok" / "gpt2_encoder.json"),
    }.items():
        vocab = tiny_with(tok, tmp_path / "a.gguf")
        for text in [*TEXTS, story]:
            assert vocab.encode(text) == tok.encode(text), (name, text[:80])
            assert not text or vocab.encode(text, begins=True) == tok.encode_prompt(text), (name, text[:80])
        eot = next(text for text, id in tok.special.items() if id == tok.eot)
        if not isinstance(tok, SentencePiece):
            assert vocab.encode(f"a{eot}b", special=True) == tok.encode(f"a{eot}b", special=True)
        assert vocab.lib.llama_vocab_eos(vocab.vocab) == tok.eot
        assert vocab.lib.llama_vocab_bos(vocab.vocab) == tok.bos


# ---- the gguf package


@pytest.mark.parametrize("kind", gguf.KINDS)
def test_the_gguf_package_reads_our_file(model, kind, tmp_path):
    gguf.write(Source.of_model(model), tmp_path / "a.gguf", kind)
    ours, reader = gguf.read(tmp_path / "a.gguf"), peer_gguf.GGUFReader(tmp_path / "a.gguf")
    keys = {gguf.file_name(model.config, name): name for name in model.params}
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name != "rope_freqs.weight"}
    assert keys.keys() == tensors.keys()
    for key, tensor in tensors.items():
        stored = ours.stored[keys[key]]
        values = peer_gguf.dequantize(tensor.data, tensor.tensor_type)
        assert_same_bits(stored._replace(transposed=False, order=None).read(0, slice(0, stored.shape[0])), values, key)


def test_q8_0_has_the_bits_of_ggml():
    values = np.random.default_rng(0).normal(size=(50, 320)).astype(np.float32)
    values[3], values[4, :32], values[5] = 0, 1e-30, np.arange(-160, 160)
    want = peer_gguf.quantize(values, peer_gguf.GGMLQuantizationType.Q8_0)
    assert from_float32(values, "Q8_0").tobytes() == want.tobytes()
    got = to_float32(from_float32(values, "Q8_0"), "Q8_0")
    assert_same_bits(got, peer_gguf.dequantize(want, peer_gguf.GGMLQuantizationType.Q8_0))


def test_we_read_a_file_of_the_gguf_package(tmp_path):
    model = random_model(CONFIGS["gpt2"])
    write(model, tmp_path / "a.gguf", "F32")
    source = open_source(tmp_path / "a.gguf")
    assert source.config == model.config and source.tokenizer is None
    assert_all_same_bits(values_of(source), copies(model.params))


# ---- transformers and tokenizers


def test_transformers_has_stories260ks_logits(stories):
    folder, tok = stories
    tokens = np.array([tok.encode_prompt("Once upon a time, there was a little girl")], np.int32)
    assert_close(Model.load(folder).logits(tokens, last=False), theirs(folder, tokens), CLOSE)


def test_transformers_opens_the_imported_folder_as_it_is(stories):
    """Model and tokenizer by their Auto classes, with no further file."""
    folder, tok = stories
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs("Lily's é\n").input_ids == [tok.bos, *tok.encode("Lily's é\n")] == tok.encode_prompt("Lily's é\n")
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = twin.generate(theirs("Once upon", return_tensors="pt").input_ids, do_sample=False, max_new_tokens=20)
    assert theirs.decode(ids[0]) == "<s> Once upon a time, there was a little girl named Lily. She loved to play out"
    for prompt in ("Once upon", "Lily was", "the dog"):
        ids = twin.generate(theirs(prompt, return_tensors="pt").input_ids, do_sample=False, max_new_tokens=40)
        text = "".join(generate(Model.load(folder), tok, prompt, temperature=0, max_tokens=40))
        assert theirs.decode(ids[0], skip_special_tokens=True) == prompt + text


@pytest.mark.parametrize("end", [test_ends.EOT, test_ends.BEGIN, test_ends.TURN, test_ends.EOM])
def test_transformers_ends_a_text_where_we_do(end, tmp_path):
    tok = test_ends.vocabulary()
    model = test_ends.writes_only(test_ends.a_model(tok), end)
    checkpoint.write(Source.of_model(model), tmp_path, files=generation.files_of(tok))
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = twin.generate(torch.tensor([tok.encode_prompt("ab")]), do_sample=False, max_new_tokens=5)
    assert ids.tolist() == [[*tok.encode_prompt("ab"), end]]
    twin.save_pretrained(tmp_path / "b")
    tok.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").ends == tok.ends


def test_transformers_opens_shards_and_bf16(model, tmp_path):
    if model.config.norm != "rmsnorm" and not model.config.tied:
        pytest.skip("transformers' GPT-2 knows no other head")
    checkpoint.write(Source.of_model(model), tmp_path / "a", "BF16", shard_size=20_000)
    tokens = tokens_of(model.config, 30)
    want = theirs(tmp_path / "a", tokens, dtype=torch.float32)
    assert_close(Model.load(tmp_path / "a").logits(tokens, last=False), want, CLOSE)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_we_open_shards_of_transformers(dtype, tmp_path):
    model = random_model(CONFIGS["llama"])
    checkpoint.write(Source.of_model(model), tmp_path / "a")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    twin.save_pretrained(tmp_path / "b", max_shard_size="30KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    loaded = Model.load(tmp_path / "b")
    for name, p in model.params.items():
        assert_same_bits(loaded.params[name], torch.tensor(np.array(p)).to(dtype).float().numpy(), name)


def test_tokenizers_opens_a_vocabulary_of_pieces(test_data, tmp_path):
    story = (test_data / "text" / "tinystories_2MB.txt").read_text()[:30_000]
    rights = (test_data / "web" / "udhr.json").read_text(encoding="utf-8")[:30_000]
    for tok in (Tokenizer.load(test_data / "ckpt" / "tok512.bin"), small_pieces(), small_pieces(adds_bos=False)):
        peer = tokenizers.Tokenizer.from_file(str(tok.save(tmp_path)))
        for text in [*TEXTS[:-1], story, rights, *story.split(".")]:
            ids = tok.encode(text)
            assert peer.encode(text, add_special_tokens=False).ids == ids, text[:80]
            assert peer.decode(ids) == tok.decode(ids) == text
        assert peer.encode("a").ids == tok.encode_prompt("a")
        text = "one<s>two </s> three"
        assert peer.encode(text, add_special_tokens=False).ids == tok.encode(text, special=True)
