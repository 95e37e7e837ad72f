"""GPT-2 in llama.cpp, a peer: a barelm model written as GGUF, and decoding through the C functions of the library that
xllamacpp's wheel brings."""

import ctypes

import gguf
import numpy as np
from xllamacpp import xllamacpp as extension

NAMES = {  # ours: GGUF's
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
}


# ---- the file


def tensor_name(name):
    """GGUF's name of a parameter of a GPT-2 with tied embeddings."""
    *path, kind = name.split(".")
    prefix = ""
    if path[0] == "h":
        prefix, path = f"blk.{path[1]}.", path[2:]
    return f"{prefix}{NAMES['.'.join(path)]}.{kind}"


def write(model, path, kind):
    """A GPT-2 with tied embeddings as a GGUF file with matrices of one kind ("F32", "F16", "BF16", "Q8_0"); vectors and
    positions are F32, as llama.cpp's own converter leaves them.  Returns the bytes that each new token reads: all but
    the positions.  There is no vocabulary: ids go in, logits come out.
    """
    c, size = model.config, 0
    file = gguf.GGUFWriter(path, "gpt2")
    file.add_tokenizer_model("no_vocab")
    file.add_vocab_size(c.vocab_size)
    file.add_context_length(c.context)
    file.add_embedding_length(c.n_embd)
    file.add_feed_forward_length(c.n_inner)
    file.add_block_count(c.n_layer)
    file.add_head_count(c.n_head)
    file.add_layer_norm_eps(c.norm_eps)
    for name, p in model.params.items():
        matrix = p.ndim == 2 and name != "wpe.weight"
        rows = p.T if matrix and name != "wte.weight" else p  # Hugging Face keeps GPT-2's linear layers [in, out]
        dtype = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        data = gguf.quantize(np.ascontiguousarray(rows), dtype)
        file.add_tensor(tensor_name(name), data, raw_dtype=dtype)
        size += data.nbytes if name != "wpe.weight" else 0
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return size


# ---- the library


class Opaque(ctypes.Structure):
    """A struct of llama.cpp's that goes in by value as it came out, never looked into: its fields change from version
    to version.  This is larger than any; each is the last argument of its function, where too much does no harm."""

    _fields_ = [("bytes", ctypes.c_char * 2048)]


int32, pointer = ctypes.c_int32, ctypes.c_void_p
Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)
FUNCTIONS = {  # name: what it returns, what it takes
    "llama_log_set": (None, Log, pointer),
    "llama_backend_init": (None,),
    "llama_print_system_info": (ctypes.c_char_p,),
    "llama_model_default_params": (Opaque,),
    "llama_model_load_from_file": (pointer, ctypes.c_char_p, Opaque),
    "llama_context_default_params": (Opaque,),
    "llama_init_from_model": (pointer, pointer, Opaque),
    "llama_set_n_threads": (None, pointer, int32, int32),
    "llama_n_threads": (int32, pointer),
    "llama_n_ctx": (ctypes.c_uint32, pointer),
    "llama_batch_get_one": (Opaque, pointer, int32),
    "llama_decode": (int32, pointer, Opaque),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), pointer, int32),
    "llama_get_memory": (pointer, pointer),
    "llama_memory_seq_rm": (ctypes.c_bool, pointer, int32, int32, int32),
}


def library():
    """llama.cpp's C functions.  AttributeError: this build of xllamacpp does not export one of them."""
    lib = ctypes.CDLL(extension.__file__)
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@Log
def silence(level, text, data):
    """llama.cpp tells every step of loading."""


class LlamaCpp:
    """One sequence, with llama.cpp's defaults: keys and values in F16, 512 places."""

    def __init__(self, path, vocab_size, threads):
        self.lib, self.vocab_size, self.length = library(), vocab_size, 0
        self.lib.llama_log_set(silence, None)
        self.lib.llama_backend_init()
        model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        if not model:
            raise RuntimeError("llama.cpp: does not load the file")
        self.context = self.lib.llama_init_from_model(model, self.lib.llama_context_default_params())
        if not self.context:
            raise RuntimeError("llama.cpp: gives no context")
        self.lib.llama_set_n_threads(self.context, threads, threads)
        if self.lib.llama_n_threads(self.context) != threads:
            raise RuntimeError("llama.cpp: does not take the number of threads")
        self.room = self.lib.llama_n_ctx(self.context)

    def step(self, ids):
        """Append the tokens; logits (V) float32 behind the last, which the next step writes over."""
        ids = np.ascontiguousarray(ids, np.int32)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids.ctypes.data, len(ids))):
            raise RuntimeError(f"llama.cpp: does not take {len(ids)} tokens behind {self.length}")
        self.length += len(ids)
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocab_size,))

    def cut(self, length):
        """Forget all tokens behind the first `length`."""
        if not self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), 0, length, -1):
            raise RuntimeError("llama.cpp: does not forget")
        self.length = length

    def instructions(self):
        """What it was built for: "AVX2, F16C, ..."."""
        pairs = self.lib.llama_print_system_info().decode().replace("CPU :", "").split("|")
        fields = [pair.split("=") for pair in pairs if "=" in pair]
        return ", ".join(name.strip() for name, value in fields if value.strip() == "1")
