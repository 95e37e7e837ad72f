"""benchmarks/bench_growth.py on a tiny model through the real command, and benchmarks/draw.py: its numbers are those of
the files, its labels lie beside each other and within the picture, and a file that holds anything else is refused."""

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from barelm import Config, Model, _core
from barelm.loop import flops_per_token
from barelm.report import count

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_growth as bench
import bench_model
import draw
import measured

BENCHMARKS = Path(bench.__file__).parent
TINY = "--quick --layers 1 --channels 32 --vocab 101 --tokens 32 --context 8 --lengths 8,16 --depths 1,2 --widths 16,64"
STEPS = [BENCHMARKS / f"amd-epyc-zen4-2cores-{precision}.json" for precision in ("fp32", "bf16")]


def command(script, *words):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, BENCHMARKS / script, *words]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


# ---- what is measured


@pytest.mark.slow
def test_the_command_measures_writes_and_says_what_it_did(tmp_path):
    file = tmp_path / "growth.json"
    run = command("bench_growth.py", *TINY.split(), "--only", "T", "--precision", "bf16", "--json", str(file))
    assert run.returncode == 0, run.stderr
    found = json.loads(file.read_text())
    assert found["model"] == dict(family="gpt2", layers=1, channels=32, vocab=101, context=8, tokens=32)
    assert "--only T" in found["machine"]["command"] and found["machine"]["command"] in run.stdout
    assert [(r["axis"], r["value"], r["peer"]) for r in found["results"]] == [
        ("T", 8, "barelm bf16"),
        ("T", 16, "barelm bf16"),
    ]
    peak = found["ceilings"][str(_core.threads_get())]["bf16"]
    for r in found["results"]:
        flops = flops_per_token(Config(**r["workload"]["sizes"]), r["value"])
        assert r["workload"]["B"] * r["workload"]["T"] == 32 and len(r["seconds"]) == 3
        assert r["flops"] == pytest.approx(32 * flops)
        assert r["tokens_per_second"] == pytest.approx(32 / np.median(r["seconds"]))
        assert r["share_of_peak"] == pytest.approx(flops * r["tokens_per_second"] / peak)
        assert r["gib"] is None or 0.01 < r["gib"] < 1
        assert f"| T {r['value']} | {32 // r['value']}, {r['value']} |" in run.stdout
    assert "round 3 of 3" in run.stderr and "|" not in run.stderr
    picture = tmp_path / "growth.svg"
    drawn = command("draw.py", str(file), "--out", str(picture))
    assert drawn.returncode == 0, drawn.stderr
    check_layout(picture.read_text())


@pytest.mark.slow
def test_threads_change_the_time_and_nothing_else(monkeypatch):
    monkeypatch.setattr(bench_model, "PAUSE", 0)
    monkeypatch.setenv("BARELM_THREADS", "1")
    options = bench.parse([*TINY.split(), "--threads", "1,2", "--only", "threads"])
    found = bench.race(options.points, options.names, 2, 0.01)
    assert [(r["threads"], r["peer"]) for r in found] == [
        (n, f"barelm {precision}") for n in (1, 2) for precision in ("fp32", "bf16")
    ]
    assert found[0]["losses"][:2] == found[2]["losses"][:2] and os.environ["BARELM_THREADS"] == "1"


def test_another_loss_with_other_threads_is_an_error():
    def runner(name, *losses):
        return argparse.Namespace(name=name, losses=list(losses))

    one, two = (p for p in bench.parse(["--threads", "1,2"]).points if p.axis == "threads")
    same, torch = runner("barelm fp32", 4.5, 4.4, 4.0), runner("torch eager fp32", 4.5, 4.4)
    later = [runner("barelm fp32", 4.5, 4.4), runner("torch eager fp32", 4.5, 4.3)]
    bench.check_threads({one: [same, torch], two: later})
    with pytest.raises(RuntimeError, match="barelm fp32, 2 threads"):
        bench.check_threads({one: [same], two: [runner("barelm fp32", 4.5, np.nextafter(4.4, 5))]})


def test_only_the_size_of_the_axis_changes():
    options = bench.parse([])
    base = Config(**options.points[0].workload.sizes)
    for p in options.points:
        c, w = p.workload.config, p.workload
        assert w.B * w.T == 4096 and c.context == 4096 and c.vocab_size == 4096 and c.head_size == 64
        if p.axis == "T":
            assert c == base and p.value == w.T
        else:
            changed = {"depth": c.n_layer, "width": c.n_embd, "threads": p.threads}
            usual = {"depth": 6, "width": 384, "threads": _core.threads_get()}
            assert changed == usual | {p.axis: p.value} and w.T == 256
    assert [p.value for p in options.points if p.axis == "T"] == [64, 128, 256, 512, 1024, 2048, 4096]
    assert bench.doubling(1, 6) == [1, 2, 4, 6] and bench.doubling(1, 1) == [1]


def test_llama_is_measured_too():
    (point,) = bench.parse(["--family", "llama", "--only", "depth 12"]).points
    c = point.workload.config
    assert (c.norm, c.act, c.pos, c.tied, c.n_layer, c.n_embd) == ("rmsnorm", "swiglu", "rope", False, 12, 384)


def test_points_that_fit_take_turns_together(capsys):
    points = [p for p in bench.parse([]).points if p.axis == "T"]
    size = sum(points[0].bytes(name) for name in ("barelm fp32", "torch eager fp32"))
    names = ["barelm fp32", "torch eager fp32"]
    assert [len(g) for g in bench.together(points, names, 3.5 * size)] == [3, 3, 1]
    assert [len(g) for g in bench.together(points, names, 100 * size)] == [7]
    assert bench.together(points[:1], names, 0.5 * size) == []
    assert "left out: T 64" in capsys.readouterr().err


def test_growth_is_taken_within_a_round():
    def result(value, seconds, peer="barelm fp32"):
        sizes = dict(n_layer=1, n_head=1, n_embd=16, vocab_size=37, context=64)
        workload = dict(name=f"T {value}", sizes=sizes, B=1, T=value)
        return dict(axis="T", value=value, threads=2, flops=10.0 * value, workload=workload, peer=peer, seconds=seconds)

    # after the first round the machine is three times slower
    short, long = result(8, [1.0, 3.0, 3.0]), result(32, [2.0, 6.0, 7.0])
    rival = result(32, [3.0, 9.0, 9.0], "torch eager fp32")
    bench.conclude([short, long, rival], {2: {"fp32": 1e9, "bf16": 2e9}})
    assert short["times_time"] == 1 and short["stock"] is None
    assert long["times_time"] == pytest.approx(2) and long["times_flops"] == pytest.approx(4)
    assert long["stock"] == pytest.approx(1.5) and rival["times_time"] == 1
    assert bench.row(long | {"gib": None})[:4] == ("T 32", "1, 32", "2", "barelm fp32")


@pytest.mark.parametrize(
    "words, says",
    [
        ("--lenghts 64", "--lenghts"),
        ("--lengths 64,x", "--lengths: 'x' is not a whole number above 0"),
        ("--lengths 64,0", "'0' is not a whole number"),
        ("--depths ''", "is not a whole number"),
        ("--lengths 96", "4096 tokens a step are not a whole number of windows of 96"),
        ("--widths 100", "width 100 is not a multiple of 64"),
        ("--family bert", "invalid choice: 'bert'"),
        ("--only heads", "axes are T, depth, width, threads"),
        ("--peers jax", "--peers: none has jax"),
        ("--rounds -1", "--rounds"),
    ],
)
def test_a_wrong_flag_is_named(capsys, words, says):
    with pytest.raises(SystemExit) as stopped:
        bench.parse(words.split())
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_peers_need_torch_and_a_gpt2(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda package: None)
    with pytest.raises(SystemExit):
        bench.parse(["--peers", "eager"])
    assert "torch is not installed" in capsys.readouterr().err
    monkeypatch.setattr(bench, "find_spec", lambda package: True)
    monkeypatch.setattr(bench.tuned, "missing", lambda: "no allocator")
    options = bench.parse(["--peers", "eager", "--precision", "fp32"])
    assert options.names == ["barelm fp32", "torch eager fp32"]
    assert "left out: tuned PyTorch (no allocator)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.parse(["--peers", "eager", "--family", "llama"])
    assert "there is none for --family llama" in capsys.readouterr().err


# ---- what is drawn


def picture(files, best=False):
    machine, model, results = measured.gather(files)
    return draw.bars_svg(machine, results, best) if model is None else draw.lines_svg(machine, model, results)


def growth(axes=draw.AXES, peers=tuple(bench.CPU_PEERS), rate=1000.0):
    """What bench_growth.py writes, of sizes 1, 2 and 4 on each axis."""
    sizes = dict(n_layer=1, n_head=1, n_embd=16, vocab_size=37, context=64)
    machine = dict(cpu="A processor, 3.0 GHz", cpus=2, threads=2, backend="ref", barelm="1.0", commit="abc", torch="2")
    results = [
        dict(axis=axis, value=n, peer=peer, seconds=[1 / n, 2 / n], tokens_per_second=rate / n * (1 + i / 50))
        | dict(workload=dict(name="T", sizes=sizes, B=2, T=32))
        for axis in axes
        for n in (1, 2, 4)
        for i, peer in enumerate(peers)
    ]
    model = dict(family="gpt2", layers=1, channels=16, vocab=37, context=64, tokens=64)
    return {"model": model, "machine": machine, "results": results}


def written(tmp_path, data, name="file.json"):
    file = tmp_path / name
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


def elements(svg, tag):
    return [e for e in ET.fromstring(svg).iter() if e.tag.endswith("}" + tag)]


def box(e):
    """left, top, right, bottom of a text, a character being as wide as draw.py takes it for."""
    style, anchor = e.get("class", ""), e.get("text-anchor", "start")
    wide, high = draw.width_of(e.text, style), draw.SIZES.get(style, 12)
    left = float(e.get("x")) - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
    return left, float(e.get("y")) - 0.75 * high, left + wide, float(e.get("y")) + 0.2 * high


def check_layout(svg):
    """No text leaves the picture or lies on another."""
    boxes = [(box(e), e.text) for e in elements(svg, "text")]
    height = float(ET.fromstring(svg).get("viewBox").split()[3])
    for i, ((left, top, right, bottom), text) in enumerate(boxes):
        assert left >= 0 and top >= 0 and right <= draw.WIDTH and bottom <= height, text
        for (left2, top2, right2, bottom2), other in boxes[:i]:
            assert left >= right2 or left2 >= right or top >= bottom2 or top2 >= bottom, (text, other)


def bars_of(svg):
    return [(e[0].text, float(e.get("width"))) for e in elements(svg, "rect")]


def bar_text(r):
    *library, precision = r["peer"].split()
    name = "barelm" if library == ["barelm"] else draw.shown(" ".join(library))
    return f"{name} {precision}: {r['tokens_per_second']:,.0f} tokens/s"


def test_bars_are_as_long_as_their_numbers(tmp_path):
    files = [json.loads(file.read_text()) for file in STEPS]
    want = [bar_text(r) for data in files for r in data["results"]]
    assert sorted(text for text, _ in bars_of(picture(STEPS))) == sorted(want) and len(want) >= 30
    workloads = {json.dumps(r["workload"], sort_keys=True) for r in files[0]["results"]}
    for workload in workloads:  # one scale for each, in both precisions
        mine = [
            data | {"results": [r for r in data["results"] if r["workload"] == json.loads(workload)]} for data in files
        ]
        lengths = dict(bars_of(picture([written(tmp_path, data, f"{i}.json") for i, data in enumerate(mine)])))
        scales = [lengths[bar_text(r)] / r["tokens_per_second"] for data in mine for r in data["results"]]
        np.testing.assert_allclose(scales, scales[0], rtol=1e-3)


@pytest.mark.parametrize("best", [False, True])
def test_ratios_are_those_of_the_file(best):
    svg = picture(STEPS, best)
    shown = [e.text for e in elements(svg, "text") if e.get("class") in ("times", "behind")]
    results = [r for file in STEPS for r in json.loads(file.read_text())["results"]]
    for r in results:
        if r["peer"].startswith("barelm"):
            for kind in ("stock", "tuned"):
                assert f"{r[kind]:.2f}{draw.TIMES}" in shown
    ours = sum(r["peer"].startswith("barelm") for r in results)
    assert len(shown) == ours * (2 if best else 4) > 0  # stock and tuned, eager and compiled


def test_a_ratio_below_one_looks_otherwise(tmp_path):
    data = json.loads(STEPS[0].read_text())
    for r in data["results"]:
        if r["peer"].startswith("barelm"):
            r["seconds"] = [5 * t for t in r["seconds"]]
    found = elements(picture([written(tmp_path, data)]), "text")
    behind = [float(e.text[:-1]) for e in found if e.get("class") == "behind"]
    ahead = [float(e.text[:-1]) for e in found if e.get("class") == "times"]
    assert behind and all(x < 1 for x in behind) and all(x >= 1 for x in ahead)


def test_ratios_are_medians_over_rounds_of_one_run(tmp_path):
    data = growth(axes=["T"], peers=["barelm fp32", "torch eager fp32"])
    del data["model"]
    data["results"] = data["results"][:2]
    data["results"][0]["seconds"], data["results"][1]["seconds"] = [1.0, 2.0, 2.0], [3.0, 4.0, 4.0]
    svg = picture([written(tmp_path, data)])
    assert f"2.00{draw.TIMES}" in [e.text for e in elements(svg, "text")]
    apart = [written(tmp_path, data | {"results": [r]}, f"{i}.json") for i, r in enumerate(data["results"])]
    assert not [e for e in elements(picture(apart), "text") if e.get("class") in ("times", "behind")]


def test_points_of_lines_lie_where_their_numbers_say(tmp_path):
    data = growth()
    svg = picture([written(tmp_path, data)])
    points = {e[0].text: (float(e.get("cx")), float(e.get("cy"))) for e in elements(svg, "circle")}
    assert len(points) == len(data["results"]) == 4 * 3 * 10
    first, second, third = (points[f"barelm fp32, depth {n}: {1000 / n:,.0f} tokens/s"] for n in (1, 2, 4))
    # halves are as far apart everywhere, on both axes
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2) and first[0] < second[0]
    assert second[1] - first[1] == pytest.approx(third[1] - second[1], abs=0.2) and first[1] < second[1]
    ends = [e.text for e in elements(svg, "text") if e.get("class") in ("fp32", "bf16")]
    assert ends.count("250") == 4 and "barelm bf16" in ends


@pytest.mark.parametrize("rate", [1e-6, 3.0, 999_999.0, 2.5e11])
@pytest.mark.parametrize("axes", [["T"], ["T", "depth", "threads"], [*draw.AXES]])
def test_labels_of_lines_stay_clear(tmp_path, rate, axes):
    check_layout(picture([written(tmp_path, growth(axes, rate=rate))]))


@pytest.mark.parametrize("best", [False, True])
def test_labels_of_bars_stay_clear(tmp_path, best):
    check_layout(picture(STEPS, best))
    check_layout(picture(STEPS[:1], best))
    data = json.loads(STEPS[0].read_text())
    data["machine"]["cpu"] = "An uncommonly long name of a processor with (R) and (TM) and 128 cores @ 2.40 GHz"
    for i, r in enumerate(data["results"]):
        r["tokens_per_second"], r["seconds"] = 1.23456e11 / (i + 1), [1e-7 * (1 + i), 3e-7, 1.0]
        r["workload"]["name"] = r["workload"]["name"].ljust(40, "W")
    check_layout(picture([written(tmp_path, data)], best))


def test_values_close_together_and_all_alike(tmp_path):
    data = growth(axes=["width"])
    for r in data["results"]:
        r["value"], r["tokens_per_second"] = {1: 1000, 2: 1001, 4: 9000}[r["value"]], 500.0
    check_layout(picture([written(tmp_path, data)]))
    alone = [r for r in data["results"] if r["value"] == 9000]
    check_layout(picture([written(tmp_path, data | {"results": alone})]))


def test_the_same_files_give_the_same_bytes(tmp_path):
    for name in ("a.svg", "b.svg"):
        assert command("draw.py", *map(str, STEPS), "--best", "--out", str(tmp_path / name)).returncode == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_names_are_escaped(tmp_path):
    data = growth()
    data["machine"]["cpu"] = 'A & B <script>"'
    assert 'A & B <script>"' in "".join(e.text for e in elements(picture([written(tmp_path, data)]), "text"))


def spoiled(change):
    data = growth()
    change(data)
    return data


HOSTILE = {
    "not JSON": ("{", "is not JSON"),
    "nested": ("[" * 100_000, "is not JSON"),
    "an array": ([], "the file: must be an object"),
    "nothing": ({}, "machine: must be an object"),
    "no results": (spoiled(lambda d: d.update(results=[])), "results: there are none"),
    "results of another kind": (spoiled(lambda d: d.update(results={"a": 1})), "results: must be a list"),
    "not finite": (
        spoiled(lambda d: d["results"][3].update(tokens_per_second=float("nan"))),
        r"results\[3\].tokens_per",
    ),
    "negative": (spoiled(lambda d: d["results"][0]["seconds"].append(-1)), r"results\[0\].seconds: must be a number"),
    "huge": (spoiled(lambda d: d["results"][0].update(tokens_per_second=10**400)), "must be a number above 0"),
    "true": (spoiled(lambda d: d["results"][0].update(value=True)), "value: must be a whole number"),
    "no rounds": (spoiled(lambda d: d["results"][0].update(seconds=[])), "seconds: there are none"),
    "another peer": (spoiled(lambda d: d["results"][0].update(peer="jax fp32")), "'jax fp32' is neither"),
    "another axis": (spoiled(lambda d: d["results"][0].update(axis="heads")), "axis: is 'heads'"),
    "a name that cannot be seen": (
        spoiled(lambda d: d["machine"].update(cpu="a\x00b")),
        "machine.cpu: must be a short",
    ),
    "no processor": (spoiled(lambda d: d["machine"].pop("cpu")), "machine.cpu"),
    "no threads": (spoiled(lambda d: d["machine"].pop("threads")), "machine.threads"),
    "no workload": (spoiled(lambda d: d["results"][0].pop("workload")), "workload: must be an object"),
    "no such size": (spoiled(lambda d: d["results"][0]["workload"].update(sizes={"x": 1})), "workload.sizes"),
    "a size of words": (spoiled(lambda d: d["results"][0]["workload"]["sizes"].update(n_embd="a")), "workload.sizes"),
    "another model": (spoiled(lambda d: d["model"].update(family="bert")), "model.family"),
    "twice": (spoiled(lambda d: d["results"].append(d["results"][0])), "barelm fp32, T 1 is there twice"),
}


@pytest.mark.parametrize("data, says", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_that_holds_something_else_is_refused(tmp_path, data, says):
    file = written(tmp_path, data)
    with pytest.raises(ValueError, match=says) as error:
        picture([file])
    assert str(file) in str(error.value) and len(str(error.value)) < 400


def test_parameters_are_counted_however_many_layers_there_are():
    sizes = dict(n_layer=5, n_head=1, n_embd=16, vocab_size=37, context=64)
    n = Model(Config(**sizes)).n_params
    workload = dict(name="small", sizes=sizes, B=3, T=7)
    assert measured.title_of(workload) == f"small, {count(n)} parameters, B = 3, T = 7"
    deep = dict(n_layer=2**31 - 1, n_head=1, n_embd=1, vocab_size=1, context=1)
    assert "deep, 53.7 G parameters" in measured.title_of(workload | dict(name="deep", sizes=deep))


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    one = written(tmp_path, growth(), "one.json")
    other = growth()
    other["machine"]["cpu"] = "Another"
    with pytest.raises(ValueError, match=r"other.json: machine.cpu is Another"):
        measured.gather([one, written(tmp_path, other, "other.json")])
    with pytest.raises(ValueError, match="not of the same benchmark"):
        measured.gather([one, STEPS[0]])


def test_the_drawing_command_says_what_is_wrong(tmp_path):
    run = command("draw.py", str(BENCHMARKS / "amd-epyc-zen4-2cores-ops.json"), "--out", str(tmp_path / "a.svg"))
    assert run.returncode == 2 and "can be drawn" in run.stderr and "Traceback" not in run.stderr
    run = command("draw.py", str(tmp_path / "none.json"), "--out", str(tmp_path / "a.svg"))
    assert run.returncode == 2 and "No such file" in run.stderr and not (tmp_path / "a.svg").exists()
