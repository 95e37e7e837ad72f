"""Curves of a run as SVG: readable on a light and on a dark page, without a library."""

import html
import math
from collections.abc import Iterable, Sequence

__all__ = ["curve_svg"]

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
    names: tuple[str, str] = ("train", "validation"),
    memory: float = 0.8,
) -> str:
    """An SVG of one curve over the steps, or of two.

    train, validation   (step, value) pairs in order of step; what is not finite is left out.  Many training points are
                        averaged into as many as the picture can show, with a smoothed line above the raw one.
    names               what stands at the end of each
    memory              how much of the past the smoothed line keeps from point to point; 0: it is the raw one
    """
    raw = _thin([p for p in train if math.isfinite(p[1])], WIDTH // 2)
    smooth = _smooth(raw, memory)
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
    out += _names([("train", names[0], smooth), ("validation", names[1], validation)], place)
    return "\n".join(line for line in out if line) + "\n</svg>\n"


def _thin(points: Sequence[tuple[int, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours."""
    size = -(-len(points) // most) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _smooth(points: Sequence[tuple[float, float]], memory: float) -> list[tuple[float, float]]:
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


def _names(lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], place) -> Iterable[str]:
    """Each line's name and last value at its end, kept from lying on each other."""
    labels = sorted((place(*points[-1])[1], style, name, points[-1][1]) for style, name, points in lines if points)
    at = -math.inf
    for y, style, name, value in labels:
        at = max(y + 4, at + 16)
        yield f'<text class="{style}" x="{WIDTH - RIGHT + 6}" y="{at:.1f}">{name} {value:.3g}</text>'
