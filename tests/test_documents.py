"""Documents: exactly the bytes of the files, in an order that names alone decide, and nothing lost without a word."""

import gzip
import io
import json
import os
import sys
from types import SimpleNamespace

import pytest
from barelm.data import documents
from barelm.data.documents import Document, Documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError:
    zstd = None

needs_zstd = pytest.mark.skipif(zstd is None, reason="needs barelm[data]")
fuzz = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(source, **options):
    """(documents, counts) of one pass."""
    found = Documents(source, **options)
    return list(found), found.counts


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def names(found):
    return [document.name for document in found]


# ---- which files


@pytest.mark.parametrize("data", [b"h\xc3\xa9\r\n", b"\xef\xbb\xbfBOM\r", b"caf\xe9\n", b"\xff\xfe", b" ", b"\n\n"])
def test_a_file_is_one_document_with_exactly_its_bytes(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    found, counts = read(tmp_path / "a.txt")
    assert found == [Document("a.txt", data, True)]
    assert (counts.documents, counts.bytes, counts.longest) == (1, len(data), ("a.txt", len(data)))


def test_a_folder_is_read_recursively_sorted_and_without_what_is_no_text(tmp_path):
    files = {"z.txt": b"z", "b/a.md": b"aa", ".hidden/x": b"x", ".dot": b"d", "image": b"P\0\1", "empty": b""}
    write(tmp_path, files | {"latin1.txt": b"caf\xe9"})
    os.mkfifo(tmp_path / "pipe")
    found, counts = read(tmp_path)
    assert [(d.name, d.data) for d in found] == [("b/a.md", b"aa"), ("latin1.txt", b"caf\xe9"), ("z.txt", b"z")]
    assert (counts.documents, counts.bytes, counts.empty) == (3, 7, 1)
    assert (counts.refused, counts.refused_first) == (1, [("image", "has a zero byte: not text")])
    assert (counts.not_utf8, counts.not_utf8_first) == (1, ["latin1.txt"])
    assert counts.longest == ("latin1.txt", 4)


def test_the_standard_library_is_the_default():
    found, counts = read(None)
    assert {"argparse.py", "json/decoder.py"} <= set(names(found)) and names(found) == sorted(names(found))
    assert not [name for name in names(found) if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert counts.bytes > 2e6 and counts.refused == 0
    assert counts.hash == read("")[1].hash


def test_a_pattern(tmp_path):
    write(tmp_path, {"b/1.txt": b"1", "a/c/2.txt": b"2", "a/3.md": b"3", "4.txt": b"4", "b/.5.txt": b"5"})
    assert names(read(f"{tmp_path}/**/*.txt")[0]) == ["4.txt", "a/c/2.txt", "b/1.txt"]
    assert names(read(f"{tmp_path}/?/*")[0]) == ["a/3.md", "b/1.txt"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        Documents(f"{tmp_path}/*.rst")


def test_a_pattern_below_the_current_folder(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": b"1", "d/b.txt": b"2"})
    monkeypatch.chdir(tmp_path)
    assert names(read("*.txt")[0]) == ["a.txt"] and names(read("**/*.txt")[0]) == ["a.txt", "d/b.txt"]


def test_several_sources_in_the_order_given_and_a_name_with_a_comma(tmp_path):
    write(tmp_path, {"b.txt": b"b", "a/x.txt": b"x", "a/y.txt": b"y", "p,q.txt": b"pq"})
    several = [f"{tmp_path}/b.txt", f"{tmp_path}/a"]
    assert names(read(",".join(several))[0]) == names(read(several)[0]) == ["b.txt", "x.txt", "y.txt"]
    assert names(read(f"{tmp_path}/p,q.txt")[0]) == ["p,q.txt"]
    for empty in (f"{tmp_path}/b.txt,", [], [""]):
        with pytest.raises(ValueError, match="data: a name is empty"):
            Documents(empty)


def test_what_is_not_there_or_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        Documents(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: neither a file nor a folder"):
        Documents(tmp_path / "pipe")
    (tmp_path / "a.txt").write_bytes(b"a")
    found = Documents(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.txt"):
        list(found)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
@pytest.mark.parametrize("name", ["a", "d/a"])
def test_what_may_not_be_read_is_an_error(tmp_path, name):
    write(tmp_path, {name: b"a"})
    (tmp_path / name.split("/")[0]).chmod(0)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        list(Documents(tmp_path))
    (tmp_path / name.split("/")[0]).chmod(0o700)


def test_standard_input_is_read_once(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a|b|")))
    found = Documents("-", split_at="|")
    assert found.size is None
    assert list(found) == [Document("-:1", b"a"), Document("-:2", b"b")]
    with pytest.raises(ValueError, match="standard input can be read only once"):
        list(found)


def test_a_new_pass_has_new_counts(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    found = Documents(tmp_path)
    assert list(found) == list(found)
    assert (found.counts.documents, found.counts.bytes) == (1, 3)


def test_the_hash_sees_texts_and_where_one_ends_but_no_names(tmp_path):
    def hash_of(*texts, prefix=""):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        write(folder, {f"{prefix}{i}": text for i, text in enumerate(texts)})
        return read(folder)[1].hash

    assert (
        len({hash_of(b"a", b"bc"), hash_of(b"ab", b"c"), hash_of(b"abc"), hash_of(b"c", b"ab"), hash_of(b"abd")}) == 5
    )
    assert hash_of(b"a", b"bc") == hash_of(b"a", b"bc", prefix="other")


def test_how_far_a_pass_is(tmp_path):
    write(tmp_path, {"a.txt": b"a" * 3_000_000, "b.txt.gz": gzip.compress(os.urandom(5000))})
    found = Documents(tmp_path)
    assert found.size == sum(path.stat().st_size for path in tmp_path.iterdir()) and found.done == 0
    seen = [found.done for _ in found]
    assert seen[0] > 0 and seen == sorted(seen) and found.done == found.size


# ---- text


def test_a_text_file_of_several_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"<|end|>one\n<|end|><|end|>t\xc3\xa9o<|end")
    found, counts = read(tmp_path / "a.txt", split_at="<|end|>")
    assert [(d.name, d.data) for d in found] == [("a.txt:2", b"one\n"), ("a.txt:4", b"t\xc3\xa9o<|end")]
    assert counts.empty == 2


@fuzz
@given(
    st.lists(st.sampled_from([b"\n", b"a", b"bcd", "é€😀".encode(), b"\xe2\x82", b"|", b"||", b"\r\n"]), max_size=80),
    st.sampled_from(["", "|", "||", "\n\n", "a\n"]),
    st.integers(8, 40),
)
def test_any_text_comes_whole_and_in_parts_that_depend_on_it_alone(tmp_path, monkeypatch, chunks, split_at, part):
    data, path = b"".join(chunks), tmp_path / "a.txt"
    path.write_bytes(data)
    pieces = data.split(split_at.encode()) if split_at else [data]
    monkeypatch.setattr(documents, "PART", part)
    found, counts = read(path, split_at=split_at)
    joined = []
    for document in found:
        assert len(document.data) <= part
        joined += [b""] * document.begins
        joined[-1] += document.data
    assert joined == [piece for piece in pieces if piece]
    assert counts.documents == len(joined) and counts.bytes == sum(map(len, joined))
    assert counts.longest[1] == max(map(len, joined), default=0)
    assert counts.not_utf8 == sum(not documents._is_utf8(piece) for piece in joined)
    alone = [part for piece in joined for part in documents._cut(piece)]
    assert [(document.data, document.begins) for document in found] == alone


def test_parts_end_where_lines_do_or_else_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART", 10)
    (tmp_path / "lines").write_bytes(b"abcdefg\nabcdefg\nabc")
    assert [d.data for d in read(tmp_path / "lines")[0]] == [b"abcdefg\n", b"abcdefg\n", b"abc"]
    (tmp_path / "one line").write_text("€" * 7, encoding="utf-8")
    assert [d.data.decode() for d in read(tmp_path / "one line")[0]] == ["€€€", "€€€", "€"]
    (tmp_path / "no characters").write_bytes(b"\x80" * 25)
    assert [len(d.data) for d in read(tmp_path / "no characters")[0]] == [10, 10, 5]


def test_a_zero_byte_far_inside_costs_only_its_part(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART", 8)
    (tmp_path / "a").write_bytes(b"1234567\n12\x004567\n1234567\n1234567\n")
    found, counts = read(tmp_path)
    assert [d.begins for d in found] == [True, True, False] and b"".join(d.data for d in found) == b"1234567\n" * 3
    assert counts.refused_first == [("a", "a part of it has a zero byte: not text")]
    (tmp_path / "a").write_bytes(b"good|b\0d|good")
    found, counts = read(tmp_path, split_at="|")
    assert names(found) == ["a:1", "a:3"] and counts.refused_first[0][0] == "a:2"


# ---- JSONL


def lines(*values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def test_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "é\0\r\n", "id": 1}, {"text": ""}, {"id": 2, "text": "b"})[:-1])
    (tmp_path / "b.NDJSON").write_bytes(b"\xef\xbb\xbf" + lines({"text": "c"}).replace(b"\n", b"\r\n") + b"\n \r\n")
    found, counts = read(tmp_path)
    assert [(d.name, d.data) for d in found] == [
        ("a.jsonl:1", "é\0\r\n".encode()),
        ("a.jsonl:3", b"b"),
        ("b.NDJSON:1", b"c"),
    ]
    assert (counts.empty, counts.refused, counts.not_utf8) == (3, 0, 0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not JSON"),
        (b'{"text": "a"} x', "not JSON"),
        (b'["text"]', "not an object but a list"),
        (b'"text"', "not an object but a str"),
        (b'{"body": "a"}', "no field 'text'"),
        (b'{"text": null}', "text is not a string but a NoneType"),
        (b'{"text": ["a"]}', "text is not a string but a list"),
        (b"[" * 100_000, "not JSON (nested too deeply)"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": "' + b"a" * 200_000 + b'"}', "the line has more than 0 MiB"),
        (b"\0", "not JSON"),
    ],
)
def test_a_line_that_is_refused_is_named(tmp_path, monkeypatch, line, why):
    monkeypatch.setattr(documents, "MAX_LINE", 150_000)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}) + line + b"\n" + lines({"text": "b"}) + line)
    found, counts = read(tmp_path)
    assert names(found) == ["a.jsonl:1", "a.jsonl:3"]
    assert counts.refused == 2 and [name for name, _ in counts.refused_first] == ["a.jsonl:2", "a.jsonl:4"]
    assert counts.refused_first[0][1].startswith(why)


def test_only_the_first_of_many_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"x\n" * 100 + b'{"text": "\xff"}\n' * 100)
    counts = read(tmp_path)[1]
    assert (counts.refused, counts.not_utf8) == (100, 100)
    assert [name for name, _ in counts.refused_first] == [f"a.jsonl:{i}" for i in range(1, 6)]
    assert counts.not_utf8_first == [f"a.jsonl:{i}" for i in range(101, 106)]


def test_bytes_that_are_no_utf8_and_half_characters_stay(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "x\\ud83d"}\n')
    found, counts = read(tmp_path)
    assert [d.data for d in found] == [b"caf\xe9", b"x\xed\xa0\xbd"] and counts.not_utf8 == 2


def test_another_field_and_a_long_line_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART", 8)
    (tmp_path / "a.jsonl").write_bytes(lines({"body": "1234567\n1234567\n12", "text": "no"}))
    found, counts = read(tmp_path, field="body")
    assert found == [
        Document("a.jsonl:1", b"1234567\n"),
        Document("a.jsonl:1", b"1234567\n", False),
        Document("a.jsonl:1", b"12", False),
    ]
    assert counts.documents == 1
    for bad in (dict(field=""), dict(field=1), dict(split_at=None)):
        with pytest.raises(ValueError, match="field and split_at"):
            Documents(tmp_path, **bad)


@fuzz
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8), st.booleans())
def test_any_strings_come_back_from_json_lines(tmp_path, texts, ascii):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=ascii) + "\n" for t in texts), "utf-8", newline="\n")
    assert [d.data.decode() for d in read(path)[0]] == [text for text in texts if text]


@fuzz
@given(st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([b'{"text": "a"}', b'{"text":', b"\n"])), max_size=8))
def test_hostile_json_lines_are_documents_or_refused_or_empty(tmp_path, chunks):
    path, data = tmp_path / "a.jsonl", b"".join(chunks)
    path.write_bytes(data)
    found, counts = read(path)
    assert len(found) + counts.refused + counts.empty == len([line for line in io.BytesIO(data)])


# ---- compressed


def compress(ending, data):
    return gzip.compress(data) if ending == ".gz" else zstd.compress(data)


endings = pytest.mark.parametrize("ending", [".gz", pytest.param(".zst", marks=needs_zstd)])


@endings
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_compressed_files_hold_the_same_documents(tmp_path, monkeypatch, ending, name):
    monkeypatch.setattr(documents, "PART", 1000)
    data = lines(*({"text": f"line {i}\n" * (i % 300)} for i in range(500)))
    write(tmp_path, {f"plain/{name}": data, f"packed/{name}{ending.upper()}": compress(ending, data)})
    write(tmp_path, {f"twice/{name}{ending}": compress(ending, data[:9999]) + compress(ending, data[9999:])})
    plain, counts = read(tmp_path / "plain")
    assert len(plain) > 100
    for folder in ("packed", "twice"):
        found, same = read(tmp_path / folder)
        assert [(d.data, d.begins) for d in found] == [(d.data, d.begins) for d in plain]
        assert (same.hash, same.bytes, same.documents) == (counts.hash, counts.bytes, counts.documents)
        assert names(found)[0].lower() == plain[0].name.replace(name, name + ending)


@endings
def test_a_compressed_file_that_is_cut_off_is_an_error_that_names_it(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    whole = compress(ending, b"".join(b"%d" % i for i in range(3000)))
    for cut in (1, 5, 12, len(whole) // 2, len(whole) - 5, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"a\.txt{ending}: damaged or cut off"):
            list(Documents(tmp_path))


@endings
@fuzz
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_an_altered_compressed_file_is_an_error_or_the_same_text(tmp_path, ending, where, flip):
    """Both forms carry a checksum (zstd only if asked); some fields, like the time in gzip's header, change nothing."""
    text = b"".join(b"%d\n" % i for i in range(300))
    options = {zstd.CompressionParameter.checksum_flag: 1} if ending == ".zst" else {}
    data = bytearray(gzip.compress(text) if ending == ".gz" else zstd.compress(text, options=options))
    data[int(where * len(data))] ^= flip
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(data)
    try:
        found = list(Documents(path))
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert b"".join(d.data for d in found) == text


@endings
@fuzz
@given(data=st.binary(max_size=200))
def test_hostile_compressed_bytes(tmp_path, ending, data):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes((b"\x1f\x8b\x08\0" if ending == ".gz" else b"\x28\xb5\x2f\xfd") + data)
    with pytest.raises(ValueError, match=f"a.jsonl{ending}: damaged or cut off"):
        list(Documents(path))


@pytest.mark.parametrize(("name", "module"), [("a.txt.zst", "zstd"), ("a.parquet", "pyarrow")])
def test_without_the_libraries(tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_bytes(b"x")
    for missing in ("compression", "backports") if module == "zstd" else ("pyarrow",):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{name}: .*pip install 'barelm\[data\]'"):
        list(Documents(tmp_path))


# ---- parquet


@pytest.fixture
def parquet(tmp_path):
    """Write a column as a parquet file; returns its path."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def write(values, kind="string", path=tmp_path / "a.parquet", **options):
        kinds = {"dictionary": pa.dictionary(pa.int32(), pa.string())}
        column = pa.array(values, kinds.get(kind) or getattr(pa, kind)())
        pq.write_table(pa.table({"id": range(len(values)), "text": column}), path, **options)
        return path

    return write


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "dictionary"])
def test_parquet(parquet, kind):
    texts = ["é" * (i % 7) + str(i) for i in range(1000)]
    texts[3:5] = "", None
    values = [None if t is None else t.encode() for t in texts] if "binary" in kind else texts
    found, counts = read(parquet(values, kind, row_group_size=300))
    assert [d.data.decode() for d in found] == [text for text in texts if text]
    assert names(found)[:4] == ["a.parquet:1", "a.parquet:2", "a.parquet:3", "a.parquet:6"]
    assert (counts.empty, counts.refused_first) == (1, [("a.parquet:5", "text is null")])


def test_parquet_with_bytes_that_are_no_utf8(parquet):
    found, counts = read(parquet([b"caf\xe9"], "binary"))
    assert (found[0].data, counts.not_utf8) == (b"caf\xe9", 1)


def test_parquet_without_the_column(parquet):
    path = parquet(["a"])
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body' \(it has id, text\)"):
        list(Documents(path, field="body"))
    with pytest.raises(ValueError, match=r"a\.parquet: the column 'id' holds no strings but int64"):
        list(Documents(path, field="id"))


def test_damaged_parquet(parquet, tmp_path):
    whole = parquet([str(i) for i in range(1000)]).read_bytes()
    for data in (b"", b"x" * 100, b"PAR1", whole[:-1], whole[: len(whole) // 2], whole[4:], whole[:4] + whole[40:]):
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises((ValueError, OSError), match=r"a\.parquet"):
            list(Documents(tmp_path))


def test_parquet_inside_gzip_is_refused(tmp_path):
    write(tmp_path, {"a.parquet.gz": gzip.compress(b"PAR1"), "b.txt": b"b"})
    found, counts = read(tmp_path)
    assert names(found) == ["b.txt"] and counts.refused_first[0][0] == "a.parquet.gz"


def test_runs_and_datasets_below_a_folder_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for made in ("runs/x/run.json", "runs/x/data/train.txt", "shards/dataset.json", "shards/notes.txt", "runs/b.txt"):
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made).write_text("x")
    assert [document.name for document in Documents(str(tmp_path))] == ["a.txt", "runs/b.txt"]
