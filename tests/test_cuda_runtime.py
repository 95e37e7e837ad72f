"""The host's side of the CUDA backend, cuda/runtime.cu, without a GPU: compiled by nvcc, and linked with a run time
that does as it is told (tests/cudart.cpp) in place of CUDA's; and what a model says of a device that failed."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
from barelm import Config, Model
from emulated import COMPILER, FUNCTIONS, NVCC, ROOT, recover

needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc (CUDACXX)")
WARPGROUP = 128
HALF = 4 << 20  # bytes of pinned memory that are filled before the others


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    library = tmp_path_factory.mktemp("runtime") / "runtime.so"
    files = ROOT / "tests" / "cudart.cpp", ROOT / "tests" / "emulation_runtime.cu", ROOT / "cuda" / "runtime.cu"
    words = ["-shared", "-std=c++17", "-arch=sm_80", "-Xcompiler", "-fPIC", "-cudart", "none", "-Xlinker", "-Bsymbolic"]
    subprocess.run([NVCC, *words, *files, "-o", library], check=True)
    return library


class Runtime:
    """A copy of the library, which has not been used: `fake_`s are set and read like attributes."""

    def __init__(self, path):
        object.__setattr__(self, "library", ctypes.CDLL(str(path)))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments

    def __getattr__(self, name):
        return ctypes.c_int.in_dll(self.library, f"fake_{name}").value

    def __setattr__(self, name, value):
        ctypes.c_int.in_dll(self.library, f"fake_{name}").value = value

    def error(self):
        return (self.library.cuda_error() or b"").decode()

    def launch(self, threads=32, sm90=False):
        """Whether there was one."""
        before = self.launches
        self.library.emulation_launch(threads, int(sm90))
        return self.launches > before


@pytest.fixture
def runtime(built, tmp_path):
    return Runtime(shutil.copy(built, tmp_path))


@needs_nvcc
def test_warpgroups_that_share_out_registers_must_have_them(runtime):
    refused = "emulation_launch: was compiled to fewer registers than its warps take"
    runtime.registers = 22
    assert all(runtime.launch(threads, sm90=True) for threads in (32, 64, WARPGROUP, 2 * WARPGROUP))
    assert runtime.launch(3 * WARPGROUP)  # by no words of Hopper's
    for _ in range(2):  # it is not forgotten with the failure
        assert not runtime.launch(3 * WARPGROUP, sm90=True) and runtime.error() == refused
        assert recover(runtime.library) == ""
    runtime.registers = 167
    assert not runtime.launch(3 * WARPGROUP, sm90=True) and recover(runtime.library) == ""
    runtime.registers = 168
    assert runtime.launch(3 * WARPGROUP, sm90=True)
    asked = runtime.asked
    assert runtime.launch(3 * WARPGROUP, sm90=True) and runtime.asked == asked


@needs_nvcc
def test_the_first_failure_stays_until_it_is_forgotten(runtime):
    runtime.refused = 1
    runtime.launch()
    assert runtime.error() == "emulation_launch: refused"
    assert not runtime.launch() and runtime.error() == "emulation_launch: refused"
    assert recover(runtime.library) == "" and runtime.error() == ""
    assert runtime.launch() and runtime.error() == ""


@needs_nvcc
def test_a_lost_gpu_stays_lost(runtime, monkeypatch):
    monkeypatch.setattr("emulated.lost", [])  # it is not the GPU of this process
    place, number = runtime.library.cuda_alloc(4), ctypes.c_int(7)
    runtime.library.cuda_copy_out(ctypes.byref(number), place, 4)
    assert number.value == 0 and runtime.launch()
    number.value, runtime.lost = 7, 1
    runtime.library.cuda_copy_out(ctypes.byref(number), place, 4)
    assert runtime.error() == "cuda_copy_out: illegal address" and number.value == 7
    said = "the GPU is lost to this process, another can go on: illegal address"
    assert recover(runtime.library) == "; " + said
    assert runtime.error() == said and not runtime.launch() and runtime.error() == said


@needs_nvcc
def test_a_map_that_could_not_be_made_is_made_the_next_time(runtime):
    place = ctypes.c_void_p(1 << 12)
    runtime.refused = 1
    runtime.library.emulation_map(place)
    assert runtime.error() == "tensor_map: not what TMA can copy"
    runtime.library.emulation_map(place)  # nothing behind a failure
    assert runtime.maps == 1 and recover(runtime.library) == ""
    for _ in range(3):
        runtime.library.emulation_map(place)
    assert runtime.maps == 2 and runtime.error() == ""


@needs_nvcc
@pytest.mark.parametrize("sizes", [(1, 7, 100), (HALF, 1, HALF + 1, 5), (3 * HALF + 5,), (3 << 20,) * 5])
def test_what_is_copied_in_may_be_changed_at_once(runtime, rng, sizes):
    library, arrays, places = runtime.library, [rng.integers(0, 256, n, np.uint8) for n in sizes], []
    for a in arrays:
        places.append(library.cuda_alloc(a.nbytes))
        given = a.copy()
        library.cuda_copy_in(places[-1], given.ctypes.data, given.nbytes)
        given[...] = 0
    for a, place in zip(arrays, places, strict=True):
        got = np.zeros_like(a)
        library.cuda_copy_out(got.ctypes.data, place, got.nbytes)
        np.testing.assert_array_equal(got, a)
        library.cuda_free(place, a.nbytes)
    assert runtime.error() == ""


@needs_nvcc
def test_memory_that_is_not_there_is_no_failure_but_to_a_kernel(runtime):
    runtime.room = 1000
    assert runtime.library.cuda_alloc(1001) is None and runtime.error() == ""
    assert runtime.library.emulation_scratch(1000) and not runtime.library.emulation_scratch(1001)
    assert runtime.error() == "scratch: refused" and recover(runtime.library) == ""
    assert runtime.library.emulation_scratch(1000) and runtime.error() == ""


@needs_nvcc
def test_a_recording_is_of_the_working_memory_that_it_found(runtime):
    library, number = runtime.library, ctypes.c_int()
    library.cuda_recorded.restype = ctypes.c_void_p

    def recorded(work):
        library.cuda_record()
        work()
        return ctypes.c_void_p(library.cuda_recorded())

    library.emulation_scratch(100)
    found = recorded(lambda: library.emulation_scratch(100))
    assert library.cuda_replay(found) and runtime.error() == ""
    library.emulation_scratch(200)
    assert not library.cuda_replay(found) and runtime.error() == ""
    library.cuda_forget(found)
    for work, said in (
        (lambda: library.emulation_scratch(300), "scratch: a recording asks for more working memory"),
        (lambda: library.cuda_copy_in(None, ctypes.byref(number), 4), "cuda_copy_in: in the middle of a recording"),
    ):
        assert not recorded(work) and runtime.error().startswith(said)
        assert recover(runtime.library) == ""


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler (CXX)")
def test_a_failure_is_not_taken_for_a_number(device, cuda_library):
    """The array that says which logits are finite is not copied then: here the last pass left it full of NaN."""
    library = ctypes.CDLL(str(cuda_library))
    library.cuda_recorded.restype = ctypes.c_void_p
    model = Model(Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, context=4), device="cuda")
    tokens = np.zeros((1, 4), np.int32)
    good = model.params["ln_f.weight"].copy()
    model.put("ln_f.weight", 0, np.full_like(good, np.nan))
    with pytest.raises(FloatingPointError):
        model.forward(tokens, tokens)
    library.cuda_record()
    library.cuda_copy_in(None, None, ctypes.c_size_t(1))
    if recorded := library.cuda_recorded():  # the emulation makes one all the same
        library.cuda_forget(ctypes.c_void_p(recorded))
    with pytest.raises(RuntimeError, match="cuda_copy_in: in the middle of a recording"):
        model.forward(tokens, tokens)
    recover(library)
    model.put("ln_f.weight", 0, good)
    assert np.isfinite(model.forward(tokens, tokens)).all()
