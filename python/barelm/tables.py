"""A table in plain text: columns of equal width, whatever the width of the screen, so that nothing is ever cut off."""

from collections.abc import Sequence

__all__ = ["aligned", "with_error"]


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The rows as lines, of which the first is the head; the first `left` columns begin at the left, the others end at
    the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:{'<' if i < left else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def with_error(value: float, stderr: float | None, digits: int, gap: str = " ") -> str:
    """0.25 ± 0.04; without a standard error the value alone."""
    return f"{value:.{digits}f}" + ("" if stderr is None else f"{gap}±{gap}{stderr:.{digits}f}")
