"""Files of multiple-choice tasks: what is read from each form, and that anything else is refused by name."""

import bz2
import gzip
import json
import tarfile
import tracemalloc

import pytest
from barelm import tasks
from barelm.tasks import Item, Request, read_task
from hypothesis import given, settings
from hypothesis import strategies as st
from taskfiles import PACKERS, QUIZ, SUBJECTS, SWAG, hellaswag, mmlu, olmo, olmo_lines, tar

FORMS = {"hellaswag": hellaswag(SWAG), "quiz": olmo(QUIZ), "mmlu": mmlu(SUBJECTS)}


def read(tmp_path, data, name="file"):
    (tmp_path / name).write_bytes(data)
    return read_task(str(tmp_path / name))


def pairs(items, task):
    """(context, choices, gold) of items, as written."""
    assert [len(item.requests) for item in task.items] == [len(choices) for _, _, choices in items]
    return [
        ({request.context for request in item.requests}, [request.continuation for request in item.requests], item.gold)
        for item in task.items
    ]


def written(items):
    return [({context}, [f" {choice}" for choice in choices], gold) for context, gold, choices in items]


# ---- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("form", FORMS)
def test_content_says_what_a_file_is(tmp_path, form, packed):
    for name in ("a.tar.gz", "b.txt.bz2", "c.jsonl"):
        task = read(tmp_path, PACKERS[packed](FORMS[form]), name)
        assert task.name == form and task.items == read(tmp_path, FORMS[form]).items


def test_hellaswag(tmp_path):
    task = read(tmp_path, hellaswag(SWAG))
    assert task.name == "hellaswag" and task.measures == ("acc_norm", "acc")
    assert pairs(SWAG, task) == written(SWAG)
    assert read(tmp_path, hellaswag(SWAG).replace(b"\n", b"\r\n") + b"\r\n\r\n").items == task.items
    assert task.items[1].name == "item 2 (line 7)"


def test_olmos_requests(tmp_path):
    task = read(tmp_path, olmo(QUIZ))
    assert task.name == "quiz" and task.measures == ("acc", "acc_norm")
    assert pairs(QUIZ, task) == written(QUIZ)  # those without their question are passed over
    assert read(tmp_path, olmo(QUIZ, unconditional=False)).items == task.items
    assert read(tmp_path, olmo(QUIZ, task="copa")).measures == ("acc",)


def test_mmlu_has_five_examples_and_one_question(tmp_path):
    task = read(tmp_path, mmlu(SUBJECTS))
    assert [item.gold for item in task.items] == [1, 3, 0]  # by subject, then in the order of the file
    context = task.items[1].requests[0].context
    listed = 'A. one\nB. two, or so\nC. a "third"\nD. 4\nAnswer:'
    shown = "".join(f"Example {i}?\n{listed} {'ABCD'[i % 4]}\n\n" for i in range(5))
    head = "The following are multiple choice questions (with answers) about world history.\n\n"
    assert context == f"{head}{shown}When?\nThen.\n{listed}"
    assert task.items[2].requests[0].context.endswith(f"\n\nWho?\n{listed}")
    assert [request.continuation for request in task.items[0].requests] == [" A", " B", " C", " D"]


def test_the_files_of_the_field(test_data):
    folder = test_data / "eval"
    hellaswag = read_task(str(folder / "hellaswag_val_full.txt.bz2"))
    assert (hellaswag.name, len(hellaswag.items)) == ("hellaswag", 10042)
    assert hellaswag.items[0].requests[3] == (
        "Roof shingle removal: A man is sitting on a roof. he",
        " starts pulling up roofing on a roof.",
    )
    for name, n, gold in (("arc_easy", 570, 0), ("openbookqa", 500, 0), ("copa", 100, 1)):
        task = read_task(str(folder / f"olmo_{name}_rc_0shot.jsonl.gz"))
        assert (task.name, len(task.items), task.items[0].gold) == (name, n, gold)
    mmlu = read_task(str(folder / "mmlu_dev_val.tar.gz"))
    assert (mmlu.name, len(mmlu.items)) == ("mmlu", 1531)  # the validation questions of Hendrycks et al.


text = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1, max_size=20)
filled = text.filter(lambda line: line.removeprefix(" ") and not line.isspace())


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(filled.map("x".__add__), st.integers(0, 3), st.lists(filled, min_size=4, max_size=4)), min_size=1
    )
)
def test_any_text_of_hellaswags_form(tmp_path_factory, items):
    task = read(tmp_path_factory.getbasetemp(), hellaswag(items))
    assert pairs(items, task) == written(items)


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(filled, min_size=2, max_size=6).flatmap(
            lambda choices: st.tuples(
                st.text(st.characters(codec="utf-8")), st.integers(0, len(choices) - 1), st.just(choices)
            )
        ),
        min_size=1,
    ),
    st.randoms(),
)
def test_any_requests_in_any_order_of_their_choices(tmp_path_factory, items, rng):
    lines = olmo_lines(items)
    rng.shuffle(lines)
    lines.sort(key=lambda line: line["doc_id"])  # items keep their order, choices do not
    data = "".join(json.dumps(line, ensure_ascii=rng.random() < 0.5) + "\n" for line in lines).encode()
    assert pairs(items, read(tmp_path_factory.getbasetemp(), data)) == written(items)


# ---- what is refused ----------------------------------------------------------------------------------------------


def changed(**fields):
    """OLMo's requests with another field in the third line."""
    lines = olmo_lines(QUIZ)
    for name, value in fields.items():
        (lines[2]["request"] if name in ("context", "continuation") else lines[2])[name] = value
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def without(name):
    lines = olmo_lines(QUIZ)
    del (lines[2]["request"] if name in ("context", "continuation") else lines[2])[name]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def csv_tar(row, side="val"):
    files = {"dev/a_dev.csv": b"q,1,2,3,4,A\n", "val/a_val.csv": b"q,1,2,3,4,A\n"}
    return tar(files | {f"{side}/a_{side}.csv": row})


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def sparse(name, size):
    """A member that claims to be a file of `size` zeros and has no byte."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % size  # the real size
    header[386:398] = header[398:410] = b"%011o\0" % 0
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


SWAG_TEXT, QUIZ_TEXT, MMLU_TAR = FORMS["hellaswag"], FORMS["quiz"], FORMS["mmlu"]
HOSTILE = {
    "nothing": (b"", "is no task"),
    "empty lines": (b"\n\n\n", "is no task"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "UTF-8|is no task"),
    "a novel": (b"It was a dark night.\nIt rained.\n", "is no task"),
    "torn gzip": (gzip.compress(SWAG_TEXT)[:-20], "damaged or cut off"),
    "altered gzip": (gzip.compress(SWAG_TEXT)[:-8] + bytes(8), "damaged or cut off"),
    "gzip of rubbish": (b"\x1f\x8b\x08\0" + bytes(20), "damaged or cut off|is no task"),
    "torn bzip2": (bz2.compress(SWAG_TEXT)[:-20], "damaged or cut off"),
    "altered bzip2": (bz2.compress(SWAG_TEXT)[:40] + bytes(30), "damaged or cut off"),
    "five lines": (SWAG_TEXT[: SWAG_TEXT.rindex(b"is a tree.")], r"item 7 \(line 37\): is cut off, 5 lines of 6"),
    "an ending that is not": (
        SWAG_TEXT.replace(b"\n2\n", b"\n7\n"),
        r"item 3 \(line 13\): the number of the right ending",
    ),
    "no ending": (SWAG_TEXT.replace(b"sings.", b""), "item 1 .*: a choice is empty"),
    "not UTF-8": (SWAG_TEXT.replace(b"man 3", b"m\xe4n 3"), "line 19: is not UTF-8"),
    "no JSON": (QUIZ_TEXT[:-30], "line 20: is not JSON"),
    "deep JSON": (b'{"a":' * 100_000, "line 1: is not JSON"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", "line 1: is not JSON"),
    "a list": (QUIZ_TEXT + b"[]\n", "line 21: is no request"),
    "one choice": (olmo([("a", 0, ["b"])]), "line 1: document 0: has 1 choices, must have 2"),
    "gold out of range": (olmo([("a", 2, ["b", "c"])]), "document 0: the right choice is 2, there are 2"),
    "gold below": (changed(label=-1), "line 3: label is -1"),
    "gold is true": (changed(label=True), "line 3: label is True"),
    "golds differ": (changed(label=2), "line 1: document 0: its requests do not agree"),
    "number too large": (changed(doc_id=2**40), "line 3: doc_id is"),
    "a choice twice": (changed(idx=1), r"document 0: has the choices \[0, 1, 1\]"),
    "another kind": (changed(request_type="generate_until"), "line 3: request_type is 'generate_until'"),
    "another task": (changed(task_name="arc"), "line 3: is of the task arc"),
    "a path": (changed(task_name="../../etc"), "line 3: task_name is"),
    "a hidden name": (changed(task_name=".x"), "line 3: task_name is"),
    "no context": (without("context"), "line 3: context is missing"),
    "no continuation": (without("continuation"), "line 3: continuation is missing"),
    "no request": (without("request"), "line 3: is no request"),
    "no document": (without("doc_id"), "line 3: doc_id is None"),
    "a number for a text": (changed(context=5), "line 3: context is no string"),
    "half a character": (changed(context="\ud800"), "document 0: holds a character that is none"),
    "an empty choice": (changed(continuation=" "), "document 0: a choice is empty"),
    "no question at all": (olmo(QUIZ).split(b"\n")[10] + b"\n", "holds no item"),
    "torn tar": (MMLU_TAR[:2000], "damaged or cut off"),
    "a tar of others": (tar({"a.txt": b"x"}), "holds no item"),
    "no examples": (tar({"val/a_val.csv": b"q,1,2,3,4,A\n"}), "a_val.csv: there is no a_dev.csv"),
    "a link": (tar({"": link("val/a_val.csv", "/etc/passwd")}), "holds no item"),
    "few columns": (csv_tar(b"q,1,2,3,4,A\nq,1,2,A\n"), "a_val.csv: row 2: has 4 columns"),
    "another letter": (csv_tar(b"q,1,2,3,4,E\n"), "a_val.csv: row 1: the answer is 'E'"),
    "two letters": (csv_tar(b"q,1,2,3,4,AB\n"), "a_val.csv: row 1: the answer is 'AB'"),
    "no letter": (csv_tar(b"q,1,2,3,4,\n", "dev"), "a_dev.csv: row 1: the answer is ''"),
    "a quote that never ends": (csv_tar(b'"q,1,2,3,4,A\n'), "a_val.csv: is no CSV"),
    "no rows": (csv_tar(b""), "a_val.csv: holds no question"),
    "csv that is not UTF-8": (csv_tar(b"q\xe4,1,2,3,4,A\n"), "a_val.csv: is not UTF-8"),
    "twice": (tar({"x/val/a_val.csv": b"q", "y/val/a_val.csv": b"q"}), "a_val.csv: is there twice"),
    "zeros": (sparse("val/a_val.csv", 1 << 32), "claims more bytes than there are|damaged"),
}


@pytest.mark.parametrize("data, says", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_task_is_refused_by_name(tmp_path, data, says):
    with pytest.raises(ValueError, match=says) as caught:
        read(tmp_path, data, "tasks.bin")
    assert str(caught.value).startswith(f"{tmp_path / 'tasks.bin'}: ") and len(str(caught.value)) < 500


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_task(str(path))


def test_what_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "MAX_FILE", 1 << 16)
    bomb = b"A" * (1 << 24)
    for data in (gzip.compress(bomb), bz2.compress(bomb), gzip.compress(b"") + gzip.compress(bomb)):
        assert len(data) < 1 << 16
        tracemalloc.start()
        with pytest.raises(ValueError, match="unpacks to more than"):
            read(tmp_path, data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20  # no more is unpacked than it takes to see that
    with pytest.raises(ValueError, match="has more than"):
        read(tmp_path, bomb)


def test_bounds_of_lines_and_members(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "MAX_LINE", 100)
    with pytest.raises(ValueError, match="line 8: has more than"):
        read(tmp_path, hellaswag(SWAG[:1]) + b"x\n" + b"y" * 101)
    monkeypatch.setattr(tasks, "MAX_MEMBERS", 4)
    with pytest.raises(ValueError, match="more than 4 files"):
        read(tmp_path, mmlu(SUBJECTS))


def test_nothing_is_ever_unpacked(tmp_path, monkeypatch):
    """Names in a tar that lead elsewhere are only names."""
    monkeypatch.chdir(tmp_path)
    row = b"q,1,2,3,4,A\n"
    data = tar({"../../dev/a_dev.csv": row, "/val/a_val.csv": row, "": link("val/b_val.csv", "../../val/c_val.csv")})
    assert len(read(tmp_path, data).items) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


@given(st.sampled_from(sorted(FORMS)), st.sampled_from(sorted(PACKERS)), st.randoms(use_true_random=False))
def test_changed_files_are_read_or_refused(tmp_path_factory, form, packed, rng):
    data = bytearray(PACKERS[packed](FORMS[form]))
    for _ in range(rng.choice([1, 1, 3, 20])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(data)
    try:
        task = read_task(str(path))
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) < 1000
    else:
        assert task.items and all(0 <= item.gold < len(item.requests) for item in task.items)


def test_items_check_themselves():
    with pytest.raises(ValueError, match="x: has 1 choices"):
        Item((Request("a", " b"),), 0, "x")
    with pytest.raises(ValueError, match="x: the right choice is -1"):
        Item((Request("a", " b"), Request("a", " c")), -1, "x")


def test_a_choice_is_the_continuation_without_its_space():
    assert (
        Request("a", " b c ").choice == "b c "
        and Request("a", "b").choice == "b"
        and Request("a", "  b").choice == " b"
    )


def test_the_digest_is_that_of_the_file(tmp_path):
    one, other = (read(tmp_path, gzip.compress(SWAG_TEXT, level, mtime=0)).sha256 for level in (1, 9))
    assert one != other and read(tmp_path, SWAG_TEXT).sha256 not in (one, other)
