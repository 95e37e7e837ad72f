"""`barelm data`: what it shows, what it writes, and that nothing half-written stays."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from barelm.__main__ import main
from barelm.data.shards import Dataset


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"caf\xe9 " * 10)
    (folder / "b.jsonl").write_bytes(b'{"text": "hello"}\n{"body": "no"}\n{"text": ""}\n' + b"x\n" * 9)
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"long " * 100))
    return folder


def test_looking_writes_nothing(texts, tmp_path, capsys):
    assert main(["data", "--data", str(texts)]) == 0
    shown = {line[:9].strip(): line[10:] for line in capsys.readouterr().out.splitlines()}
    assert shown["data"] == f"{texts}: 3 documents, 555 B"
    assert shown["tokens"] == "558, 0.99 bytes each"
    assert shown["longest"] == "c.txt.gz, 500 B" and shown["empty"] == "1"
    assert shown["refused"].startswith("10: b.jsonl:2 (no field 'text'), b.jsonl:4 (not JSON (Expecting value")
    assert shown["refused"].endswith(", and 5 more") and shown["not UTF-8"] == "1: a.txt"
    assert len(shown["sha256"]) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_what_is_written_and_said_as_json(texts, tmp_path, capsys):
    out = str(tmp_path / "out")
    options = ["--data", f"{texts}/*", "--out", out, "--shard-tokens", "100", "--val-fraction", "0.5", "--seed", "3"]
    assert main(["data", *options, "--json"]) == 0
    said, data = json.loads(capsys.readouterr().out), Dataset.open(out)
    assert (said["documents"], said["bytes"], said["tokens"], said["refused"]) == (3, 555, 558, 10)
    assert said["corpus"] == data.identity["corpus"] and said["tokenizer"] == data.identity["tokenizer"]
    assert said["train_tokens"] == len(data.train) and said["validation_tokens"] == len(data.validation)
    assert said["train_tokens"] + said["validation_tokens"] == 558 and data.summary.items() <= said.items()
    assert len(list((tmp_path / "out").glob("*.bin"))) >= 6
    assert main(["data", *options]) == 0
    assert f"next      barelm train --data {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--field", ""], "field and split_at: must be strings"),
        (["--tokenizer", "nowhere"], "nowhere: no such file"),
        (["--field", "body", "--split-at", "x", "--data", "TEXTS/b.jsonl,TEXTS/nowhere"], "nowhere: no such file"),
        (["--field", "other", "--data", "TEXTS/b.jsonl"], "no text here (0 empty, 12 refused; b.jsonl:1: no field"),
        (["--out", "TEXTS"], "exists and is no dataset"),
        (["--out", "TEXTS/new", "--val-fraction", "2"], "val_fraction: is 2.0, must be above 0 and below 1"),
    ],
)
def test_mistakes_are_one_line(texts, capsys, options, says):
    assert main(["data", *(option.replace("TEXTS", str(texts)) for option in options)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("barelm: ") and says in said and said.count("\n") == 1


def test_names_that_are_no_text_are_shown(tmp_path, capsys):
    name = os.path.join(os.fsencode(tmp_path), b"\xff\x1b[31m\n.txt")
    with open(name, "wb") as file:
        file.write(b"a\xff")
    assert main(["data", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "\ufffd\ufffd[31m\ufffd.txt" in capsys.readouterr().out
    assert Dataset.open(tmp_path / "out").summary["not_utf8_first"] == [os.fsdecode(os.path.basename(name))]


def start(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "barelm", "data", *arguments], stdin=subprocess.PIPE, **options)


def test_standard_input(tmp_path):
    with start("--data", "-", "--split-at", "|", "--json", stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(b"one|two||three")
    said = json.loads(out)
    assert process.returncode == 0
    assert (said["documents"], said["empty"], said["bytes"], said["longest"]) == (3, 1, 11, ["-:4", 5])


def test_an_interrupt_leaves_nothing(tmp_path):
    """Ctrl-C while it waits for text, with a part of a shard written."""
    environment = os.environ | {"BARELM_THREADS": "1"}  # few threads read little ahead
    with start("--data", "-", "--out", tmp_path / "out", stderr=subprocess.PIPE, env=environment) as process:
        process.stdin.write(b"text\n" * 4_000_000)
        process.stdin.flush()
        until = time.monotonic() + 60
        while not list(tmp_path.glob(".out.*/train_*")) and time.monotonic() < until:
            time.sleep(0.02)
        began = list(tmp_path.glob(".out.*/train_*"))
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert began and process.returncode == 130 and said == b"barelm: interrupted\n"
    assert list(tmp_path.iterdir()) == []
