"""barelm tokenizer train, encode, show, compare: what they write and print, and what they refuse."""

import contextlib
import io
import json
import unicodedata

import pytest
from barelm import Tokenizer, _core
from barelm.__main__ import main
from barelm.vocabulary import show, texts, train
from barelm.vocabulary.common import visible
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_tokenizer import EOT, small_bpe

TEXT = "the cat sat on the mat, the dog on the log\n" * 40


def run(*argv):
    """(exit code, standard output, standard error) of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["tokenizer", *map(str, argv)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder with the vocabulary that small_bpe is."""
    small_bpe().save(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


# ---- train --------------------------------------------------------------------------------------------------------


def test_train_writes_a_tokenizer_and_says_what_it_is(corpus, tmp_path):
    flags = ["--data", corpus, "--vocab-size", 300, "--special", "<|a|>,<|b|>", "--out", tmp_path / "new"]
    code, out, _ = run("train", *flags, "--json")
    assert code == 0
    result = json.loads(out)
    tok = Tokenizer.load(tmp_path / "new")
    assert (result["vocab_size"], result["merges"], tok.n_vocab) == (
        tok.n_vocab,
        tok.n_vocab - 259,
        result["vocab_size"],
    )
    assert 259 < tok.n_vocab <= 300 and set(tok.special) == {EOT, "<|a|>", "<|b|>"}
    assert result["sha256"] == tok.hash() and result["tokenizer"] == str(tmp_path / "new" / "tokenizer.json")
    assert (result["documents"], result["bytes"], result["measured_bytes"]) == (1, len(TEXT), len(TEXT))
    assert result["bytes_per_token"] == pytest.approx(len(TEXT) / len(tok.encode(TEXT)))
    longest = [token["bytes"] for token in result["longest"]]
    assert longest == sorted(longest, reverse=True) and longest[0] == tok.token_lengths().max()
    assert all(visible(tok.token_bytes(token["id"])) == token["text"] for token in result["longest"])
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"tokenizer.json"}


def test_train_makes_what_the_library_makes(corpus, tmp_path):
    run("train", "--data", corpus, "--vocab-size", 290, "--pattern", "gpt2", "--out", tmp_path / "new")
    tok = Tokenizer.train([TEXT.encode()], 290, pattern="gpt2")
    assert Tokenizer.load(tmp_path / "new").hash() == tok.hash()


def test_train_tells_people_the_same_in_words(corpus, tmp_path):
    code, out, _ = run("train", "--data", corpus, "--vocab-size", 270, "--out", tmp_path / "new")
    assert code == 0
    for words in (
        "1 documents, 1.72 kB",
        "270: 256 bytes, 13 merges, 1 special",
        "bytes a token",
        "longest",
        "written",
    ):
        assert words in out
    assert "\x1b" not in out


def test_train_reads_standard_input_once_and_measures_what_it_kept(stdin, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAMPLE", 100)
    stdin(TEXT.encode())
    code, out, _ = run("train", "--data", "-", "--vocab-size", 270, "--out", tmp_path / "new", "--json")
    result = json.loads(out)
    assert code == 0 and (result["bytes"], result["measured_bytes"]) == (len(TEXT), 100)
    tok = Tokenizer.load(tmp_path / "new")
    assert result["bytes_per_token"] == pytest.approx(100 / len(tok.encode(TEXT[:100])))


def test_train_uses_as_many_threads_as_it_is_told(corpus, tmp_path):
    before = _core.threads_get()
    try:
        assert run("train", "--data", corpus, "--vocab-size", 260, "--threads", 3, "--out", tmp_path / "new")[0] == 0
        assert _core.threads_get() == 3
    finally:
        _core.threads_set(before)


def test_train_shows_what_it_does_in_plain_lines_where_there_is_no_terminal(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train._Progress, "PLAIN_SECONDS", 0.0)
    _, out, err = run("train", "--data", corpus, "--vocab-size", 270, "--out", tmp_path / "new", "--json")
    json.loads(out)
    assert "reads  1 documents  1.72 kB" in err and "merges  13 of 13" in err and "\x1b" not in err


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--vocab-size", 256], "--vocab-size: must be at least 257, got 256"),
        (["--vocab-size", 258, "--special", "<|a|>,<|b|>"], "--vocab-size: must be at least 259"),
        (["--special", "<|a|>,,<|b|>"], "--special: a name is empty or there twice"),
        (["--special", f"<|a|>,{EOT}"], "--special: a name is empty or there twice"),
        (["--threads", -1], "--threads: must be 0 or more"),
        (["--pattern", "gpt5"], "--pattern: invalid choice"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file"),
    ],
)
def test_train_refuses_what_cannot_be(tmp_path, flags, says):
    code, out, err = run("train", "--out", tmp_path / "new", *flags)
    assert code == 2 and says in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "new").exists()


def test_train_leaves_the_tokenizer_that_is_there(corpus, folder):
    before = (folder / "tokenizer.json").read_bytes()
    code, _, err = run("train", "--data", corpus, "--vocab-size", 260, "--out", folder)
    assert code == 2 and "is there already" in err
    assert (folder / "tokenizer.json").read_bytes() == before


# ---- encode -------------------------------------------------------------------------------------------------------


def test_encode_prints_ids(folder, stdin, tmp_path):
    text = f"hello wé\n{EOT}"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    stdin(text.encode())
    tok = small_bpe()
    for source in (["--text", text], ["--data", tmp_path / "text"], []):
        code, out, _ = run("encode", "--tokenizer", folder, *source)
        assert code == 0 and out == " ".join(map(str, tok.encode(text))) + "\n"
    code, out, _ = run("encode", "--tokenizer", folder, "--text", text, "--special", "--json")
    ids = tok.encode(text, special=True)
    assert json.loads(out) == {"ids": ids, "tokens": len(ids), "bytes": len(text.encode())}


def test_encode_takes_any_bytes_and_nothing(stdin):
    for data in (b"a\xff\x00\n", b""):
        stdin(data)
        assert run("encode", "--tokenizer", "bytes")[1].split() == [str(b) for b in data]


@pytest.mark.parametrize("command", ["encode", "show"])
def test_one_text_and_a_tokenizer_are_needed(command, folder, tmp_path):
    for flags, says in (
        ([], "--tokenizer must be given"),
        (["--tokenizer", folder, "--text", "a", "--data", "b"], "--text and --data: only one"),
        (["--tokenizer", tmp_path / "nowhere", "--text", "a"], "nowhere: no such file"),
        (["--tokenizer", folder, "--data", tmp_path / "nowhere"], "nowhere: No such file"),
        (["--tokenizer", folder, "--data", tmp_path], "Is a directory"),
    ):
        code, out, err = run(command, *flags)
        assert code == 2 and says in err and err.count("\n") == 1 and not out


# ---- show ---------------------------------------------------------------------------------------------------------


def test_show_puts_bars_between_tokens_where_there_is_no_colour(folder):
    code, out, _ = run("show", "--tokenizer", folder, "--text", f"hello wé\n\tx🦙{EOT}", "--special")
    first, second, _, counts = out.split("\n")[:4]
    assert code == 0
    assert first == r"hell|o| w|é|\n" and second == rf"\t|x|\xf0|\x9f|\xa6|\x99|{EOT}"
    assert counts == "12 tokens, 29 bytes, 2.42 bytes a token"


def on_a_terminal(monkeypatch, config, **options):
    out = io.StringIO()
    screen = Console(file=out, force_terminal=True, width=40, **{"color_system": "truecolor", **options})
    monkeypatch.setattr(show, "console", lambda: screen)
    assert show.main(config) == 0
    return out.getvalue()


def test_show_alternates_backgrounds_on_a_terminal(folder, monkeypatch):
    out = on_a_terminal(monkeypatch, show.ShowConfig(str(folder), text=f"hello wé{EOT}", special=True))
    assert "|" not in out.replace(EOT, "")
    codes = [part.split("m", 1) for part in out.split("\n")[0].split("\x1b[")[1:]]
    styled = [(code, text) for code, text in codes if text]
    assert [text for _, text in styled] == ["hell", "o", " w", "é", EOT]
    assert len({code for code, _ in styled}) == 5 and all("48;2" in code for code, _ in styled[:4])


def test_show_uses_no_colour_where_none_is_wanted(folder, monkeypatch):
    out = on_a_terminal(monkeypatch, show.ShowConfig(str(folder), text="hello"), no_color=True)
    assert out.startswith("hell|o\n")


def test_show_has_a_line_for_each_id(folder):
    _, out, _ = run("show", "--tokenizer", folder, "--text", "hello\n", "--ids")
    tok = small_bpe()
    assert [line.split() for line in out.split("\n")[:3]] == [
        [str(id), visible(tok.token_bytes(id))] for id in tok.encode("hello\n")
    ]


def test_nothing_has_no_tokens(folder, stdin):
    stdin(b"")
    for flags in ([], ["--ids"]):
        code, out, _ = run("show", "--tokenizer", folder, *flags)
        assert code == 0 and out.strip() == "0 tokens, 0 bytes"


@settings(deadline=None, database=None)
@given(data=st.binary() | st.text().map(str.encode))
def test_no_control_character_reaches_the_terminal(data):
    shown = visible(data)
    assert all(c == " " or unicodedata.category(c)[0] not in "CZ" for c in shown)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "read_text", lambda *_: data)
        out = on_a_terminal(patch, show.ShowConfig("bytes"), color_system=None)
    assert all(c in "\n " or unicodedata.category(c)[0] not in "CZ" for c in out)


@settings(deadline=None, database=None)
@given(a=st.binary(max_size=8) | st.text("\\nx\x1b9fé\x80", max_size=8).map(str.encode), b=st.binary(max_size=8))
def test_what_is_visible_can_be_read_back(a, b):
    """So that no two tokens look alike."""
    for data in (a, b):
        escaped = visible(data).encode("utf-8")
        back = bytearray()
        at = 0
        while at < len(escaped):
            if escaped[at : at + 1] != b"\\":
                back.append(escaped[at])
                at += 1
                continue
            kind = escaped[at + 1 : at + 2].decode()
            digits = {"x": 2, "u": 4, "U": 8}.get(kind, 0)
            code = int(escaped[at + 2 : at + 2 + digits] or b"0", 16)
            named = {"n": b"\n", "r": b"\r", "t": b"\t", "\\": b"\\"}
            back += named.get(kind) or (bytes([code]) if kind == "x" else chr(code).encode())
            at += 2 + digits
        assert bytes(back) == data


# ---- compare ------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_texts(monkeypatch):
    monkeypatch.setattr(texts, "LIMIT", 20_000)


def test_compare_counts_every_text_with_every_tokenizer(folder, corpus, few_texts):
    code, out, _ = run("compare", "--tokenizer", f"{folder},bytes", "--data", corpus, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["tokenizers"][str(folder)] == {"vocab_size": small_bpe().n_vocab, "sha256": small_bpe().hash()}
    assert len(result["texts"]) == 6
    for row in result["texts"]:
        assert row["bytes"] > 0 and row["tokens"]["bytes"] == row["bytes"] and row["bytes_per_token"]["bytes"] == 1.0
        assert row["bytes_per_token"][str(folder)] == row["bytes"] / row["tokens"][str(folder)] >= 1.0
    mine = result["texts"][-1]
    assert mine["text"] == str(corpus) and mine["tokens"][str(folder)] == len(small_bpe().encode(TEXT))


def test_compare_makes_a_table_that_cuts_no_name(folder, few_texts):
    code, out, _ = run("compare", "--tokenizer", f"bytes,{folder}")
    assert code == 0 and "…" not in out and "\x1b" not in out
    code_row = next(line for line in out.splitlines() if "code" in line)
    assert "1.00" in code_row and "+" in code_row


def test_the_texts_are_what_they_are_called(few_texts):
    kinds = {name: b"\n".join(documents).decode() for name, documents in texts.kinds().items()}
    code, english, digits, indented, letters = kinds.values()
    assert "def " in code and "import " in code
    assert " the " in english and "\n    return " not in english
    assert sum(map(str.isdigit, digits)) > 0.8 * len("".join(digits.split()))
    assert sum(map(str.isspace, indented)) > 0.4 * len(indented)
    assert len(letters.split("\n")) == len(texts.SCRIPTS) and all(map(str.isalpha, letters.split()))


def test_compare_refuses_what_cannot_be(folder, tmp_path):
    for flags, says in (
        (["--tokenizer", f"{folder},{folder}"], "--tokenizer: one is there twice"),
        (["--tokenizer", f"bytes,{tmp_path / 'nowhere'}"], "nowhere: no such file"),
        (["--tokenizer", "bytes", "--data", tmp_path / "nothing"], "nothing: no such file"),
    ):
        code, out, err = run("compare", *flags)
        assert code == 2 and says in err and err.count("\n") == 1 and not out
