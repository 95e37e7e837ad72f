"""python benchmarks/machine.py  -- what a number was measured on: processor, caches, threads, versions, and the
ceilings that speeds are a share of."""

import argparse
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
from barelm import _core

PRECISIONS = ("fp32", "bf16")


def read(path):
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def cpu_name():
    lines = [line for line in read("/proc/cpuinfo").splitlines() if line.lower().startswith("model name")]
    return lines[0].split(":", 1)[1].strip() if lines else platform.processor() or platform.machine()


def caches():
    """{"L1d": "48K", ...} of the first CPU; empty where the system does not say."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get(read(index / "type"), "")
        found[f"L{read(index / 'level')}{kind}"] = read(index / "size")
    return found


def memory_gib():
    total = [line.split()[1] for line in read("/proc/meminfo").splitlines() if line.startswith("MemTotal:")]
    return round(int(total[0]) / 2**20, 1) if total else None


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit():
    """The commit of this tree, with a plus sign where it has been changed since; None outside a repository."""

    def git(*words):
        run = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None

    try:
        head = git("rev-parse", "--short", "HEAD")
        return head and head + ("+" if git("status", "--porcelain") else "")
    except OSError:  # no git
        return None


def load_average():
    return [round(a, 2) for a in os.getloadavg()]


def ceilings(backends):
    """{backend: FLOP/s of all threads in each precision, and "copy": bytes read and written per second between arrays
    beyond every cache}.  The best of several tries: what else runs can only lower a ceiling."""
    copy = _core.copy_bandwidth(2.0)

    def peak(precision, backend):
        return max(_core.peak_flops(precision, 0.1, backend) for _ in range(3))

    return {b: {p: peak(p, b) for p in PRECISIONS} | {"copy": copy} for b in backends}


def describe():
    """Everything but the ceilings, as plain data."""
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "caches": caches(),
        "memory_gib": memory_gib(),
        "huge_pages": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": platform.platform(),
        "barelm": version("barelm") or _core.version(),
        "commit": commit(),
        "compiler": _core.compiler(),
        "backend": _core.isa(),
        "threads": _core.threads_get(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": version("torch"),
        "load_average": load_average(),
    }


def show(about):
    """The description as lines of Markdown."""
    sizes = ", ".join(f"{name} {size}" for name, size in about["caches"].items()) or "caches unknown"
    print(
        f"- {about['cpu']}, {about['cpus']} CPUs, {sizes}, {about['memory_gib']} GiB; huge pages {about['huge_pages']}"
    )
    print(f"- {about['system']}; Python {about['python']}, NumPy {about['numpy']}, PyTorch {about['torch']}")
    print(
        f"- barelm {about['barelm']} ({about['commit']}), compiler {about['compiler']}, {about['backend']}, "
        f"{about['threads']} threads; load average {about['load_average']}"
    )


def show_ceilings(ceilings):
    for backend, rates in ceilings.items():
        flops = ", ".join(f"{p} {rates[p] / 1e9:.0f} GFLOP/s" for p in PRECISIONS)
        print(f"- ceilings, {backend}: {flops}, copy {rates['copy'] / 1e9:.1f} GB/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("  -- ")[2])
    parser.add_argument("--json", metavar="FILE", help="write the same as JSON")
    options = parser.parse_args()
    about = describe()
    show(about)
    about["ceilings"] = ceilings(_core.backends())
    show_ceilings(about["ceilings"])
    if options.json:
        Path(options.json).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
