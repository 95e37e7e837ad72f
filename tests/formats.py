"""Small files in every form that barelm reads, written with as little of it as possible, and what a reader makes of
them: for the tests of the readers and for fuzz_readers.py."""

import json
import struct

import numpy as np
from barelm import Config, Lora, Model, Tokenizer, checkpoint
from barelm.convert import generation, gguf, gguf_file, llmc, peft
from barelm.convert import safetensors_file as st
from barelm.convert.recognise import open_source
from barelm.convert.source import CheckpointError, Source
from barelm.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, SentencePiece

GPT2 = dict(n_layer=1, n_head=2, n_embd=4, vocab_size=6, context=8)
ADAPTED = Config(**GPT2)
LLAMA = dict(norm="rmsnorm", act="swiglu", pos="rope", bias=False, n_layer=1, n_head=2, n_kv_head=1, n_embd=8)
LLAMA |= dict(n_inner=12, vocab_size=7, context=8)
SCALING = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
SCALING |= dict(original_max_position_embeddings=64)


def small_pieces(**options):
    """A SentencePiece vocabulary of a few words."""
    rows = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{b:02X}>", BYTE) for b in range(256))]
    rows += [(piece, NORMAL) for piece in ["▁", "a", "b", "é", "ab", "▁a", "▁ab"]]
    pieces, kinds = map(list, zip(*rows, strict=True))
    return SentencePiece(pieces, [-float(i) for i in range(len(rows))], kinds, **options)


def write_llama2c(model, path):
    """llama2.c's first form, by its own words: stacked layers, pairs side by side, tables of angles that are passed
    over."""
    c, p = model.config, {name: np.array(a) for name, a in model.params.items()}

    def pairs(name, heads):
        a = p[name]
        return a.reshape(heads, 2, c.head_size // 2, -1).swapaxes(1, 2).reshape(a.shape)

    V = c.vocab_size if c.tied else -c.vocab_size
    parts = [struct.pack("7i", c.n_embd, c.n_inner, c.n_layer, c.n_head, c.n_kv_head, V, c.context)]
    parts.append(p["embed_tokens.weight"])
    for name in (
        *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
    ):
        for i in range(c.n_layer):
            key = f"layers.{i}.{name}.weight"
            heads = {"self_attn.q_proj": c.n_head, "self_attn.k_proj": c.n_kv_head}.get(name)
            parts.append(pairs(key, heads) if heads else p[key])
    parts += [p["norm.weight"], np.full((2, c.context, c.head_size // 2), 7, np.float32)]
    parts += [] if c.tied else [p["lm_head.weight"]]
    path.write_bytes(b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts))


def write_llama2c_tokenizer(tok, path):
    parts = [struct.pack("i", max(len(piece.encode()) for piece in tok.pieces))]
    for id, piece in enumerate(tok.pieces):
        text = f"\n{piece}\n" if id in (1, 2) else piece.replace("▁", " ")
        data = text.encode()
        parts.append(struct.pack("fi", tok.scores[id], len(data)) + data)
    path.write_bytes(b"".join(parts))


def write_adapter(model, folder):
    """The folder of an adapter whose base lies beside it."""
    model.save(folder / "base")
    adapted = Model.load(folder / "base")
    adapted.adapt(Lora(rank=2, targets=("c_attn",)))
    adapted.save(folder / "adapter")
    (folder / "adapter" / "state.json").unlink()
    return folder / "adapter"


def write_gguf_vocabulary(tok, path):
    """A GGUF file without a model."""
    path.parent.mkdir(exist_ok=True)
    values = {"general.architecture": "llama"} | gguf._vocabulary(tok, Config(vocab_size=tok.n_vocab))
    with open(path, "wb") as file:
        gguf_file.write(file, values, [])


NAMES = ["gpt2.gguf", "llama.gguf", "llm.c.bin", "llama2.c.bin", "tokenizer.bin", "vocabulary.gguf"]
NAMES += ["vocabulary.gguf: BPE", "tokenizer.json", "tokenizer.json: BPE", "model.safetensors", "index", "config.json"]
NAMES += ["adapter", "adapter_config.json", generation.FILE]


def make_all(folder):
    """{name: file} of small valid files below the folder.  Vocabularies are in files of their own: to read one takes
    longer than all else."""
    gpt2, llama = Model(Config(**GPT2)), Model(Config(**LLAMA, rope_scaling=SCALING))
    untied = Model(Config(**LLAMA | dict(tied=False)))
    bpe = Tokenizer.train(["abab ab " * 9], 261, special=["<|endoftext|>", "<|eot_id|>"])
    bpe.end_at([260])
    gguf.write(Source.of_model(gpt2), folder / "gpt2.gguf", "F32")
    gguf.write(Source.of_model(llama), folder / "llama.gguf", "BF16")
    write_gguf_vocabulary(small_pieces(), folder / "pieces" / "vocabulary.gguf")
    write_gguf_vocabulary(bpe, folder / "bpe" / "vocabulary.gguf")
    llmc.write(Source.of_model(gpt2), folder / "llm.c.bin", "BF16")
    write_llama2c(untied, folder / "llama2.c.bin")
    write_llama2c_tokenizer(small_pieces(), folder / "tokenizer.bin")
    small_pieces().save(folder / "pieces")
    for name, content in generation.files_of(bpe).items():
        (folder / "bpe" / name).write_bytes(content)
    for name, size in (("single", 5000), ("sharded", 1000)):
        checkpoint.write(Source.of_model(llama), folder / name, "BF16", shard_size=size)
        (folder / name / "state.json").unlink()  # whose checksums would find every change
    adapter = write_adapter(gpt2, folder)
    return {
        **{name: folder / name for name in ("gpt2.gguf", "llama.gguf", "llm.c.bin", "llama2.c.bin", "tokenizer.bin")},
        "vocabulary.gguf": folder / "pieces" / "vocabulary.gguf",
        "vocabulary.gguf: BPE": folder / "bpe" / "vocabulary.gguf",
        "tokenizer.json": folder / "pieces" / "tokenizer.json",
        "tokenizer.json: BPE": folder / "bpe" / "tokenizer.json",
        "model.safetensors": folder / "single" / "model.safetensors",
        "index": folder / "sharded" / "model.safetensors.index.json",
        "config.json": folder / "single" / "config.json",
        "adapter": adapter / "adapter_model.safetensors",
        "adapter_config.json": adapter / "adapter_config.json",
        generation.FILE: folder / "bpe" / generation.FILE,
    }


READERS = {  # of files that are read together with others
    "model.safetensors": st.read,
    "index": st.read_index,
    "config.json": lambda path: checkpoint.Weights(path.parent),
    "adapter": lambda path: peft.read(path.parent, ADAPTED),
    "adapter_config.json": lambda path: (checkpoint.base_of(path.parent), peft.read(path.parent, ADAPTED)),
    generation.FILE: lambda path: generation.read_ends(path.parent),
}


def read(name, path, thorough=True):
    """Read a file; CheckpointError or ValueError is its right.  thorough: also what its header or vocabulary leads to,
    and as a user would, who has the files beside it read too."""
    if name.startswith(("tokenizer", "vocabulary")):
        tok = Tokenizer.load(path)
        if thorough:
            tok.encode("ab é <s>")
    elif thorough and name == generation.FILE:
        Tokenizer.load(path.parent)
    elif thorough:
        read_all(open_source(path.parent if name in READERS else path))
    else:
        READERS.get(name, open_source)(path)


def read_all(source):
    for tensor, shape in source.shapes.items():
        for axis in range(len(shape)):
            for part in source.rows(tensor, axis):
                assert part.dtype == np.float32


def refused(name, path, error):
    """Whether the message is one that a person can use: it names the file, or the field of a description."""
    text = str(error)
    names = (path.name, path.parent.name, "tokenizer.json", "the split pattern")
    clear = len(text) < 600 and text.isprintable() and any(part in text for part in names)
    return isinstance(error, CheckpointError | ValueError) and clear


def rewritten_gguf(path, values=(), tensors=()):
    """The bytes of a GGUF file with other values and further F32 tensors, through its reader and writer."""
    import io

    header = gguf_file.read(path)
    kept = {}
    for key, value in header.values.items():
        if isinstance(value, gguf_file.Array):
            value = value.strings() if value.type == gguf_file.STRING else value.numbers()
        kept[key] = value
    changed = {key: value for key, value in (kept | dict(values)).items() if value is not None}
    out = []
    for name, stored in header.tensors.items():
        units = np.array(stored._units())
        out.append(gguf_file.Tensor(name, stored.kind, stored.shape, [units]))
    out += [gguf_file.Tensor(name, "F32", a.shape, [a]) for name, a in dict(tensors).items()]
    out = [tensor for tensor in out if tensor.shape]
    file = io.BytesIO()
    gguf_file.write(file, changed, out)
    return file.getvalue()


def dumped(value):
    return json.dumps(value).encode()
