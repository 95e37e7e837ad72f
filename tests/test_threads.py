"""Threads: the pool survives fork, serves many small regions and several callers, and leaves signals to Python."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from barelm import _core
from conftest import GPT2, LLAMA
from models import (
    MIDDLE,
    assert_all_same_bits,
    assert_same_bits,
    copies,
    random_batch,
    random_floats,
    random_model,
    threads,
)

TESTS = os.path.dirname(__file__)
ON_LINUX = os.path.isdir("/proc/self/task")


@pytest.fixture(autouse=True)
def default_threads():
    yield
    _core.threads_set(0)


def script(text, timeout=120, **environment):
    """Run a Python text in a process of its own, with the tests' modules at hand; its standard output."""
    path = os.pathsep.join([TESTS, *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- number


def test_threads_are_set_and_read():
    _core.threads_set(0)  # another module's tests may have left a number
    default = _core.threads_get()
    assert 1 <= default <= max(_core.system_cpus(), int(os.environ.get("BARELM_THREADS", 0)))
    for n in (1, 2, 7, 3):
        _core.threads_set(n)
        assert _core.threads_get() == n
    _core.threads_set(0)
    assert _core.threads_get() == default
    with pytest.raises(ValueError, match="threads: is -1, must be at least 1"):
        _core.threads_set(-1)
    assert _core.threads_get() == default


@pytest.mark.parametrize(
    ("value", "want"), [("3", 3), ("1", 1), ("0", None), ("-2", None), ("many", None), ("", None), ("1000000", 1024)]
)
def test_the_environment_sets_the_number(value, want):
    said = script("from barelm import _core; print(_core.threads_get())", BARELM_THREADS=value)
    assert int(said) == (want or _core.system_cpus())


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_the_caller_keeps_its_cpus():
    """Sleeping workers are woken on other CPUs than the caller's.  Once the ban hit the caller itself, through the
    handle of a worker that had just ended because there were to be fewer."""
    before, model, batch = os.sched_getaffinity(0), random_model(GPT2), random_batch(GPT2, 2, 20)
    for n in (8, 2, 5, 1, 8, 3):
        with threads(n):
            model.forward(*batch)
            time.sleep(0.01)  # some sleep, some still spin
            model.forward(*batch)
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_the_default_follows_affinity():
    said = script(
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from barelm import _core; print(_core.threads_get())",
        BARELM_THREADS="",
    )
    assert int(said) == 1


# ---- regions


def tiny_attention(seed):
    """A region of 12 tasks that takes microseconds: (run, what it must give)."""
    B, T, NH, HS = 3, 2, 4, 8
    qkv = random_floats(B, T, 3 * NH * HS, seed=seed)

    def run():
        out, lse = np.empty((B, T, NH * HS), np.float32), np.empty((B, NH, T), np.float32)
        _core.ops.attention_forward(_core.backends()[0], out, lse, qkv, None, 0, B, T, NH, NH, HS)
        return out

    with threads(1):
        return run, run()


def test_many_small_regions():
    """Ten thousand, one straight behind the other: all finish, all are right.  A minute would be a thousand times the
    usual time, yet a region that sleeps through its job never ends."""
    run, want = tiny_attention(0)
    for n in (2, 4):
        _core.threads_set(n)
        start = time.monotonic()
        for _ in range(5000):
            assert (run() == want).all()
        assert time.monotonic() - start < 30


def test_regions_after_pauses():
    """Long enough a pause that every worker has parked: the next region wakes them, or does without."""
    run, want = tiny_attention(1)
    _core.threads_set(4)
    for _ in range(200):
        time.sleep(0.002)
        assert_same_bits(run(), want)


def test_the_number_changes_between_regions():
    run, want = tiny_attention(2)
    for n in np.random.default_rng(0).integers(1, 9, 100):
        _core.threads_set(int(n))
        assert_same_bits(run(), want)


# ---- several callers


def at_once(*calls):
    """Run each call on a Python thread of its own; their results."""
    results, errors, gate = [None] * len(calls), [], threading.Barrier(len(calls))

    def work(i, call):
        gate.wait()
        try:
            results[i] = call()
        except BaseException as e:
            errors.append(e)

    pool = [threading.Thread(target=work, args=(i, call)) for i, call in enumerate(calls)]
    for t in pool:
        t.start()
    for t in pool:
        t.join(60)
        assert not t.is_alive(), "a call never came back"
    assert not errors, errors
    return results


def trained(config, seed, steps=8):
    model = random_model(config, seed=seed)
    for step in range(steps):
        tokens, targets = random_batch(config, 2, 70, seed=seed + step)
        model.forward_backward(tokens, targets, random_floats(2, 70, seed=step))
        model.update(lr=0.01)
    return copies(model.params)


def test_two_models_at_once():
    calls = [lambda seed=seed, config=config: trained(config, seed) for seed, config in enumerate(MIDDLE.values())]
    want = [call() for call in calls]
    _core.threads_set(3)
    for _ in range(2):
        for got, w in zip(at_once(*calls), want, strict=True):
            assert_all_same_bits(got, w)


def test_one_model_from_two_threads():
    """Calls are taken one at a time: each gets the answer to its own question."""
    config = MIDDLE["llama"]
    model, batches = random_model(config), [random_batch(config, B, T, seed=B) for B, T in ((1, 80), (3, 33), (2, 5))]
    want = [model.forward(*batch) for batch in batches]
    _core.threads_set(2)
    results = at_once(*(lambda batch=batch: [model.forward(*batch) for _ in range(40)] for batch in batches))
    for many, w in zip(results, want, strict=True):
        for got in many:
            assert_same_bits(got, w)


def test_gradients_of_two_threads_add_up():
    """forward_backward is one call: what two threads add in turn is what one adds, up to the order of the sum."""
    config = MIDDLE["llama"] | dict(tied=False)
    batch, weights = random_batch(config, 2, 33), random_floats(2, 33)
    alone, shared = random_model(config), random_model(config)
    for _ in range(20):
        alone.forward_backward(*batch, weights)
    at_once(*[lambda: [shared.forward_backward(*batch, weights) for _ in range(10)]] * 2)
    assert_all_same_bits(copies(shared.grads), copies(alone.grads))  # all terms are equal: any order is the same


# ---- fork

FORK = """
import os, sys
import numpy as np
from barelm import _core
from models import MIDDLE, bits, random_batch, random_floats, random_model

def results():
    out = [model.forward(*batch).copy()]
    model.backward(random_floats(2, 70))
    return b"".join(a.tobytes() for a in out + [g.copy() for g in model.grads.values()])

_core.threads_set(3)
model, batch = random_model(MIDDLE["gpt2"]), random_batch(MIDDLE["gpt2"], 2, 70)
model.forward_backward(*batch, random_floats(2, 70))  # the pool runs, its workers wait
for _ in range(4):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        grandchild = os.fork()
        if not grandchild:
            os._exit(0 if len(results()) else 1)
        same = os.waitpid(grandchild, 0)[1] == 0
        with os.fdopen(write, "wb") as f:
            f.write(results() if same else b"")
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as f:
        said = f.read()
    assert os.waitpid(child, 0)[1] == 0
    assert said == results(), "a child computes other bits"
print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_fork_computes_the_same_bits():
    assert script(FORK) == "same\n"


# ---- signals

INTERRUPT = """
import os, signal, sys, threading, time
import numpy as np
from barelm import _core
from models import random_batch, random_floats, random_model

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts behind "&" ignore Ctrl-C
_core.threads_set(1)  # one: then processor time says how long a call went on, however busy the machine is
config = dict(n_layer=30, n_head=2, n_embd=128, vocab_size=70, context=256, norm="rmsnorm", pos="rope", bias=False)
model, (tokens, targets) = random_model(config), random_batch(config, 4, 256)
small = random_batch(config, 1, 3), random_floats(1, 3)

call = {
    "forward": lambda: model.forward(tokens, targets),
    "backward": lambda: model.backward(random_floats(4, 256)),
    "forward_backward": lambda: model.forward_backward(tokens, targets, random_floats(4, 256)),
    "logits": lambda: model.logits(tokens, last=False),
}[sys.argv[1]]
want = model.forward(*small[0])
model.forward_backward(*small[0], small[1])
want_grads = {name: g.copy() for name, g in model.grads.items()}
model.update(lr=0, weight_decay=0)
if sys.argv[1] == "backward":
    model.forward(tokens, targets)
sent = []

def send():
    time.sleep(0.25)
    sent.append(time.process_time())
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=send).start()
try:
    call()
    sys.exit("the call came through")
except KeyboardInterrupt:
    late = time.process_time() - sent[0]
assert late < 1, f"{late:.2f} s late"
assert all((g == 0).all() for g in model.grads.values()), "half of a gradient is left"
try:
    model.backward(np.zeros((4, 256) if sys.argv[1] == "backward" else (1, 3), np.float32))
    assert sys.argv[1] == "backward", "a forward pass that was cut off is kept"
    model.update(lr=0, weight_decay=0)
except RuntimeError as e:
    assert "no forward pass is kept" in str(e)
assert (model.forward(*small[0]) == want).all()
model.forward_backward(*small[0], small[1])
assert all((g == want_grads[name]).all() for name, g in model.grads.items())
print("interrupted")
"""


@pytest.mark.parametrize("call", ["forward", "backward", "forward_backward", "logits"])
def test_ctrl_c_ends_a_long_call(call):
    """On the plain backend, where this call takes several seconds: within one of them, and the model can be used on."""
    text = f"import sys; sys.argv = ['', {call!r}]\n" + INTERRUPT
    assert script(text, BARELM_ISA="ref") == "interrupted\n"


HANDLER = """
import signal
from models import random_batch, random_model

config = dict(n_layer=30, n_head=2, n_embd=128, vocab_size=70, context=256)
model = random_model(config)
seen = []

def handler(*_):
    try:
        seen.append(len(model.grads))
    except RuntimeError:
        seen.append("refused")

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
model.forward(*random_batch(config, 2, 256))
print(len(seen))
"""


def test_a_handler_may_ask_the_model_that_computes():
    """A handler runs within the call, on its thread: it is answered or refused, but never waits for what it stops."""
    try:
        assert script(HANDLER, timeout=30, BARELM_ISA="ref") == "1\n"
    except subprocess.TimeoutExpired:
        pytest.fail("the handler waits for ever")


RACE = """
import sys, threading, time
import numpy as np
from models import MIDDLE, random_batch, random_model

sys.setswitchinterval(1e-6)
config = MIDDLE["llama"]
model, (large, _), (small, _) = random_model(config), random_batch(config, 4, 200), random_batch(config, 1, 2)
want, end, wrong = model.trace(small)["hidden"], time.monotonic() + 2, []

def forward():
    while time.monotonic() < end:
        model.forward(large, large)

def trace():
    while time.monotonic() < end:
        got = model.trace(small)["hidden"]
        if got.shape != want.shape or (got != want).any():
            wrong.append(got)

threads = [threading.Thread(target=forward), threading.Thread(target=trace)]
for t in threads:
    t.start()
for t in threads:
    t.join()
print(len(wrong))
"""


def test_a_trace_shows_its_own_forward():
    """Not the pass of another thread that came between, whose size is another: that overruns the array."""
    assert script(RACE) == "0\n"


@pytest.mark.skipif(not ON_LINUX, reason="reads /proc")
def test_workers_take_no_signals():
    """A signal to the process goes to any thread that lets it in: the pool's block all, this one blocks none."""

    def blocked():
        said = {}
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/status") as f:
                said[int(task)] = int(next(line for line in f if line.startswith("SigBlk")).split()[1], 16)
        return said

    _core.threads_set(1)
    run, _ = tiny_attention(3)
    run()
    before = blocked()
    _core.threads_set(5)
    run()
    time.sleep(0.3)  # until a thread really runs, the system shows everything as blocked
    after = blocked()
    workers = [mask for task, mask in after.items() if task not in before]
    assert len(workers) == 4
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGCHLD, signal.SIGUSR1):
        assert all(mask >> (number - 1) & 1 for mask in workers)
        assert not after[os.getpid()] >> (number - 1) & 1


def test_a_handler_runs_while_kernels_do():
    """Handlers of Python get their turn within a long call, and the call goes on to the right end."""
    config = LLAMA | dict(n_layer=3)
    model, batch = random_model(config), random_batch(config, 2, 20)
    want, seen = model.forward(*batch), []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            assert_same_bits(model.forward(*batch), want)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) > 5
