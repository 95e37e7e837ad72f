"""Reports: the log after a resume, the curve as well-formed SVG, numbers for people."""

import io
import json
import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from barelm.curve import curve_svg
from barelm.report import Board, Log, Progress, count, duration, printable, read_log, write_report
from rich.console import Console

SVG = "{http://www.w3.org/2000/svg}"


def test_a_resumed_log_has_each_step_once(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for step in range(1, 6):
        log.write(step, loss=float(step))
    log.close()
    log = Log(tmp_path / "log.jsonl", resume=3)
    for step in (4, 5, 6):
        log.write(step, loss=10.0 * step)
    log.close()
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path / "log.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
        (6, 60.0),
    ]
    assert log.column("loss")[-1] == (6, 60.0)


def test_a_line_cut_by_a_crash_is_dropped_and_another_bad_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    Log(path, resume=5).close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'
    for bad in "nonsense", "[" * 100_000, '{"step": ' + "9" * 5000 + "}":
        path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
        with pytest.raises(ValueError, match=r"log\.jsonl: line 2"):
            Log(path, resume=5)


def test_a_log_holds_no_nan(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    with pytest.raises(ValueError):
        log.write(1, loss=math.nan)
    log.close()


def points(svg, style):
    lines = [e for e in ElementTree.fromstring(svg).iter(SVG + "polyline") if e.get("class") == style]
    return [tuple(map(float, p.split(","))) for line in lines for p in line.get("points").split()]


def test_a_falling_loss_falls_in_the_picture():
    svg = curve_svg([(i, 5 - i / 100) for i in range(1, 300)], [(0, 5.0), (150, 3.5), (300, 2.0)])
    for style in ("line train", "line train raw", "line validation"):
        drawn = points(svg, style)
        assert drawn == sorted(drawn) and len(drawn) >= 3  # to the right, and y grows downwards
        assert all(a[1] < b[1] for a, b in pairwise(drawn))


def test_names_carry_the_last_values_and_do_not_lie_on_each_other():
    svg = curve_svg([(i, 2.0 + i) for i in range(10)] + [(10, 1.26)] * 99, [(10, 1.25)])
    names = {e.text: float(e.get("y")) for e in ElementTree.fromstring(svg).iter(SVG + "text") if e.get("class")}
    assert list(names) == ["Loss", "train 1.26", "validation 1.25"]
    assert names["validation 1.25"] - names["train 1.26"] >= 14


@pytest.mark.parametrize(
    "train, validation",
    [
        ([], []),
        ([(1, 2.0)], []),
        ([(i, 1.0) for i in range(5)], []),
        ([(0, 1e9), (10**7, 1e-9)], [(5, math.nan)]),
        ([(1, math.inf), (2, 3.0), (3, 2.5)], [(0, 0.0)]),
        ([(i, 2 + i % 3) for i in range(100_000)], []),
    ],
)
def test_any_points_give_a_picture_within_its_frame(train, validation):
    svg = curve_svg(train, validation, title="<a & b>")
    ElementTree.fromstring(svg)
    assert len(svg) < 50_000 and "nan" not in svg and "inf" not in svg
    for style in ("line train", "line validation"):
        assert all(60 <= x <= 760 and 0 <= y <= 400 for x, y in points(svg, style))


def test_the_report_tells_facts_scores_and_samples(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write(0, val_loss=5.5, bits_per_byte=8.0)
    log.write(1, loss=5.0)
    log.write(2, loss=4.0)
    log.write(2, val_loss=4.1, bits_per_byte=6.0)
    log.write(2, prompt="def ", sample="f(): ```\nx")
    write_report(tmp_path, "A run", {"model": "a | b"}, log, "The end.")
    log.close()
    text = (tmp_path / "report.md").read_text()
    assert "# A run" in text and "| model | a \\| b |" in text and "| 2 | 4.1000 | 6.0000 |" in text
    assert "````\ndef f(): ```\nx\n````" in text  # the fence is longer than what it holds
    assert text.endswith("The end.\n")
    ElementTree.parse(tmp_path / "curve.svg")


def test_numbers_for_people():
    assert [count(n, "B") for n in (0, 999, 1234, 999_999, 12_345_678, 3.2e12)] == [
        "0 B",
        "999 B",
        "1.23 kB",
        "1000 kB",
        "12.3 MB",
        "3.2 TB",
    ]
    assert count(124_000_000) == "124 M"
    assert [duration(s) for s in (0.4, 61, 3600, -1)] == ["0:00", "1:01", "1:00:00", "0:00"]
    assert printable("a\x1b[2J\tb\n\x9b") == "a\ufffd[2J\tb\n\ufffd"


def test_progress_is_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with Progress(Console(file=out), flops=1e3, peak=1e6) as progress:
        progress.update("1/2", 0.5, 3.25, tokens=500, seconds=1.0)
        progress.update("2/2", 1.0, 3.0, tokens=500, seconds=1.0)
    first, last = out.getvalue().splitlines()
    assert first.startswith("step 1/2  loss 3.250  500 tokens/s  50% of peak") and "left" in first
    assert last.startswith("step 2/2  loss 3.000")
    assert "\x1b" not in out.getvalue()


def test_progress_draws_a_bar_on_a_terminal():
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=120)) as progress:
        progress.update("1/2", 0.5, 3.25, tokens=500, seconds=1.0)
        progress.say("hello [bold]")
    assert "loss 3.250" in out.getvalue() and "hello [bold]" in out.getvalue() and "of peak" not in out.getvalue()


def test_log_lines_are_json(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write(1, sample="é\n\u2028")
    log.close()
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0])["sample"] == "é\n\u2028" and lines[1:] == [""]


@pytest.mark.peers
def test_tensorboard_reads_its_files_and_forgets_what_a_stopped_run_did_later(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, losses in ((0, {1: 2.5, 2: 2.0, 3: 9.0}), (2, {3: 1.5})):
        board = Board.open(tmp_path, step)
        for number, loss in losses.items():
            board.write(number, {"loss": loss, "sample": "text is no number"})
        board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 2.0), (3, 1.5)]
