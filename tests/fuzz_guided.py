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
    from fuzz_readers import Fuzzer, mutated

LIMITS = ["-max_len=16384", "-timeout=60", "-rss_limit_mb=1024", "-malloc_limit_mb=64"]


def fuzz(fuzzer: Fuzzer, name: str, folder: Path, options: list[str]) -> None:
    """Ends the process."""
    rng = random.Random()
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(fuzzer.valid[name])

    def change(data: bytes, room: int, seed: int) -> bytes:
        rng.seed(seed)
        return mutated(data, rng)[:room] if rng.random() < 0.5 else atheris.Mutate(data, room)

    def attempt(data: bytes) -> None:
        fuzzer.attempt(name, data, thorough=zlib.crc32(data) % 16 == 0)

    atheris.Setup([sys.argv[0], *LIMITS, *options, str(corpus)], attempt, custom_mutator=change)
    atheris.Fuzz()


def main():
    options = [arg for arg in sys.argv[1:] if arg.startswith("-")]
    names = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    warnings.simplefilter("ignore")  # dropout that is ignored, say
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        fuzzer = Fuzzer(Path(folder))
        if len(names) == 1:
            fuzz(fuzzer, *names, Path(folder), options)
        runs = [subprocess.run([sys.executable, __file__, name, *options]) for name in names or fuzzer.files]
    sys.exit(max(run.returncode for run in runs))


if __name__ == "__main__":
    main()
