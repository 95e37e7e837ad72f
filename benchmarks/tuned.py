"""PyTorch at its best on a CPU, without a change to it: an allocator that keeps its pages and makes them huge, and on
AMD the fast path of MKL, which by itself takes that for Intel's processors alone."""

import ctypes.util
import glob
import os
import platform
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import machine

JEMALLOC = "dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always,metadata_thp:always"
PLACES = ("/usr/lib/*/libjemalloc.so.2", "/usr/lib*/libjemalloc.so.2", "/usr/local/lib/libjemalloc.so.2")


def missing():
    """Why PyTorch cannot be tuned here; "" where it can."""
    if platform.system() != "Linux":
        return "libraries are preloaded on Linux only"
    if not jemalloc():
        return "libjemalloc.so.2 is not installed, and BARELM_JEMALLOC names none"
    if _is_amd() and not shutil.which("cc"):
        return "no C compiler for the library that turns on MKL's fast path"
    return ""


def jemalloc():
    """Path of the allocator; None where there is none."""
    named = os.environ.get("BARELM_JEMALLOC")
    if named:
        return named if Path(named).is_file() else None
    found = [path for place in PLACES for path in glob.glob(place)]
    return found[0] if found else ctypes.util.find_library("jemalloc")


def _is_amd():
    return "AuthenticAMD" in machine.read("/proc/cpuinfo")


@contextmanager
def preloaded(folder):
    """Processes that start within have it.  `folder` takes a library that is made for it."""
    libraries = [jemalloc()]
    if _is_amd():
        libraries.append(str(Path(folder) / "mkl_fast.so"))
        source = Path(folder) / "mkl_fast.c"
        source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", libraries[-1], str(source)], check=True)
    before = {name: os.environ.get(name) for name in ("LD_PRELOAD", "MALLOC_CONF")}
    os.environ.update(LD_PRELOAD=":".join(libraries), MALLOC_CONF=JEMALLOC)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
