"""What a run tells: a progress line, log.jsonl, curve.svg and report.md."""

import html
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["Log", "Progress", "count", "curve_svg", "duration", "printable", "write_file", "write_report"]


# ---- numbers for people -------------------------------------------------------------------------------------------


def count(n: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"; with a unit, "1.23 MB"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= factor:
            return f"{n / factor:.3g} {prefix}{unit}" if abs(n) < 999.5 * factor else f"{n / factor:.0f} {prefix}{unit}"
    return f"{n:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def printable(text: str) -> str:
    """What a model writes may hold control sequences that would take over a terminal; only line ends and tabs pass."""
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\ufffd" for c in text)


def write_file(path: Path, text: str) -> None:
    """Write a whole small file or leave the old one: never half of one, even where the power goes."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# ---- the log ------------------------------------------------------------------------------------------------------


class Log:
    """log.jsonl: one JSON object a line, each with the `step` it belongs to (updates done so far).

    A resumed run gives the step it resumes from: later records are dropped, for they will be written again, and so is a
    last line that a crash cut in half.
    """

    def __init__(self, path: str | os.PathLike, resume: int | None = None):
        self.path = Path(path)
        self.records: list[dict] = []
        if resume is not None and self.path.exists():
            self.records = [record for record in read_log(self.path) if record["step"] <= resume]
        write_file(self.path, "".join(_line(record) for record in self.records))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)

    def write(self, step: int, **values: object) -> None:
        record = {"step": step, **values}
        self._file.write(_line(record))
        self._file.flush()  # whoever follows the file sees whole lines
        self.records.append(record)

    def sync(self) -> None:
        """On the disk, so that a checkpoint never knows more than its log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of the records that have the value."""
        return [(record["step"], record[name]) for record in self.records if name in record]


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_log(path: Path) -> list[dict]:
    """The records of a log; a torn last line is left out.  ValueError: any other line is no record."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for i, line in enumerate(lines[:-1]):  # what follows the last newline is nothing, or torn
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {i + 1} is not a record of a run") from None
        records.append(record)
    return records


# ---- progress -----------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal, plain lines elsewhere: step, loss, tokens/s, share of peak, time left.

    flops    floating-point operations per token; None: the share of peak is not shown
    peak     what this machine reached in a test, FLOP/s
    done     share of the run that lies behind already (a resumed run); the time left counts from there
    """

    PLAIN_SECONDS = 5.0  # between two plain lines
    MEMORY = 0.95  # how much of the speed average the past keeps each step

    def __init__(self, console, flops: float | None = None, peak: float | None = None, done: float = 0.0):
        self._console, self._flops, self._peak, self._first = console, flops, peak, done
        self._start = time.perf_counter()
        self._tokens = self._seconds = 0.0
        self._last_plain = -math.inf
        self._bar = _rich_bar(console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=1.0, completed=done, text="") if self._bar else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Share of the measured peak that the counted operations reach (model FLOPs utilisation, arXiv:2204.02311)."""
        return self.tokens_per_second * self._flops / self._peak if self._flops and self._peak else None

    def update(self, step: str, done: float, loss: float, tokens: int, seconds: float) -> None:
        """After each step: its name ("12/100"), the share done, its loss, and how long its tokens took."""
        self._tokens = self.MEMORY * self._tokens + tokens
        self._seconds = self.MEMORY * self._seconds + seconds
        parts = [f"loss {loss:.3f}", f"{self.tokens_per_second:,.0f} tokens/s"]
        if self.mfu is not None:
            parts.append(f"{self.mfu:.0%} of peak")
        left = self._left(done)
        if left is not None:
            parts.append(f"{duration(left)} left")
        if self._bar:
            self._bar.update(self._task, completed=done, description=f"step {step}", text="  ".join(parts))
        elif time.perf_counter() - self._last_plain >= self.PLAIN_SECONDS or done >= 1:
            self._last_plain = time.perf_counter()
            self.say(f"step {step}  " + "  ".join(parts))

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self, done: float) -> float | None:
        spent = time.perf_counter() - self._start
        return spent * (1 - done) / (done - self._first) if done > self._first else None


def _rich_bar(console):
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        console=console,
        refresh_per_second=4,
    )


def console(stderr: bool = False):
    """A rich console; on standard error where standard output is for a program to read."""
    from rich.console import Console

    return Console(file=sys.stderr if stderr else sys.stdout)


# ---- the curve ----------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 112, 44, 48  # margins; the right one holds the names of the lines
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #59636e } .title { font-size: 15px; font-weight: 600 }
.grid { stroke: #8b949e; stroke-opacity: .25 } .axis { stroke: #8b949e }
.line { fill: none; stroke-width: 2; stroke-linejoin: round }
.train { stroke: #2f81f7 } .raw { stroke-width: 1; stroke-opacity: .3 } .validation { stroke: #e8710a }
text.train { fill: #2f81f7; stroke: none } text.validation, .dot { fill: #e8710a; stroke: none }
@media (prefers-color-scheme: dark) { text { fill: #9aa4af } }
</style>"""


def curve_svg(
    train: Sequence[tuple[int, float]],
    validation: Sequence[tuple[int, float]] = (),
    title: str = "Loss",
    ylabel: str = "nats per token",
) -> str:
    """An SVG of the two loss curves, readable on a light and on a dark page.

    train, validation   (step, loss) pairs in order of step; what is not finite is left out.  Many training points are
                        averaged into as many as the picture can show, with a smoothed line above the raw one.
    """
    raw = _thin([p for p in train if math.isfinite(p[1])], WIDTH // 2)
    smooth = _smooth(raw)
    validation = [p for p in validation if math.isfinite(p[1])]
    points = [*raw, *validation]
    xs = _ticks(0, max([x for x, _ in points], default=1) or 1, 6, whole=True)
    ys = _ticks(min([y for _, y in points], default=0), max([y for _, y in points], default=1), 6)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - xs[0]) / (xs[-1] - xs[0]),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - ys[0]) / (ys[-1] - ys[0]),
        )

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{html.escape(title)}</title>",
        STYLE,
        f'<text class="title" x="{LEFT}" y="24">{html.escape(title)}</text>',
    ]
    out += _axes(xs, ys, place, ylabel)
    out += [
        _line_svg(raw, place, "line train raw"),
        _line_svg(smooth, place, "line train"),
        _line_svg(validation, place, "line validation"),
    ]
    out += ['<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(*place(*p)) for p in validation]
    out += _names([("train", smooth), ("validation", validation)], place)
    return "\n".join(line for line in out if line) + "\n</svg>\n"


def _thin(points: Sequence[tuple[int, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours."""
    size = -(-len(points) // most) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _smooth(points: Sequence[tuple[float, float]], memory: float = 0.8) -> list[tuple[float, float]]:
    """Exponential average, corrected for its empty beginning as Adam's is."""
    total = weight = 0.0
    out = []
    for x, y in points:
        total, weight = memory * total + y, memory * weight + 1
        out.append((x, total / weight))
    return out


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    gap = next(f * power for f in (1, 2, 5, 10) if f * power >= span / about * (1 - 1e-9))
    gap = max(gap, 1.0) if whole else gap
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [i * gap for i in range(first, max(last, first + 1) + 1)]


def _axes(xs: list[float], ys: list[float], place, ylabel: str) -> Iterable[str]:
    digits = max(0, -math.floor(math.log10(ys[1] - ys[0]) + 1e-9))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for y in ys:
        at = place(xs[0], y)[1]
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y:.{digits}f}</text>'
    for x in xs:
        yield f'<text x="{place(x, ys[0])[0]:.1f}" y="{bottom + 18}" text-anchor="middle">{x:,.0f}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">step</text>'
    middle = (TOP + bottom) / 2
    yield f'<text transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">{html.escape(ylabel)}</text>'


def _line_svg(points: Sequence[tuple[float, float]], place, style: str) -> str:
    path = " ".join("{:.1f},{:.1f}".format(*place(*p)) for p in points)
    return f'<polyline class="{style}" points="{path}"/>' if len(points) > 1 else ""


def _names(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], place) -> Iterable[str]:
    """Each line's name and last value at its end, kept from lying on each other."""
    labels = sorted((place(*points[-1])[1], name, points[-1][1]) for name, points in lines if points)
    at = -math.inf
    for y, name, value in labels:
        at = max(y + 4, at + 16)
        yield f'<text class="{name}" x="{WIDTH - RIGHT + 6}" y="{at:.1f}">{name} {value:.2f}</text>'


# ---- the report ---------------------------------------------------------------------------------------------------


def write_report(folder: Path, title: str, facts: dict[str, str], log: Log, closing: str = "") -> None:
    """report.md and curve.svg of a run folder, from what its log holds.

    facts   {name: value} of the table at the top.  closing: the last paragraph, in Markdown.
    """
    write_file(folder / "curve.svg", curve_svg(log.column("loss"), log.column("val_loss"), title))
    out = [f"# {title}", "", "| | |", "|---|---|"]
    out += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    out += ["", "![training and validation loss](curve.svg)", "", *_evaluations(log), *_samples(log)]
    write_file(folder / "report.md", "\n".join([*out, closing]).rstrip() + "\n")


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _evaluations(log: Log, most: int = 12) -> list[str]:
    rows = [record for record in log.records if "bits_per_byte" in record]
    if not rows:
        return []
    gap = -(-len(rows) // most)
    shown = [row for i, row in enumerate(rows) if i % gap == 0 or i == len(rows) - 1]
    return [
        "## Held-out text",
        "",
        "| step | loss (nats per token) | bits per byte |",
        "|---:|---:|---:|",
        *(f"| {row['step']:,} | {row['val_loss']:.4f} | {row['bits_per_byte']:.4f} |" for row in shown),
        "",
    ]


def _samples(log: Log, most: int = 6) -> list[str]:
    rows = [record for record in log.records if "sample" in record][-most:]
    out = ["## Samples", ""] if rows else []
    for row in rows:
        text = row["prompt"] + row["sample"]
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any inside
        out += [f"After step {row['step']:,}:", "", fence, text, fence, ""]
    return out
