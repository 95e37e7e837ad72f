"""The kernels of cuda/ compiled with g++ and run on the CPU, thread by thread: see cuda/emulate.

`compile_objects` and `link` make one shared library of all operators, for activations in float32 and in bf16; `Backend`
calls them with arrays.  Arrays of activations are float32 on this side; for bf16 they are stored as such for the call.
"""

import _ctypes
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "cuda" / "emulate" / "emulate.cpp"
ACTS = ("float", "bf16")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))
ON_GPU = bool(os.environ.get("BARELM_CUDA_LIBRARY"))  # then the tests call the library of that name
# The arithmetic of the source: nothing is fused.  _FORTIFY_SOURCE takes a change of fibers for an attack.
# <math.h> as C has it: C++'s takes a third of the time.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-x", "c++"]
# A library with unique symbols would never be closed.
FLAGS += ["-fno-gnu-unique", "-D_GLIBCXX_INCLUDE_NEXT_C_HEADERS", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def sources():
    """The files of operators; runtime.cu is the GPU's own."""
    return sorted(path for path in (ROOT / "cuda").glob("*.cu") if path.name != "runtime.cu")


def compile_object(source, output, *flags):
    command = [COMPILER, *FLAGS, *flags, "-I", ROOT / "cuda", "-c", source, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(source).name} {' '.join(flags)}: {done.stderr[-2000:]}")
    return output


def link(objects, output):
    subprocess.run([COMPILER, "-shared", *objects, "-o", output], check=True)
    return output


KEPT = ROOT / "build" / "emulated"  # objects of earlier runs, a folder for each state of the sources


def objects_folder():
    """Where the objects of the sources as they are belong; those of the state before stay, of older ones none."""
    kinds = ("cuda/**/*.cu", "cuda/**/*.cuh", "cuda/**/*.h", "cuda/**/*.cpp", "csrc/*.h", "csrc/*.def")
    files = [Path(__file__), *(path for kind in kinds for path in ROOT.glob(kind))]  # this one has the flags
    state = hashlib.sha256(subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout)
    for path in sorted(files):
        state.update(hashlib.sha256(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes()).digest())
    folder = KEPT / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    states = [path for path in KEPT.iterdir() if path.is_dir()]
    for old in sorted(states, key=lambda path: path.stat().st_mtime)[:-2]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def compile_objects(folder):
    """{(name of the file, act): object}; the emulation itself is ("emulate", None).  What is there is kept."""
    jobs = {
        (path.name, act): (path, folder / f"{path.stem}_{act}.o", f"-DACT={act}") for path in sources() for act in ACTS
    }
    jobs["library", None] = (ROOT / "cuda" / "library.cpp", folder / "library.o")
    jobs["emulate", None] = (EMULATION, folder / "emulate.o", "-O2", "-U_GLIBCXX_INCLUDE_NEXT_C_HEADERS")

    def compiled(source, output, *flags):
        if not output.exists():  # it appears whole
            os.replace(compile_object(source, output.with_suffix(".part"), *flags), output)
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(lambda job: compiled(*job), jobs.values()), strict=True))


def library_for_gpu(source, output, *arch):
    """The kernels of one file and runtime.h's functions, for the GPU that nvcc is told of."""
    words = ["-shared", "-std=c++17", "--fmad=false", *arch, "-Xcompiler", "-fPIC", "-cudart", "static"]
    subprocess.run([NVCC, *words, source, ROOT / "cuda" / "runtime.cu", "-o", output], check=True)
    return output


@cache
def signatures():
    """{operator: [(argument, C type without const)]}, read from the contract."""
    text = re.sub(r"/\*.*?\*/", "", (ROOT / "csrc" / "ops.def").read_text(), flags=re.DOTALL)
    return {
        op: [re.fullmatch(r"\s*(?:const )?(\w+(?: \*)?) ?(\w+)", arg).group(2, 1) for arg in args.split(",")]
        for op, args in re.findall(r"OP\((\w+),\s*\((.*?)\)\)", text, flags=re.DOTALL)
    }


def activations(op):
    """The positions of the arguments of `op` that are arrays of activations."""
    return [i for i, (_, kind) in enumerate(signatures()[op]) if kind == "act *"]


def to_bf16(x):
    """float32 to the bits of bf16, nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


NUMBERS = {"int": ctypes.c_int, "float": ctypes.c_float, "int64_t": ctypes.c_int64}
SIZE, POINTER = ctypes.c_size_t, ctypes.c_void_p
FUNCTIONS = {  # of cuda/runtime.h: result and arguments
    "cuda_error": (ctypes.c_char_p, []),
    "cuda_alloc": (POINTER, [SIZE]),
    "cuda_free": (None, [POINTER, SIZE]),
    "cuda_copy_in": (None, [POINTER, POINTER, SIZE]),
    "cuda_copy_out": (None, [POINTER, POINTER, SIZE]),
}


lost = []  # why this process has no GPU any more


def recover(library):
    """Forget the failure of a library, so that the next call works; what is to be said besides where that cannot be."""
    if hasattr(library, "emulate_schedule"):
        library.emulate_schedule(ctypes.c_uint64(0))
    elif not library.barelm_cuda_recover():
        library.cuda_error.restype = ctypes.c_char_p
        lost.append(library.cuda_error().decode())
        return "; " + lost[-1]
    return ""


class Array:
    """An array of the host and its copy in the backend's memory, there perhaps in bf16."""

    def __init__(self, library, a, as_bf16):
        self.library, self.host, self.as_bf16 = library, a, as_bf16
        self.bits = to_bf16(a) if as_bf16 else np.ascontiguousarray(a)
        self.pointer = library.cuda_alloc(self.bits.nbytes)
        library.cuda_copy_in(self.pointer, self.bits.ctypes.data, self.bits.nbytes)

    def copy_back(self):
        new = np.empty_like(self.bits)
        self.library.cuda_copy_out(new.ctypes.data, self.pointer, new.nbytes)
        if self.host.flags.writeable:
            self.host[...] = from_bf16(new) if self.as_bf16 else new
        elif new.tobytes() != self.bits.tobytes():
            raise RuntimeError("an input was written")

    def free(self):
        self.library.cuda_free(self.pointer, self.bits.nbytes)


class Backend:
    """The operators of a library, emulated or of a GPU, for activations of one type.  What fails is a RuntimeError."""

    def __init__(self, library, act):
        self.library, self.act = ctypes.CDLL(library), act
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Close the library: the stacks of an emulation go back to the system."""
        _ctypes.dlclose(self.library._handle)

    def schedule(self, seed):
        """0: in order; else the seed of an unfair one.  A GPU has its own."""
        if hasattr(self.library, "emulate_schedule"):
            self.library.emulate_schedule(ctypes.c_uint64(seed))

    def check(self):
        error = self.library.cuda_error()
        if error:
            raise RuntimeError(error.decode() + recover(self.library))

    def call(self, function, args, bf16=()):
        """args: numbers of ctypes, arrays, or None; bf16: the positions of arrays that are stored so."""
        arrays, given = {}, []
        try:
            for i, a in enumerate(args):
                if isinstance(a, np.ndarray):
                    key = a.ctypes.data, a.nbytes  # an array that two arguments share stays shared
                    if key not in arrays:
                        arrays[key] = Array(self.library, a, i in bf16)
                    a = POINTER(arrays[key].pointer)
                given.append(a)
            getattr(self.library, function)(*given)
            self.check()
            for a in arrays.values():
                a.copy_back()
        finally:
            for a in arrays.values():
                a.free()
        self.check()

    def __call__(self, op, *args):
        kinds = [kind for _, kind in signatures()[op]]
        args = [NUMBERS[kind](a) if kind in NUMBERS else a for a, kind in zip(args, kinds, strict=True)]
        self.call(f"{op}_{self.act}", args, activations(op) if self.act == "bf16" else ())
