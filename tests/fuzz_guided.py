"""Let libFuzzer look for changed files that lead a reader where none did before, and see that every one is read or
refused by a clear error: `python tests/fuzz_guided.py [names] [libFuzzer's options]`.

The files and half of the changes are those of fuzz_readers.py; the other half is libFuzzer's own.  Each reader has a
process of its own, one after the other.  One file in 16 is read to the end, the others as far as their reader goes.
fuzz.sh runs this under the sanitizers, where -malloc_limit_mb counts too.
"""

import random
import subprocess
import sys
import tempfile
import warnings
import zlib
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


def main():
    if sys.argv[1:2] == ["--in"]:
        folder, name, *options = sys.argv[2:]
        fuzz(Path(folder), name, options)
    options = [arg for arg in sys.argv[1:] if arg.startswith("-")]
    failed = []
    for name in [arg for arg in sys.argv[1:] if arg not in options] or NAMES:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            print(f"==== {name}", flush=True)
            if subprocess.run([sys.executable, __file__, "--in", folder, name, *options]).returncode:
                failed.append(name)
    sys.exit(", ".join(failed) or 0)


if __name__ == "__main__":
    main()
