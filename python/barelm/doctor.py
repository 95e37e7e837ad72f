"""`barelm doctor`: what was built, what this machine has, what is missing."""

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

from .report import console, count

__all__ = ["DoctorConfig", "examine", "main"]

NEEDED = ("numpy", "tiktoken", "safetensors", "rich")


@dataclass
class DoctorConfig:
    """Say what was built, what this machine has, and what is missing.  Exit code 1 where something needed is broken."""

    json: Annotated[bool, "the same as JSON"] = False


def main(config: DoctorConfig) -> int:
    report = examine()
    if config.json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)
    return 1 if report["broken"] else 0


def examine() -> dict:
    """Everything doctor knows: {section: {name: value}}, and under "broken" a list of what is."""
    broken: list[str] = []
    report = {
        "barelm": _try(broken, "the compiled part (barelm._core) does not work", _build),
        "machine": _machine(),
        "python": _python(broken),
        "extras": _extras(),
    }
    settings = {name: os.environ[name] for name in ("BARELM_ISA", "BARELM_THREADS") if name in os.environ}
    if settings:
        report["settings"] = settings
    if report["barelm"]:
        report["barelm"] |= {"CUDA": _cuda()}
        report["speed"] = _try(broken, "the kernels do not run", _speed)
    return report | {"broken": broken}


def _try(broken: list[str], what: str, look: Callable[[], dict]) -> dict:
    try:
        return look()
    except Exception as error:  # the one place where any failure is an answer
        broken.append(f"{what}: {type(error).__name__}: {error}")
        return {}


def _build() -> dict:
    from . import _core

    usable = _core.backends()
    named = os.environ.get("BARELM_ISA")
    return {
        "version": _core.version(),
        "compiler": _core.compiler(),
        "kernels built": ", ".join(_core.compiled()),
        "usable here": ", ".join(usable),
        "chosen": _core.isa() + (f" (BARELM_ISA={named})" if named else " (the best that runs here)"),
        "threads": f"{_core.threads_get()} ({_threads_reason()})",
        "memory free": count(_core.memory_available(), "B"),
    }


def _cuda() -> str:
    """What a GPU lacks here; it is no fault that there is none."""
    from .model import open_device

    try:
        open_device("cuda")
        return "usable (--device cuda)"
    except RuntimeError as error:
        return str(error).removeprefix("device: ")


def _threads_reason() -> str:
    if os.environ.get("BARELM_THREADS"):
        return f"BARELM_THREADS={os.environ['BARELM_THREADS']}"
    reasons = [f"the machine has {os.cpu_count()} CPUs"]
    if hasattr(os, "sched_getaffinity"):
        reasons.append(f"this process may use {len(os.sched_getaffinity(0))}")
    quota = _quota()
    if quota is not None:
        reasons.append(f"its cgroup grants {quota:g}")
    return ", ".join(reasons)


def _quota() -> float | None:
    """CPUs that the cgroup's quota amounts to (version 2, then 1); None: no quota."""
    v2 = _read("/sys/fs/cgroup/cpu.max").split()
    v1 = [_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    for quota, period in (v2, v1) if len(v2) == 2 else (v1,):
        if quota.isdigit() and period.isdigit() and int(period):
            return int(quota) / int(period)
    return None


def _speed() -> dict:
    from . import _core

    flops = {precision: _core.peak_flops(precision, seconds=0.2) for precision in ("fp32", "bf16")}
    return {f"peak {precision}": count(rate, "FLOP/s") for precision, rate in flops.items()} | {
        "copy": count(_core.copy_bandwidth(), "B/s")
    }


def _machine() -> dict:
    info = _read("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.lower().startswith("model name")]
    total = next((line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal:")), "")
    pages = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "CPU": names[0] if names else platform.processor() or platform.machine(),
        "memory": count(int(total) * 1024, "B") if total.isdigit() else "unknown",
        "huge pages": pages.split("[")[1].split("]")[0] if "[" in pages else "unknown",
        "system": platform.platform(),
    }


def _python(broken: list[str]) -> dict:
    versions = {"Python": f"{platform.python_version()} ({sys.executable})"}
    for name in NEEDED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
            broken.append(f"{name} is missing: pip install {name}")
    return versions


def _extras() -> dict:
    """What the package's own metadata calls optional: {extra: "present", or what is missing and how to get it}."""
    try:
        wanted = metadata.requires("barelm") or []
    except metadata.PackageNotFoundError:
        return {"extras": "unknown (barelm runs from a source tree, not from an installed package)"}
    extras: dict[str, list[str]] = {}
    for requirement in wanted:
        name, _, condition = requirement.partition(";")
        if "extra ==" in condition:
            package = name.strip().split("[")[0]
            for sign in "<>=!~ (":
                package = package.split(sign)[0]
            extras.setdefault(condition.split("extra ==")[1].strip(" '\")"), []).append(package)
    return {extra: _presence(extra, packages) for extra, packages in sorted(extras.items())}


def _presence(extra: str, packages: list[str]) -> str:
    missing = []
    for package in packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    return f"missing {', '.join(missing)}: pip install 'barelm[{extra}]'" if missing else "present"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _show(report: dict) -> None:
    screen = console()
    for section, values in report.items():
        if isinstance(values, dict) and values:
            screen.print(section, style="bold", highlight=False)
            for name, value in values.items():
                screen.print(f"  {name:14} {value}", markup=False, highlight=False, soft_wrap=True)
    for problem in report["broken"]:
        screen.print(f"broken: {problem}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    if not report["broken"]:
        screen.print("all that is needed is here", style="green", highlight=False)
