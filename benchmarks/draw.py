"""python benchmarks/draw.py FILE.json ... --out picture.svg  -- a picture of what bench_model.py or bench_growth.py
measured.

Bars of whole steps beside PyTorch, by model and precision, each rival with the times that barelm is faster; or lines of
tokens/s over window length, depth, width and threads.  The same files give the same bytes.
"""

import argparse
import html
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from barelm.report import count
from measured import gather, title_of

WIDTH, EDGE = 860, 16
PRECISIONS = ("fp32", "bf16")
LIBRARIES = ("barelm", "torch compile", "torch eager", "torch compile tuned", "torch eager tuned")
KINDS = ("barelm", "stock", "tuned")
AXES = {"T": "T: tokens of a window", "depth": "depth: layers", "width": "width: channels", "threads": "threads"}
SIZES = {"": 12, "title": 17, "head": 13, "note": 11}  # of text, pixels
TIMES = "\N{MULTIPLICATION SIGN}"
EM = 0.6  # width of a character, as a share of its size: what no common sans-serif exceeds on average
STYLE = """<style>
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #3d444d }
.title { font-size: 17px; font-weight: 600 } .head { font-size: 13px; font-weight: 600 } .note { font-size: 11px }
.times { font-weight: 700; fill: #1a7f37 } .behind { font-weight: 700; fill: #bc4c00 }
.barelm { fill: #2f81f7 } .stock { fill: #8b949e } .tuned { fill: #8b949e; fill-opacity: .6 }
.noise { stroke: #57606a; stroke-width: 1.2 }
.grid { stroke: #8b949e; stroke-opacity: .25 } .axis { stroke: #8b949e } .line { fill: none; stroke-linejoin: round }
.fp32 { stroke: #2f81f7 } .bf16 { stroke: #e8710a }
text.fp32, circle.fp32 { fill: #2f81f7; stroke: none } text.bf16, circle.bf16 { fill: #e8710a; stroke: none }
@media (prefers-color-scheme: dark) {
text { fill: #c9d1d9 } .times { fill: #3fb950 } .behind { fill: #f0883e } .noise { stroke: #c9d1d9 }
}
</style>"""
LINES = {  # by library: width, and dashes
    "barelm": "stroke-width:2.5",
    "torch compile": "stroke-width:1.5;stroke-dasharray:7 3",
    "torch eager": "stroke-width:1.5;stroke-dasharray:2 3",
    "torch compile tuned": "stroke-width:1.5;stroke-dasharray:7 3 2 3",
    "torch eager tuned": "stroke-width:1.5;stroke-dasharray:7 3 2 3 2 3",
}


# ---- pieces of a picture


def words(x, y, content, style="", anchor="start"):
    css = f' class="{style}"' if style else ""
    side = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text{css} x="{x:.1f}" y="{y:.1f}"{side}>{html.escape(content)}</text>'


def width_of(content, style=""):
    return EM * SIZES.get(style, SIZES[""]) * len(content)


def paragraph(y, content, style=""):
    """Lines that fit into the picture, and the y of the next."""
    size = SIZES.get(style, SIZES[""])
    lines = textwrap.wrap(content, int((WIDTH - 2 * EDGE) / (EM * size)))
    return [words(EDGE, y + i * (size + 4), line, style) for i, line in enumerate(lines)], y + len(lines) * (size + 4)


def page(height, title, body):
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {math.ceil(height)}" role="img">',
            f"<title>{html.escape(title)}</title>",
            STYLE,
            words(EDGE, 30, title, "title"),
            *body,
            "</svg>\n",
        ]
    )


def machine_line(machine, results):
    on = f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['threads']} threads, {machine.get('backend', '')}"
    rivals = any(r.library != "barelm" for r in results)
    beside = f" · PyTorch {machine.get('torch', '')}" if rivals else ""
    return f"{on}{beside} · barelm {machine.get('barelm', '')} ({machine['commit']})"


def shown(library):
    """A library, or a kind of them, as the reader knows it: "PyTorch compile, tuned"."""
    kind = kind_of(library)
    if kind == "barelm":
        return library
    mode = library.removeprefix("torch").removesuffix(kind).rstrip()
    return f"PyTorch{mode}, {kind}"


def kind_of(library):
    """One of KINDS; a kind is its own."""
    return library if library in KINDS else "tuned" if "tuned" in library else "stock"


# ---- bars: whole steps beside PyTorch

ROW, BAR, NAMES, NUMBERS = 20, 13, 172, 124  # heights; widths of the names and of what stands behind a bar


def bars_svg(machine, results, best=False):
    """Bars of bench_model.py's results; `best`: of eager and compiled PyTorch only the faster."""
    title = "Training on the CPU, whole steps: tokens per second (more is better)"
    precisions = [p for p in PRECISIONS if any(r.precision == p for r in results)]
    body, y = paragraph(50, machine_line(machine, results))
    for content in bars_notes(results, best):
        more, y = paragraph(y, content)
        body += more
    y += 4
    column = (WIDTH - 2 * EDGE - NAMES) / len(precisions)
    lefts = {p: EDGE + NAMES + i * column for i, p in enumerate(precisions)}
    body += [words(lefts[p], y + 12, p, "head") for p in precisions]
    y += 22
    for name in dict.fromkeys(title_of(r.workload) for r in results):
        found = [r for r in results if title_of(r.workload) == name]
        more, y = section(name, faster_ones(found) if best else found, lefts, column - NUMBERS, best, y)
        y += 14
        body += more
    return page(y, title, body)


def bars_notes(results, best):
    notes = ["Thin lines: half of all rounds."]
    rivals = [r.library for r in results if r.library != "barelm"]
    if rivals:
        notes = [f"1.25{TIMES}: barelm is 1.25 times as fast as this one (median over rounds).  " + notes[0]]
    if any("tuned" in library for library in rivals):
        notes.append("Tuned: PyTorch with another allocator, huge pages and, on AMD, MKL's fast path forced on.")
    if rivals and best:
        notes.append("PyTorch is the faster of eager and compiled.")
    return notes


def faster_ones(found):
    """barelm, and of stock and of tuned PyTorch in each precision that with the smaller median."""
    kept = {}
    for r in sorted(found, key=lambda r: float(np.median(r.seconds))):
        kept.setdefault((r.library.split()[0], "tuned" in r.library, r.precision), r)
    return list(kept.values())


def section(name, found, lefts, longest, best, y):
    """The bars of one model, on one scale in all precisions, and the y below them."""
    out = [words(EDGE, y + 12, name, "head")]
    scale = longest / max(noise(r)[1] for r in found)
    own = {r.precision: r for r in found if r.library == "barelm"}
    y += 20
    for kind in KINDS if best else LIBRARIES:
        row = [r for r in found if (kind_of(r.library) if best else r.library) == kind]
        if row:
            out.append(words(EDGE + NAMES - 8, y + BAR - 2, shown(kind), anchor="end"))
            y += ROW
        for r in row:
            out += bar(r, own.get(r.precision), lefts[r.precision], y - ROW, scale)
    return out, y


def noise(r):
    """Tokens/s between which half of all rounds lie."""
    tokens = r.rate * float(np.median(r.seconds))
    low, high = np.quantile(r.seconds, [0.25, 0.75])
    return tokens / float(high), max(tokens / float(low), r.rate)


def times(r, own):
    """How many times faster barelm is: in each round the quotient of the two times, and of these the median.  None:
    they were not in the same rounds."""
    if own is None or r is own or r.run != own.run or len(r.seconds) != len(own.seconds):
        return None
    return float(np.median(np.array(r.seconds) / own.seconds))


def bar(r, own, left, y, scale):
    low, high = noise(r)
    middle, end = y + BAR / 2, left + scale * high
    what = f"{shown(r.library)} {r.precision}: {r.rate:,.0f} tokens/s"
    place = f'x="{left:.1f}" y="{y}" width="{scale * r.rate:.2f}" height="{BAR}" rx="2"'
    yield f'<rect class="{kind_of(r.library)}" {place}><title>{html.escape(what)}</title></rect>'
    x1 = left + scale * low
    yield f'<line class="noise" x1="{x1:.1f}" x2="{end:.1f}" y1="{middle}" y2="{middle}"/>'
    rate, faster = rounded(r.rate), times(r, own)
    yield words(end + 6, y + BAR - 2, rate)
    if faster is not None:
        style = "times" if faster >= 1 else "behind"
        number = f"{faster:.2f}" if faster < 100 else rounded(faster)
        yield words(end + 6 + width_of(rate) + 6, y + BAR - 2, number + TIMES, style)


# ---- lines: how the cost of a step grows

PANEL, LEFT, RIGHT, TOP, BOTTOM = 250, 62, 62, 26, 36  # height of a panel, and its margins


class Frame(NamedTuple):
    """Where a panel's numbers lie, both ways logarithmic: x in [low, high] of `across`, y in that of `up`."""

    left: float
    top: float
    width: float
    height: float
    across: tuple
    up: tuple

    def x(self, value):
        return self.left + self.width * share(value, self.across)

    def y(self, value):
        return self.top + self.height * (1 - share(value, self.up))


def share(value, bounds):
    low, high = (math.log(b) for b in bounds)
    return (math.log(value) - low) / (high - low) if high > low else 0.5


def lines_svg(machine, model, results):
    """Lines of bench_growth.py's results, one panel an axis."""
    title = "How a training step grows: tokens per second"
    body, y = paragraph(50, machine_line(machine, results))
    for content in (model_line(model), "Both axes are logarithmic: half as fast is as far down everywhere."):
        more, y = paragraph(y, content)
        body += more
    more, y = legend(results, y + 4)
    body += more
    panels = [[r for r in results if r.axis == axis] for axis in AXES]
    panels = [panel for panel in panels if panel]
    columns = min(2, len(panels))
    for i, found in enumerate(panels):
        width = (WIDTH - 2 * EDGE) / columns
        body += panel_svg(found, EDGE + i % columns * width, y + i // columns * PANEL, width)
    return page(y + -(-len(panels) // columns) * PANEL + 4, title, body)


def model_line(m):
    return (
        f"{m['family']}, {m['layers']} layers, {m['channels']} channels, vocabulary {m['vocab']}, {m['tokens']} tokens "
        f"a step in windows of {m['context']}; one size is changed at a time."
    )


def legend(results, y):
    """The name of each line beside a piece of it, in as many rows as it takes, and the y below them."""
    out, x = [], EDGE
    for library in LIBRARIES:
        for precision in sorted({r.precision for r in results if r.library == library}, reverse=True):
            name = f"{shown(library)} {precision}"
            wide = 30 + width_of(name) + 14
            if x + wide > WIDTH - EDGE:
                x, y = EDGE, y + 18
            out.append(f'<path class="line {precision}" style="{LINES[library]}" d="M{x:.1f} {y + 8}h24"/>')
            out.append(words(x + 30, y + 12, name, precision))
            x += wide
    return out, y + 28


def panel_svg(found, x, y, width):
    rates, values = [r.rate for r in found], sorted({r.value for r in found})
    ticks = log_ticks(min(rates), max(rates))
    spare = 10  # a point is not cut in half by the frame
    frame = Frame(
        x + LEFT + spare,
        y + TOP,
        width - LEFT - RIGHT - 2 * spare,
        PANEL - TOP - BOTTOM,
        (values[0], values[-1]),
        (ticks[0], ticks[-1]),
    )
    yield words(x + LEFT, y + 14, AXES[found[0].axis], "head")
    yield from axes(frame, values, ticks, spare)
    ends = []
    for library in LIBRARIES:
        for precision in PRECISIONS:
            line = sorted((r for r in found if (r.library, r.precision) == (library, precision)), key=lambda r: r.value)
            if line:
                yield from line_svg(line, frame)
                ends.append((frame.y(line[-1].rate), line[-1], frame.x(line[-1].value)))
    right = frame.left + frame.width + spare
    for at, r in apart([(y, r) for y, r, _ in ends], 13, frame.top, frame.top + frame.height):
        yield words(right + 4, at + 4, rounded(r.rate), r.precision)


def axes(frame, values, ticks, spare):
    left, right, bottom = frame.left - spare, frame.left + frame.width + spare, frame.top + frame.height
    for tick in ticks:
        at = frame.y(tick)
        yield f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield words(left - 6, at + 4, rounded(tick), "note", "end")
    free = -math.inf  # where the next name of a value may begin
    for value in values:
        at, half = frame.x(value), width_of(str(value), "note") / 2
        if at - half >= free:
            yield words(at, bottom + 16, str(value), "note", "middle")
            free = at + half + 4
    yield f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>'


def line_svg(line, frame):
    points = [(frame.x(r.value), frame.y(r.rate)) for r in line]
    css = line[0].precision
    if len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline class="line {css}" style="{LINES[line[0].library]}" points="{path}"/>'
    for r, (x, y) in zip(line, points, strict=True):
        what = f"{shown(r.library)} {r.precision}, {r.axis} {r.value}: {r.rate:,.0f} tokens/s"
        yield f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{html.escape(what)}</title></circle>'


def apart(labels, gap, top, bottom):
    """(y, thing) in order of y, moved as far as it takes for them to lie `gap` apart within [top, bottom]."""
    labels = sorted(labels, key=lambda label: label[0])
    ys = [y for y, _ in labels]
    for i in range(1, len(ys)):
        ys[i] = max(ys[i], ys[i - 1] + gap)
    for i in reversed(range(len(ys))):
        ys[i] = min(ys[i], bottom - gap * (len(ys) - 1 - i))
    return [(max(y, top + gap * i), thing) for i, (y, (_, thing)) in enumerate(zip(ys, labels, strict=True))]


def log_ticks(low, high):
    """1, 2 and 5 times powers of ten that enclose [low, high]; only powers of ten where those are many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for factors in ((1, 2, 5), (1,)):
        every = [f * 10.0**p for p in powers for f in factors]
        first = max(i for i, tick in enumerate(every) if tick <= low * (1 + 1e-9))
        last = min(i for i, tick in enumerate(every) if tick >= high * (1 - 1e-9) and i > first)
        ticks = every[first : last + 1]
        if len(ticks) <= 8:
            return ticks
    return ticks[:: -(-len(ticks) // 8)] if (len(ticks) - 1) % -(-len(ticks) // 8) == 0 else [ticks[0], ticks[-1]]


def rounded(value):
    """In at most seven characters: 12,345, 1.23 M, 0.5."""
    return f"{value:,.0f}" if 10 <= value < 999_999.5 else count(value)


# ---- the command


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("  -- ")[2], allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE.json", help="of bench_model.py, or of bench_growth.py")
    parser.add_argument("--out", required=True, metavar="FILE.svg", help="the picture")
    parser.add_argument("--best", action="store_true", help="of eager and compiled PyTorch only the faster")
    options = parser.parse_args()
    try:
        machine, model, results = gather(options.files)
        picture = bars_svg(machine, results, options.best) if model is None else lines_svg(machine, model, results)
        Path(options.out).write_text(picture, encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
