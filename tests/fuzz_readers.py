"""Change small valid files at random and see that every reader either reads them or refuses them by a clear error:
`python tests/fuzz_readers.py [--mutations N] [--seconds S] [--seed K] [names]`.

Nothing else may happen: no other exception, no crash, no memory beyond a bound.  What does is kept in the folder named
at the end, with the seed that makes it again.  3000 or so a second and core; fuzz_guided.py
looks for them with a plan.
"""

import argparse
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

from formats import make_all, read, refused

NUMBERS = (0, 1, 2, 3, 4, 7, 8, 9, 31, 32, 127, 128, 255, 256, 65535, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40)
NUMBERS += (2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    b"0",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"9999999",
    b"true",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"[" * 50,
    b'"\\ud800"',
    b"NaN",
    b"1.5",
    b'"' + b"\x7f" * 400 + b'"',
    b"9" * 4000,
    b"9" * 5000,  # Python makes no number of more than 4300 digits
)
MEMORY = 1 << 30  # bytes that the process may take on top of what it has at the beginning


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The data with one to six changes, most of them where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not out:
            break
        where = rng.randrange(min(len(out), 2000) if rng.random() < 0.7 else len(out))
        rng.choice(CHANGES)(out, where, rng)
    return bytes(out)


def flip(out, where, rng):
    out[where] ^= 1 << rng.randrange(8)


def byte(out, where, rng):
    out[where] = rng.choice((0, 1, 9, 0x20, 0x22, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def number(out, where, rng):
    size = rng.choice((4, 8))
    value = rng.choice((*NUMBERS, len(out), len(out) - where)) % 256**size
    out[where : where + size] = value.to_bytes(size, "little")


def near(out, where, rng):
    """A number that is a little off."""
    size = rng.choice((4, 8))
    value = int.from_bytes(out[where : where + size], "little") + rng.choice((-32, -8, -4, -1, 1, 4, 8, 32))
    out[where : where + size] = (value % 256**size).to_bytes(size, "little")


def cut(out, where, rng):
    del out[where:]


def remove(out, where, rng):
    del out[where : where + rng.choice((1, 4, 8, 100, 1000))]


def repeat(out, where, rng):
    out[where:where] = out[where : where + rng.choice((1, 4, 8, 100, 1000))]


def swap(out, where, rng):
    size, other = rng.choice((4, 8, 24)), rng.randrange(len(out))
    a, b = out[where : where + size], out[other : other + size]
    if abs(where - other) >= size and len(a) == len(b):
        out[where : where + size], out[other : other + size] = b, a


def word(out, where, rng):
    """In JSON: another value where one begins."""
    at = out.find(b":", where) + 1 or where
    end = min((e for e in (out.find(c, at) for c in (b",", b"}", b"]")) if e > 0), default=len(out))
    out[at:end] = rng.choice(WORDS)


CHANGES = (flip, byte, number, near, cut, remove, repeat, swap, word)


class Fuzzer:
    """Small valid files in a folder, and what happens to changed ones."""

    def __init__(self, folder: Path):
        self.files = make_all(folder)
        self.valid = {name: path.read_bytes() for name, path in self.files.items()}
        self._open = {name: os.open(path, os.O_RDWR) for name, path in self.files.items()}
        self._changed = next(iter(self.files))
        for name, path in self.files.items():
            read(name, path)

    def change(self, name: str, seed: int) -> bytes:
        return mutated(self.valid[name], random.Random(seed))

    def attempt(self, name: str, data: bytes, thorough: bool = True) -> str | None:
        """ "read" or "refused"; anything else that happens is raised."""
        if name != self._changed:  # which others may lie beside
            self._write(self._changed, self.valid[self._changed])
        self._changed = name
        self._write(name, data)
        try:
            read(name, self.files[name], thorough)
            return "read"
        except ValueError as error:
            if not refused(name, self.files[name], error):
                raise
            return "refused"

    def _write(self, name: str, data: bytes) -> None:
        os.pwrite(self._open[name], data, 0)
        os.truncate(self._open[name], len(data))


def peak_of(run) -> int:
    """Bytes that Python and NumPy held at once while `run` ran, on top of what was there."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        run()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these files")
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # dropout that is ignored, say
    kept = Path(tempfile.mkdtemp(prefix="fuzz_readers_"))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        fuzzer = Fuzzer(Path(folder))
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, -1))
        names, counts, faults = args.names or list(fuzzer.files), {}, 0
        began = time.monotonic()
        for seed in range(args.seed, args.seed + args.mutations):
            name = names[seed % len(names)]
            data = fuzzer.change(name, seed)
            try:
                result = fuzzer.attempt(name, data)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever it is, it is what we look for; Rust's panics are no Exceptions
                result = "FAULT"
                faults += 1
                (kept / f"{name}.{seed}").write_bytes(data)
                print(f"{name} seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            counts[name, result] = counts.get((name, result), 0) + 1
            if time.monotonic() - began > args.seconds or faults >= 50:
                break
    for (name, result), n in sorted(counts.items()):
        print(f"{name:16} {result:8} {n:,}")
    print(f"{sum(counts.values()):,} changed files in {time.monotonic() - began:.0f} s, {faults} faults")
    if faults:
        sys.exit(f"kept in {kept}")
    shutil.rmtree(kept)


if __name__ == "__main__":
    main()
