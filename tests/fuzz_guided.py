"""Let libFuzzer look for changed files that lead a reader where none did before, and see that every one is read or
refused by a clear error: `python tests/fuzz_guided.py [names] [libFuzzer's options]`.

The files and half of the changes are those of fuzz_readers.py; the other half is libFuzzer's own.  Each reader has a
process of its own, as many at a time as there are CPUs.  One file in 16 is read to the end, the others as far as their
reader goes.
fuzz.sh runs this under the sanitizers, where -malloc_limit_mb counts too.
"""

import os
import random
import subprocess
import sys
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["barelm"]):
    from formats import NAMES
    from fuzz_readers import Fuzzer, mutated

LIMITS = ["-max_len=16384", "-timeout=60", "-rss_limit_mb=1024", "-malloc_limit_mb=64"]


def fuzz(folder: Path, name: str, options: list[str]) -> None:
    """Ends the process."""
    warnings.simplefilter("ignore")  # dropout that is ignored, say
    fuzzer, rng, corpus = Fuzzer(folder), random.Random(), folder / "corpus"
    corpus.mkdir(exist_ok=True)
    (corpus / "valid").write_bytes(fuzzer.valid[name])

    def change(data: bytes, room: int, seed: int) -> bytes:
        rng.seed(seed)
        return mutated(data, rng)[:room] if rng.random() < 0.5 else atheris.Mutate(data, room)

    def attempt(data: bytes) -> None:
        fuzzer.attempt(name, data, thorough=zlib.crc32(data) % 16 == 0)

    atheris.Setup([sys.argv[0], *LIMITS, *options, str(corpus)], attempt, custom_mutator=change)
    atheris.Fuzz()


def run(name: str, options: list[str]) -> int:
    """Fuzz a reader in a process of its own, whose lines come here with the reader's name; its exit code."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        command = [sys.executable, __file__, "--in", folder, name, *options]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with subprocess.Popen(command, text=True, errors="replace", **pipes) as process:
            for line in process.stdout:
                print(f"{name}: {line}", end="", flush=True)
    return process.returncode


def main():
    if sys.argv[1:2] == ["--in"]:
        folder, name, *options = sys.argv[2:]
        fuzz(Path(folder), name, options)
    options = [arg for arg in sys.argv[1:] if arg.startswith("-")]
    names = [arg for arg in sys.argv[1:] if arg not in options] or NAMES
    if unknown := [name for name in names if name not in NAMES]:
        sys.exit(f"{unknown[0]}: no such reader; there are {', '.join(NAMES)}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = list(pool.map(lambda name: run(name, options), names))
    sys.exit(", ".join(name for name, code in zip(names, codes, strict=True) if code) or 0)


if __name__ == "__main__":
    main()
