"""Datasets: shards hold what memory would, texts alone decide the split, and every altered byte is noticed."""

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from barelm import Tokenizer
from barelm.data import documents as documents_module
from barelm.data import shards, tokens
from barelm.data.documents import Document, Documents
from barelm.data.shards import Dataset, is_dataset, split, write_dataset
from barelm.data.tokens import Piece, Tokens, document_starts, encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BYTES = Tokenizer.bytes()
WIDE = Tokenizer({bytes([b]): b for b in range(256)}, [], {"<|endoftext|>": 70_000})  # ids that need 32 bits
fuzz = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def in_memory(*texts):
    return Tokens.encode([(str(i), text) for i, text in enumerate(texts)], BYTES)


def corpus(folder, *texts):
    """Documents of a new folder with one file for each text."""
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}").write_bytes(text)
    return Documents(folder)


def all_of(data):
    return data.read(0, len(data)).tolist()


def texts_of(data, tok):
    """The documents of a row of tokens, each as bytes."""
    found = []
    for id in all_of(data):
        if id == tok.eot:
            found.append(b"")
        else:
            found[-1] += tok.token_bytes(id)
    return found


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture
def dataset(tmp_path):
    """A dataset of several shards; returns its folder."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, n, np.uint8).tobytes().replace(b"\0", b"\n") for n in rng.integers(1, 400, 40)]
    write_dataset(corpus(tmp_path / "texts", *texts), BYTES, tmp_path / "data", shard_tokens=1500)
    return tmp_path / "data"


# ---- tokens


def test_each_document_begins_with_the_end_of_text_token_and_a_part_does_not():
    assert all_of(in_memory("ab", "", "c")) == [256, 97, 98, 256, 256, 99]
    assert all_of(Tokens.encode([Document("a", b"\xff"), Document("a", b"b", begins=False)], BYTES)) == [256, 255, 98]
    assert in_memory("ab").read(0, 3).dtype == np.int32 and len(Tokens.encode([], BYTES)) == 0


def test_many_threads_keep_the_order(monkeypatch):
    monkeypatch.setattr(tokens, "GROUP", 10)
    monkeypatch.setattr(tokens._core, "threads_get", lambda: 5)
    texts = [str(i) * (i % 7) for i in range(500)]
    runs = list(encode((Piece(text, held_out=i % 3 == 0) for i, text in enumerate(texts)), BYTES))
    for side in (False, True):
        found = [id for held_out, ids in runs if held_out == side for id in ids.tolist()]
        assert found == [id for i, t in enumerate(texts) if (i % 3 == 0) == side for id in [256, *t.encode()]]


def test_targets_are_the_tokens_one_later():
    data = in_memory("the quick brown fox" * 10)
    for order in ("random", "sequential"):
        rows, targets = data.batch(step=0, micro=0, B=5, T=7, order=order)
        assert rows.dtype == targets.dtype == np.int32 and rows.shape == targets.shape == (5, 7)
        assert rows.flags.c_contiguous and targets.flags.c_contiguous
        np.testing.assert_array_equal(rows[:, 1:], targets[:, :-1])
        text = "".join(map(chr, all_of(data)))
        for row, last in zip(rows, targets[:, -1], strict=True):
            assert "".join(map(chr, [*row, last])) in text


@pytest.mark.parametrize(
    ("step", "micro", "seed", "starts"),
    [
        (0, 0, 0, [11, 239, 110, 558]),
        (3, 1, 7, [83, 384, 617, 163]),
        (2**40, 7, 2**63 + 5, [669, 528, 718, 829]),
    ],
)
def test_random_places_are_what_they_always_were(step, micro, seed, starts):
    """A run that was begun with an older version goes on with the batches that it would have had."""
    data = Tokens([tokens._Memory(np.arange(1000, dtype=np.int32))], np.ones(1000, np.int64))
    assert data.batch(step, micro, 4, 10, seed)[0][:, 0].tolist() == starts


def test_every_window_is_drawn_the_first_and_the_last_too():
    data = in_memory("abcdefg")  # 8 tokens, windows of 3: 5 places
    starts = {int(row[0]) for step in range(40) for row in data.batch(step, 0, 4, 3)[0]}
    assert starts == {256, 97, 98, 99, 100}


@pytest.mark.parametrize(("B", "T", "per_step"), [(1, 1, 1), (2, 5, 3), (3, 7, 2), (4, 20, 1)])
def test_in_sequence_every_token_is_a_target_equally_often(B, T, per_step):
    data = in_memory("abcdefghijklmnopqrst")  # 21 tokens
    ring = all_of(data)
    batches = [
        data.batch(step, micro, B, T, 5, "sequential", per_step) for step in range(42) for micro in range(per_step)
    ]
    inputs, targets = (np.concatenate([pair[i].ravel() for pair in batches]).tolist() for i in (0, 1))
    assert inputs == [ring[i % 21] for i in range(len(inputs))]
    assert targets == [ring[(i + 1) % 21] for i in range(len(targets))]


def test_what_a_batch_refuses():
    data = in_memory("abc")
    with pytest.raises(ValueError, match="context: a window of 8 needs 9 tokens, the data has only 4"):
        data.batch(0, 0, 1, 8)
    with pytest.raises(ValueError, match="order: is 'shuffled', must be 'random' or 'sequential'"):
        data.batch(0, 0, 1, 2, order="shuffled")
    with pytest.raises(ValueError, match="micro: is 2, a step has 2 micro-batches"):
        data.batch(0, 2, 1, 2, order="sequential", per_step=2)
    assert data.batch(0, 0, 1, 3)[1].tolist() == [[97, 98, 99]]


@pytest.mark.parametrize("B, T", [(1, 1), (2, 4), (3, 7), (8, 64)])
def test_validation_windows_hold_every_token_but_the_first_once(B, T):
    data = in_memory("héllo", "wörld, how are you")
    ids = data.read(0, len(data))
    seen, size = [], 0
    for rows, targets, n_bytes in data.windows(B, T):
        assert rows.shape == targets.shape and rows.shape[1] == T and rows.shape[0] <= B
        flat = targets[targets >= 0]
        start = 1 + len(seen)
        np.testing.assert_array_equal(rows[targets >= 0], ids[start - 1 : start - 1 + len(flat)])
        seen += flat.tolist()
        size += n_bytes
    assert seen == ids[1:].tolist()
    assert size == len("héllowörld, how are you".encode())
    assert len(list(data.windows(1, 1, batches=3))) == 3
    assert list(Tokens([], data.lengths).windows(B, T)) == []


@fuzz
@given(st.data(), st.integers(1, 40), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_borders_of_shards_cannot_be_seen(monkeypatch, draw, most, sizes):
    monkeypatch.setattr(tokens, "MAX_READ", most)
    ids = np.arange(sum(sizes), dtype=np.int32)
    parts = [tokens._Memory(part) for part in np.split(ids, np.cumsum(sizes)[:-1])]
    data = Tokens(parts, np.ones(len(ids), np.int64))
    start = draw.draw(st.integers(0, len(ids)))
    stop = draw.draw(st.integers(start, len(ids)))
    assert all_of(data) == ids.tolist()
    assert data.read(start, stop).tolist() == all_of(data.cut(start, stop)) == list(range(start, stop))


def test_documents_begin_with_a_token_of_their_own_where_there_is_one(tmp_path):
    tok = Tokenizer({bytes([b]): b for b in range(256)}, [], {"<|endoftext|>": 256, "<|begin|>": 257}, bos=257)
    assert all_of(Tokens.encode([("a", "ab"), ("b", "c")], tok)) == [257, 97, 98, 257, 99]
    own = write_dataset(corpus(tmp_path / "texts", b"ab", b"c", b"d"), tok, tmp_path / "own")
    assert sorted(all_of(own.train) + all_of(own.validation)) == [97, 98, 99, 100, 257, 257, 257]
    with pytest.raises(ValueError, match="was made with another vocabulary"):
        Dataset.open(tmp_path / "own", BYTES)
    (tmp_path / "a.bin").write_bytes(shard_bytes([257, 97, 256, 257, 98], 1))
    assert Dataset.open(tmp_path / "a.bin", tok).summary["documents"] == 2


def test_where_documents_begin(rng):
    rows = rng.integers(0, 4, (5, 50)).astype(np.int32)
    starts = document_starts(rows, bos=3)
    assert starts.dtype == np.int32 and starts.flags.c_contiguous
    for row, got in zip(rows, starts, strict=True):
        assert got.tolist() == [max([i for i in range(t + 1) if row[i] == 3], default=0) for t in range(50)]


# ---- the split


def sides(texts, seed=0, fraction=0.1):
    """(training, held out) texts of documents, or of (text, begins) pairs."""
    given = [Document("", *(text if isinstance(text, tuple) else (text,))) for text in texts]
    pieces = list(split(given, seed, fraction))
    assert all(piece.begins and piece.text for piece in pieces)
    return [[piece.text for piece in pieces if piece.held_out == side] for side in (False, True)]


def test_one_document_gives_its_end_cut_between_two_characters():
    assert sides([b"0123456789" * 10]) == [[b"0123456789" * 9], [b"0123456789"]]
    train, held_out = sides(["€".encode() * 33])  # 99 bytes: a tenth would begin inside a character
    assert b"".join(train + held_out).decode() == "€" * 33 and held_out[0].decode() == "€" * 3
    assert sides([b"a"]) == [[b"a"], []]


def test_of_two_documents_one_is_held_out_whatever_the_seed():
    for seed in range(300):
        for fraction in (0.001, 0.5, 0.999):
            assert [len(side) for side in sides([b"a", b"b"], seed, fraction)] == [1, 1]


def test_the_share_the_seed_and_nothing_else_decide():
    texts = [b"%d" % i for i in range(2000)]
    train, held_out = sides(texts)
    assert sorted(train + held_out) == sorted(texts)
    assert abs(len(held_out) - 200) < 4 * np.sqrt(2000 * 0.1 * 0.9)  # four standard deviations
    assert set(sides(texts[::-1])[1]) == set(held_out) == set(sides(texts * 2)[1])
    assert set(sides(texts, seed=1)[1]) != set(held_out)
    assert set(held_out) < set(sides(texts, fraction=0.2)[1])


def test_of_each_part_of_a_long_document_the_end_is_held_out():
    long = [(b"a" * 100, True), (b"b" * 100, False), (b"c" * 50, False)]
    train, held_out = sides([*long, *(b"%d" % i for i in range(50))])
    assert [x for x in train if len(x) > 9] == [b"a" * 90, b"b" * 90, b"c" * 45]
    assert {b"a" * 10, b"b" * 10, b"c" * 5} < set(held_out)
    assert sides(long)[1] == [b"a" * 10, b"b" * 10, b"c" * 5]


@fuzz
@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=5), st.booleans()), max_size=12),
    st.integers(0, 2**64 - 1),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_no_byte_is_lost_by_a_split(given, seed, fraction):
    given = [(text, begins or i == 0) for i, (text, begins) in enumerate(given)]
    train, held_out = sides(given, seed, fraction)
    assert sorted(b"".join(train + held_out)) == sorted(b"".join(text for text, _ in given))
    if sum(begins for _, begins in given) > 1 and len({text for text, _ in given}) > 1:
        assert (train and held_out) or any(not begins for _, begins in given)


# ---- writing


def shard_bytes(ids, version=1):
    """llm.c's form, from its definition."""
    magic, dtype = {1: (20240520, "<u2"), 7: (20240801, "<u4")}[version]
    header = magic.to_bytes(4, "little") + version.to_bytes(4, "little") + len(ids).to_bytes(4, "little")
    return header + bytes(253 * 4) + np.array(ids, dtype).tobytes()


@pytest.mark.parametrize(("tok", "version"), [(BYTES, 1), (WIDE, 7)])
def test_a_shard_is_in_llm_c_form(tmp_path, tok, version):
    write_dataset(corpus(tmp_path / "t", "hé".encode() * 5), tok, tmp_path / "d")
    ids = [tok.eot, *("hé".encode() * 5)]
    assert (tmp_path / "d" / "train_000000.bin").read_bytes() == shard_bytes(ids[:14], version)
    assert (tmp_path / "d" / "val_000000.bin").read_bytes() == shard_bytes([tok.eot, ids[-1]][:1] + ids[14:], version)
    names = ["dataset.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == names


@settings(fuzz, max_examples=40)  # every example is synced to the disk
@given(
    st.lists(st.binary(max_size=30), max_size=10),
    st.sampled_from([BYTES, WIDE]),
    st.integers(1, 50),
    st.integers(8, 40),
)
def test_any_documents_come_back_and_shards_are_as_memory(tmp_path_factory, monkeypatch, texts, tok, size, part):
    monkeypatch.setattr(documents_module, "PART", part)
    tmp_path = tmp_path_factory.mktemp("any")
    source = corpus(tmp_path / "t", *texts)
    kept = [text for text in texts if text and b"\0" not in text[:part]]
    if not list(source):
        with pytest.raises(ValueError, match="no text here"):
            write_dataset(source, tok, tmp_path / "d")
        return
    many = write_dataset(source, tok, tmp_path / "d", shard_tokens=size)
    one = write_dataset(source, tok, tmp_path / "e")
    assert many.identity == one.identity and many.summary == one.summary
    pieces = texts_of(many.train, tok) + texts_of(many.validation, tok)
    assert sorted(b"".join(pieces)) == sorted(b"".join(document.data for document in source))
    if len(kept) > 1 and all(len(text) <= part for text in kept):
        assert sorted(pieces) == sorted(kept)
    for a, b in ((many.train, one.train), (many.validation, one.validation)):
        assert all_of(a) == all_of(b)
        for (x, y, n), (u, v, m) in zip(a.windows(2, 5), b.windows(2, 5), strict=True):
            assert n == m and (x == u).all() and (y == v).all()
        for order in ("random", "sequential"):
            if len(a) > 3:
                np.testing.assert_array_equal(a.batch(3, 1, 4, 3, 7, order, 2), b.batch(3, 1, 4, 3, 7, order, 2))
    files = list((tmp_path / "d").glob("*.bin"))
    assert len(files) == sum(-(-len(side) // size) for side in (many.train, many.validation))


def test_what_a_dataset_knows_of_itself(tmp_path):
    texts = [b"%d" % i for i in range(100)]
    source = corpus(tmp_path / "t", *texts, b"x" * 1000, b"\0", b"", b"caf\xe9")
    made = write_dataset(source, BYTES, tmp_path / "d")
    opened = Dataset.open(tmp_path / "d")
    for data in (made, opened):
        assert data.summary == {
            "source": str(tmp_path / "t"),
            "documents": 102,
            "bytes": 190 + 1000 + 4,
            "tokens": len(data.train) + len(data.validation),
            "longest": ["100", 1000],
            "empty": 1,
            "refused": 1,
            "refused_first": [["101", "has a zero byte: not text"]],
            "not_utf8": 1,
            "not_utf8_first": ["103"],
        }
        assert data.summary["tokens"] == data.summary["bytes"] + data.summary["documents"]
        assert data.identity["corpus"] == source.counts.hash and data.identity["tokenizer"] == BYTES.hash()
        assert data.tok.hash() == BYTES.hash() and (data.train.lengths == BYTES.token_lengths()).all()
    moved = write_dataset(corpus(tmp_path / "elsewhere", *texts, b"x" * 1000, b"caf\xe9"), BYTES, tmp_path / "e")
    assert moved.identity == made.identity and all_of(moved.train) == all_of(made.train)
    other = write_dataset(source, BYTES, tmp_path / "e", seed=1)
    assert other.identity != made.identity and other.identity["corpus"] == made.identity["corpus"]


def test_bytes_of_text_of_each_shard(dataset):
    for entry in json.loads((dataset / "dataset.json").read_text())["shards"]:
        ids = np.frombuffer((dataset / entry["name"]).read_bytes()[1024:], "<u2")
        assert (entry["tokens"], entry["text_bytes"]) == (len(ids), np.count_nonzero(ids != 256))


def test_gpt2_tokens_decode_to_the_texts(tmp_path, test_data):
    tok = Tokenizer.gpt2(test_data / "tok" / "gpt2_vocab.bpe", test_data / "tok" / "gpt2_encoder.json")
    source = Documents(test_data / "text" / "c4_demo.jsonl")
    data = write_dataset(source, tok, tmp_path / "d", shard_tokens=50_000)
    assert sorted(texts_of(data.train, tok) + texts_of(data.validation, tok)) == sorted(d.data for d in source)
    assert data.summary["tokens"] < data.summary["bytes"] / 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(val_fraction=0), "val_fraction: is 0, must be above 0 and below 1"),
        (dict(val_fraction=1.0), "val_fraction: is 1.0, must be"),
        (dict(val_fraction=float("nan")), "val_fraction: is nan, must be"),
        (dict(seed=-1), "seed: is -1, must be 0 or more and below 2^64"),
        (dict(seed=2**64), "seed: is "),
        (dict(shard_tokens=0), "shard_tokens: is 0, must be 1 or more and below 2^31"),
        (dict(shard_tokens=2**31), "shard_tokens: is "),
    ],
)
def test_arguments_out_of_range(tmp_path, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        write_dataset(corpus(tmp_path / "t", b"a"), BYTES, tmp_path / "d", **options)
    assert not (tmp_path / "d").exists()


def test_what_holds_no_text_is_an_error_that_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"t: no text here \(1 empty, 1 refused; 001: has a zero byte: not text\)"):
        write_dataset(corpus(tmp_path / "t", b"", b"\0"), BYTES, tmp_path / "d")
    assert not (tmp_path / "d").exists() and leftovers(tmp_path) == []


def test_an_older_dataset_is_replaced_and_anything_else_is_not(tmp_path):
    first, second = corpus(tmp_path / "t", b"first"), corpus(tmp_path / "u", b"second text")
    write_dataset(first, BYTES, tmp_path / "d", shard_tokens=2)
    write_dataset(second, BYTES, tmp_path / "d")
    assert len(list((tmp_path / "d").glob("*.bin"))) == 2
    for taken in (tmp_path / "t", tmp_path / "t" / "000"):
        with pytest.raises(FileExistsError, match="exists and is no dataset"):
            write_dataset(second, BYTES, taken)
    assert (tmp_path / "t" / "000").read_bytes() == b"first"


class Full(io.FileIO):
    """A file on a disk that is soon full."""

    room = 3000

    def write(self, data):
        Full.room -= len(memoryview(data).cast("B"))
        if Full.room < 0:
            raise OSError(28, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("error", ["disk full", "interrupt", "sync"])
def test_a_failing_write_leaves_the_older_dataset(dataset, monkeypatch, error):
    before, source = Dataset.open(dataset), Documents(dataset.parent / "texts")

    def interrupt(*_):
        raise KeyboardInterrupt

    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        if error == "disk full":
            m.setattr(Full, "room", 3000)
            m.setattr(shards, "open", Full, raising=False)
        if error == "sync":
            m.setattr(os, "fsync", fail)
        with pytest.raises((OSError, KeyboardInterrupt)) as caught:
            write_dataset(source, BYTES, dataset, seed=5, progress=interrupt if error == "interrupt" else None)
    if error != "interrupt":
        assert caught.value.filename == str(dataset) and caught.value.strerror == "No space left on device"
    assert leftovers(dataset.parent) == []
    assert Dataset.open(dataset).identity == before.identity


LIMITED = """
import resource, signal, sys
from barelm import Tokenizer
from barelm.data.documents import Documents
from barelm.data.shards import write_dataset
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    write_dataset(Documents(sys.argv[1]), Tokenizer.bytes(), sys.argv[2])
except OSError as error:
    print(error.filename)
"""


def test_a_system_that_refuses_to_write(dataset):
    out = dataset.parent / "out"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, dataset.parent / "texts", out], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(out) and not out.exists() and leftovers(dataset.parent) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    source = corpus(tmp_path / "t", b"text")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="locked"):
        write_dataset(source, BYTES, tmp_path / "locked" / "d")


STREAM = """
import sys
from barelm import Tokenizer
from barelm.data.documents import Documents
from barelm.data.shards import write_dataset
data = write_dataset(Documents(sys.argv[1]), Tokenizer.bytes(), sys.argv[2])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(data.train) + len(data.validation), int(peak) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells the peak of one process")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    block = b"".join(b"%d a line of text\n" % i for i in range(1 << 16))
    with open(tmp_path / "large.txt", "wb") as file:
        for _ in range(150_000_000 // len(block)):
            file.write(block)
    size = (tmp_path / "large.txt").stat().st_size
    env = os.environ | {"BARELM_THREADS": "2"}
    arguments = [sys.executable, "-c", STREAM, tmp_path / "large.txt", tmp_path / "d"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=env)
    n_tokens, peak = map(int, done.stdout.split())
    assert n_tokens > size and peak < 300  # MiB; the tokens alone have 300


# ---- reading


def refused(path, *says, error=ValueError, tok=None):
    with pytest.raises(error) as caught:
        Dataset.open(path, tok)
    for word in says:
        assert word in str(caught.value), str(caught.value)


@contextlib.contextmanager
def content(path, data):
    old = path.read_bytes()
    path.write_bytes(data)
    yield
    path.write_bytes(old)


@fuzz
@given(st.data(), st.integers(1, 255))
def test_any_altered_byte_is_noticed(dataset, draw, flip):
    path = draw.draw(st.sampled_from(sorted(dataset.iterdir())))
    data = bytearray(path.read_bytes())
    data[draw.draw(st.integers(0, min(len(data) - 1, draw.draw(st.sampled_from([12, 1024, len(data)])))))] ^= flip
    with content(path, bytes(data)):
        refused(dataset, str(path))
    Dataset.open(dataset)


def test_a_torn_a_longer_and_a_missing_file(dataset):
    for path in sorted(dataset.iterdir()):
        data = path.read_bytes()
        for torn in (b"", data[:3], data[: len(data) // 2], data[:-1], data + b"\0"):
            with content(path, torn):
                refused(dataset, str(path))
        path.unlink()
        if path.name != "dataset.json":
            refused(dataset, f"{path}: is missing", error=FileNotFoundError)
        path.write_bytes(data)


def test_a_shard_that_vouches_for_itself_is_still_compared(dataset):
    """The header, the size and the sidecar must agree, whatever one of them says alone."""
    path = dataset / "train_000001.bin"
    ids = np.frombuffer(path.read_bytes()[1024:], "<u2").tolist()
    with content(path, shard_bytes(ids[:-1])):
        refused(dataset, f"{path}: was altered")
    with content(path, (dataset / "train_000000.bin").read_bytes()):
        refused(dataset, f"{path}: was altered")


ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    2**64,
    "",
    "x",
    [],
    [1],
    [[]],
    {},
    [{}],
    {"a": 1},
    [{"name": [], "tokens": 1, "bytes": 1, "sha256": 1}],
]


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("name", ["format", "shards", "summary", "corpus", "seed"])
def test_a_hostile_sidecar_that_says_of_itself_that_it_is_whole(dataset, name, value):
    path = dataset / "dataset.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    with content(path, shards._seal(values | {name: value})):
        try:
            Dataset.open(dataset)
        except ValueError as error:
            assert str(dataset) in str(error)
    del values[name]
    with content(path, shards._seal(values)):
        refused(dataset, "dataset.json: is not the description of a dataset")


@pytest.mark.parametrize("data", [b"[]", b"{}", b"x", b"[" * 100_000, b"\xff", b'{"sha256": 1}'])
def test_a_sidecar_that_is_none(dataset, data):
    with content(dataset / "dataset.json", data):
        refused(dataset, "dataset.json: ")


def test_a_name_that_leads_out_of_the_folder(dataset):
    values = json.loads((dataset / "dataset.json").read_text())
    del values["sha256"]
    values["shards"][0]["name"] = "../data/train_000000.bin"
    with content(dataset / "dataset.json", shards._seal(values)):
        refused(dataset, "is not the name of a shard")


def test_a_newer_form_and_another_vocabulary(dataset):
    values = json.loads((dataset / "dataset.json").read_text())
    del values["sha256"]
    with content(dataset / "dataset.json", shards._seal(values | {"format": 2})):
        refused(dataset, "format 2 is not one that this version reads")
    refused(dataset, "tokenizer: ", "was made with another vocabulary", tok=WIDE)
    assert Dataset.open(dataset, BYTES).tok.hash() == BYTES.hash()


def cut_off(path):
    os.truncate(path, 2000)


def grow(path):
    with open(path, "ab") as file:
        file.write(b"12")


def replace(path):
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").rename(path)


def write_in_place(path):
    data = path.read_bytes()
    path.write_bytes(data[:2000] + b"1" + data[2001:])
    os.utime(path, ns=(0, 10**18))


def remove(path):
    path.unlink()


@pytest.mark.parametrize("change", [cut_off, grow, replace, write_in_place, remove], ids=lambda f: f.__name__)
def test_a_shard_that_changes_while_it_is_in_use(dataset, change):
    data, path = Dataset.open(dataset), dataset / "train_000002.bin"
    before = data.train.batch(0, 0, 8, 100)
    np.testing.assert_array_equal(before, data.train.batch(0, 0, 8, 100))
    change(path)
    for read in (
        lambda: [data.train.batch(step, 0, 8, 100) for step in range(20)],
        lambda: [data.train.batch(step, 0, 8, 100, order="sequential") for step in range(20)],
        lambda: list(data.train.windows(8, 100)),
    ):
        with pytest.raises(OSError, match=r"train_000002\.bin"):
            read()


# ---- shards made by others


def foreign(folder, files, version=1):
    folder.mkdir(exist_ok=True)
    for name, ids in files.items():
        (folder / name).write_bytes(shard_bytes(ids, version))
    return folder


@pytest.mark.parametrize("version", [1, 7])
def test_shards_of_llm_c(tmp_path, version):
    files = {"tiny_train_0.bin": [256, 1, 2], "tiny_train_1.bin": [3, 256], "tiny_val_0.bin": [256, 4]}
    data = Dataset.open(foreign(tmp_path / "d", files, version), BYTES)
    assert all_of(data.train) == [256, 1, 2, 3, 256] and all_of(data.validation) == [256, 4]
    assert data.tok is BYTES
    known = {name: data.summary[name] for name in ("source", "documents", "bytes", "tokens", "refused")}
    assert known == {"source": str(tmp_path / "d"), "documents": 3, "bytes": 4, "tokens": 7, "refused": 0}
    moved = Dataset.open(foreign(tmp_path / "moved", files, 8 - version), BYTES)
    assert moved.identity == data.identity
    files["tiny_train_1.bin"] = [4, 256]
    assert Dataset.open(foreign(tmp_path / "other", files), BYTES).identity != data.identity


def test_without_a_held_out_shard_the_last_tenth_is(tmp_path):
    foreign(tmp_path, {"a.bin": list(range(15)), "b.bin": list(range(15, 20)), "c.txt": []})
    for path in (tmp_path, f"{tmp_path}/*.bin", f"{tmp_path}/[ab].bin"):
        data = Dataset.open(path, BYTES)
        assert all_of(data.train) == list(range(18)) and all_of(data.validation) == [18, 19]
    assert all_of(Dataset.open(tmp_path / "a.bin", BYTES).validation) == [13, 14]


def test_what_is_wrong_with_a_shard(tmp_path):
    path, good = tmp_path / "a.bin", shard_bytes([256, 1, 2])
    word = {name: i * 4 for i, name in enumerate(("magic", "version", "count"))}

    def with_word(name, value):
        return good[: word[name]] + value.to_bytes(4, "little", signed=True) + good[word[name] + 4 :]

    for data, says in (
        (b"", "is cut off, 0 bytes are less than a header"),
        (good[:1023], "is cut off, 1023 bytes are less than a header"),
        (with_word("magic", 20240521), "is no token shard (magic 20240521, version 1; must be 20240520 with version 1"),
        (with_word("version", 7), "is no token shard (magic 20240520, version 7"),
        (with_word("count", 4), "is cut off: 1030 bytes, but the header says 4 tokens"),
        (with_word("count", 2), "something behind its end: 1030 bytes, but the header says 2 tokens"),
        (with_word("count", -1), "the header says -1 tokens"),
        (good[:-1], "is cut off"),
        (good + b"\0", "something behind its end"),
        (shard_bytes([256, 257, 1]), "token 1 is 257, the vocabulary has ids below 257"),
        (shard_bytes([2**32 - 1], 7), f"token 0 is {2**32 - 1}, the vocabulary"),
        (shard_bytes([2**31], 7), f"token 0 is {2**31}, the vocabulary"),
    ):
        path.write_bytes(data)
        refused(tmp_path, f"{path}: ", says, tok=BYTES)


@fuzz
@given(st.binary(max_size=1100), st.booleans())
def test_a_hostile_shard(tmp_path, data, with_header):
    (tmp_path / "a.bin").write_bytes(shard_bytes([])[:8] + data if with_header else data)
    with contextlib.suppress(ValueError):
        assert max(all_of(Dataset.open(tmp_path, BYTES).train), default=0) < BYTES.n_vocab


def test_an_id_far_inside_a_shard_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 10)
    ids = [1] * 35
    ids[27] = 300
    refused(foreign(tmp_path / "d", {"a.bin": ids}), "token 27 is 300", tok=BYTES)


def test_what_is_no_dataset(tmp_path):
    foreign(tmp_path / "d", {"a.bin": [1]})
    refused(tmp_path / "d", "tokenizer: must be given", "a.bin")
    refused(tmp_path, "neither a dataset (dataset.json) nor shards", error=FileNotFoundError, tok=BYTES)
    refused(tmp_path / "nowhere", "nowhere: neither", error=FileNotFoundError, tok=BYTES)


def test_which_paths_are_datasets(dataset):
    texts = dataset.parent / "texts"
    (texts / "image.bin").write_bytes(b"\0" * 2000)
    for path in (dataset, f"{dataset}/*.bin", dataset / "val_000000.bin"):
        assert is_dataset(path)
    for path in ("", "-", texts, texts / "000", texts / "image.bin", dataset.parent / "nowhere", f"{texts}/*"):
        assert not is_dataset(path)
    (dataset / "dataset.json").unlink()
    assert is_dataset(dataset)


def test_empty_shards_are_passed_over(tmp_path):
    data = Dataset.open(foreign(tmp_path / "d", {"a.bin": [], "b.bin": [1, 2], "c.bin": [], "c_val.bin": [3]}), BYTES)
    assert all_of(data.train) == [1, 2] and all_of(data.validation) == [3]
    assert data.identity["corpus"] != hashlib.sha256().hexdigest()
