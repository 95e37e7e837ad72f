"""What the tests share: the backends of this machine, arrays that end at an unreadable page, outputs filled beforehand,
tiny models of both families, and the folder of outside test data."""

import ctypes
import fcntl
import mmap
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from barelm import _core
from emulated import KEPT, Backend, compile_objects, link, lost, objects_folder, recover

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # what a shell starts in the background hears no Ctrl-C, and some
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send one to what they start

PROT_NONE, PROT_READ = 0, 1
libc = ctypes.CDLL(None, use_errno=True)
slacks = []  # the bytes in front of every guarded array of the running test


@pytest.fixture(params=_core.backends())
def backend(request):
    """Each backend that can run here, best first, the plain one last."""
    return request.param


@pytest.fixture
def threads():
    """For a test that sets the number of threads: afterwards it is the default again."""
    yield
    _core.threads_set(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def a_process_that_has_lost_its_gpu_ends():
    """No later test could pass in it.  Under xdist another process goes on with them."""
    yield
    if lost and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)  # what was said is with the other process already
    if lost:
        pytest.exit(lost[0], returncode=1)


def pytest_collection_modifyitems(items):
    """What takes longest first: of two processes neither then waits for the other's last test."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def cuda_objects():
    """The kernels of cuda/, compiled for their emulation: see emulated.py.  Processes share them, and later runs do."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return compile_objects(objects_folder())


@pytest.fixture(scope="session")
def cuda_library(request, tmp_path_factory):
    """They in one library; or that which BARELM_CUDA_LIBRARY names, for a GPU."""
    if on_gpu := os.environ.get("BARELM_CUDA_LIBRARY"):
        return on_gpu
    objects = request.getfixturevalue("cuda_objects")
    return link(objects.values(), tmp_path_factory.mktemp("cuda") / "emulated.so")


@pytest.fixture
def device(cuda_library, monkeypatch):
    """The name of the device that has this library; kernels of the emulation run in order, failures are forgotten."""
    monkeypatch.setenv("BARELM_CUDA_LIBRARY", str(cuda_library))
    library = ctypes.CDLL(str(cuda_library))
    recover(library)
    yield "cuda"
    recover(library)


@pytest.fixture
def cuda(request, cuda_library):
    """All operators of cuda/, for activations of the type that the test is parametrized with; kernels run in order."""
    backend = Backend(cuda_library, request.param)
    backend.schedule(0)
    return backend


def protect(address, size, protection):
    if size and libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(a, constant=False):
    """A copy of `a` whose last byte is the last one before an unreadable page: an element too far crashes.

    The bytes in front are 0xff, NaN as floats: reading them spoils the result, and writing them fails the test at its
    end.  `constant`: the copy itself cannot be written, by NumPy or by a kernel (which crashes).
    """
    a = np.asarray(a)
    page = mmap.PAGESIZE
    size = -(-a.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    whole = np.frombuffer(memory, np.uint8)
    slack, body = whole[: size - a.nbytes], whole[size - a.nbytes : size]
    out = body.view(a.dtype).reshape(a.shape)
    slack[...] = 0xFF
    out[...] = a
    protect(address + size, page, PROT_NONE)
    if constant:
        protect(address, size, PROT_READ)
        out.flags.writeable = False
    else:
        slacks.append(slack)
    return out


@pytest.fixture(autouse=True)
def nothing_is_written_in_front_of_an_array():
    slacks.clear()
    yield
    spoiled = sum(bool((slack != 0xFF).any()) for slack in slacks)
    slacks.clear()
    assert not spoiled, f"{spoiled} arrays were written in front of their first element"


def prefilled(run, **outputs):
    """Run `run(**arrays)` twice on outputs that hold other values before, prove their "=" or "+=", return the first.

    outputs: name = (shape, mode) or (shape, mode, dtype).  mode
      "="         holds NaN, then -1e30 (integers: -77, then 77), and must come out with the same bits: no old value
                  survives or takes part
      "+="        holds zeros, then garbage, and must come out as garbage + the first result, rounded once: the sum was
                  finished before it was added
      "in place"  holds the array that stands in place of the shape, both times
    """

    def fill(shape, mode, number, second, dtype=np.float32):
        if mode == "in place":
            return guarded(shape)
        values = (-77, 77) if np.issubdtype(dtype, np.integer) else (np.nan, -1e30)
        old = np.full(shape, {"=": values, "+=": (0, 0)}[mode][second], dtype)
        if mode == "+=" and second:
            old[...] = np.random.default_rng(number).normal(0, 3, shape)
        return guarded(old)

    first, second = (
        {name: fill(*spec[:2], i, n, *spec[2:]) for i, (name, spec) in enumerate(outputs.items())} for n in (0, 1)
    )
    old = {name: a.copy() for name, a in second.items()}
    run(**first)
    run(**second)
    for name, (_, mode, *_) in outputs.items():
        want = old[name] + first[name] if mode == "+=" else first[name]
        np.testing.assert_array_equal(second[name], want, err_msg=f"{name} {mode}")
    return first


@pytest.fixture
def test_data():
    """The folder of outside test data: BARELM_TEST_DATA, or shared/data beside the project."""
    path = Path(os.environ.get("BARELM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}: set BARELM_TEST_DATA")
    return path


GPT2 = dict(
    n_layer=2,
    n_head=2,
    n_kv_head=2,
    n_embd=16,
    n_inner=64,
    vocab_size=37,
    context=24,
    norm="layernorm",
    act="gelu_tanh",
    pos="learned",
    bias=True,
    tied=True,
    norm_eps=1e-5,
)
LLAMA = dict(
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=16,
    n_inner=40,
    vocab_size=37,
    context=24,
    norm="rmsnorm",
    act="swiglu",
    pos="rope",
    bias=False,
    tied=False,
    norm_eps=1e-5,
    rope_theta=10000.0,
)

# Keyword arguments of barelm.Config: both families, and the options that cross them.
tiny_configs = {
    "gpt2": GPT2,
    "gpt2, erf, no bias, untied": GPT2 | dict(act="gelu_erf", bias=False, tied=False),
    "gpt2, odd sizes": GPT2 | dict(n_layer=1, n_head=3, n_kv_head=3, n_embd=21, n_inner=33, vocab_size=41, context=19),
    "gpt2, grouped queries": GPT2 | dict(n_layer=1, n_head=4, n_kv_head=1),
    "llama": LLAMA,
    "llama, tied": LLAMA | dict(tied=True, n_layer=1, rope_theta=500000.0),
    "llama, wide heads": LLAMA | dict(n_layer=1, head_size=6, n_head=6, n_kv_head=3),
    "llama, bias": LLAMA | dict(n_layer=1, bias=True, n_kv_head=4),
}


@pytest.fixture(params=tiny_configs.values(), ids=tiny_configs.keys())
def tiny_config(request):
    """The keyword arguments of each tiny Config."""
    return dict(request.param)
