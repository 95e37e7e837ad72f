"""`--profile`: where the time of a step goes, by operator and size, beside what the machine can do."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import _core

__all__ = ["Line", "Profile"]


@dataclass(frozen=True)
class Line:
    """An operator at one size.  ops.def says what it does and what the letters mean."""

    operator: str  # "" for the time between operators
    sizes: dict[str, int]
    calls: float  # a step
    seconds: float  # a step
    share: float  # of the step
    flops: float | None  # a second; None where memory sets the limit
    bytes: float | None  # a second that must be read and written at least; None where arithmetic sets the limit


class Profile:
    """Times the operators of every model made after it, within the steps that it is told of.  The first step, in which
    memory is allocated, counts only where it is the only one.

    Timing costs about a microsecond a call.  Models made before are not timed; there is no way back.
    """

    def __init__(self):
        self._forget()
        self._warm = False
        _core.profile_begin()

    def _forget(self):
        self.steps, self.seconds = 0, 0.0
        self._spent: dict[tuple, list[float]] = {}  # (operator, sizes) -> [calls, seconds]

    @contextmanager
    def step(self) -> Iterator[None]:
        """What happens within counts as a step."""
        if self.steps and not self._warm:
            self._forget()
            self._warm = True
        _core.profile_take()  # what came before is no part of it
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.steps += 1
        for operator, sizes, calls, seconds in _core.profile_take():
            spent = self._spent.setdefault((operator, tuple(sizes.items())), [0, 0.0])
            spent[0] += calls
            spent[1] += seconds

    def lines(self) -> list[Line]:
        """One for each operator and size, the longest first; the last is what lies between them."""
        if not self.steps:
            return []
        lines = [self._line(*key, *spent) for key, spent in self._spent.items()]
        between = self.seconds - sum(seconds for _, seconds in self._spent.values())
        return [*sorted(lines, key=lambda line: -line.seconds), self._line("", (), 0, between)]

    def _line(self, operator: str, sizes: tuple, calls: float, seconds: float) -> Line:
        found = dict(sizes)
        rates = [work[operator](**found) * calls / seconds if operator in work else None for work in (_FLOPS, _BYTES)]
        return Line(operator, found, calls / self.steps, seconds / self.steps, seconds / self.seconds, *rates)

    def table(self, peak: float, least: float = 0.005) -> str:
        """Text.  peak: FLOP/s of the machine.  Lines under the share `least` are added up."""
        lines = self.lines()
        shown = [line for line in lines if line.share >= least or not line.operator]
        rest = [line for line in lines if line not in shown]
        rows = [_HEADER, *(_row(line, peak) for line in shown)]
        if rest:
            calls, seconds = sum(line.calls for line in rest), sum(line.seconds for line in rest)
            rows.insert(
                -1, _row(Line(f"{len(rest)} more", {}, calls, seconds, sum(r.share for r in rest), None, None), peak)
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    row[1].ljust(widths[1]),
                    *(c.rjust(w) for c, w in zip(row[2:], widths[2:], strict=True)),
                ]
            ).rstrip()
            for row in rows
        )


_HEADER = ("operator", "size", "calls", "ms", "%", "GFLOP/s", "% of peak", "GB/s")
_NO_SIZES = ("fn", "prec", "held", "accumulate", "norm")


def _row(line: Line, peak: float) -> tuple[str, ...]:
    sizes = " x ".join(f"{name} {value}" for name, value in line.sizes.items() if name not in _NO_SIZES)
    return (
        line.operator or "between them",
        sizes,
        f"{line.calls:.4g}" if line.calls else "",
        f"{1e3 * line.seconds:.2f}",
        f"{100 * line.share:.1f}",
        f"{line.flops / 1e9:.0f}" if line.flops else "",
        f"{100 * line.flops / peak:.0f}" if line.flops else "",
        f"{line.bytes / 1e9:.1f}" if line.bytes else "",
    )


# ---- the least work of a call: two operations a multiply-add; four bytes a value, each array once ----


def _product(N, C, OC, **_):
    return 2.0 * N * C * OC


def _scores(B, T, NH, HS, **_):  # one product of attention, its causal half
    return 1.0 * B * NH * HS * T * (T + 1)


_HELD = (4, 2, 1)  # bytes a value of fp32, bf16, int8

_FLOPS = {
    "linear_forward": _product,
    "linear_packed": _product,
    "norm_linear_packed": _product,
    "linear_backward_input": _product,
    "linear_backward_weight": _product,
    "attention_forward": lambda **s: 2 * _scores(**s),  # q.k and p.v
    "attention_backward": lambda **s: 5 * _scores(**s),  # q.k again, dP, dQ, dK, dV
}
_BYTES = {
    "embedding_forward": lambda B, T, C, **_: 8.0 * B * T * C,
    "layernorm_forward": lambda N, C: 8.0 * N * C,
    "layernorm_backward": lambda N, C: 16.0 * N * C,
    "rmsnorm_forward": lambda N, C: 8.0 * N * C,
    "rmsnorm_backward": lambda N, C: 16.0 * N * C,
    "gelu_forward": lambda N, F, **_: 8.0 * N * F,
    "gelu_backward": lambda N, F, **_: 12.0 * N * F,
    "swiglu_forward": lambda N, F: 12.0 * N * F,
    "swiglu_backward": lambda N, F: 20.0 * N * F,
    "logprob_forward": lambda N, V, Vp: 4.0 * N * V,
    "logprob_backward": lambda N, V, Vp: 8.0 * N * V,
    "logprob_forward_backward": lambda N, V, Vp: 8.0 * N * V,
    "adamw": lambda size, **_: 28.0 * size,
    "held_write": lambda held, C, OC: (4.0 + _HELD[held]) * C * OC,
    "held_read": lambda held, C, OC: (4.0 + _HELD[held]) * C * OC,
}
