"""What a model knows by heart: passages are counted exactly, and what comes back is what greedy decoding writes."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from barelm import Tokenizer, checkpoint, kept, regurgitate
from barelm import __main__ as command
from barelm.data.documents import Documents
from barelm.data.shards import write_dataset
from barelm.data.tokens import Tokens, _Memory
from barelm.engine import Engine
from barelm.regurgitate import HELD_OUT, Passage, Texts, continued, counts_of, passages, summary
from barelm.session import Session
from conftest import GPT2
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model

TOK = Tokenizer.bytes()
EOT = TOK.eot
CONFIG = GPT2 | dict(vocab_size=TOK.n_vocab, context=40)


def tokens_of(ids):
    return Tokens([_Memory(np.array(ids, np.int32))], TOK.token_lengths())


def by_hand(windows, ids):
    return [
        sum(list(ids[i : i + len(window)]) == list(window) for i in range(len(ids) - len(window) + 1))
        for window in windows
    ]


# ---- counting -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=120),  # few different tokens: many windows are alike, and overlap
    st.integers(1, 6),
    st.integers(1, 50),
    st.sampled_from([regurgitate.BASE, 1, 2**63 + 1]),  # with the base 1 the order of the tokens does not count
)
def test_counts_are_exact(ids, W, block, base):
    windows = {tuple(ids[i : i + W]) for i in range(len(ids) - W + 1)} | {(2,) * W, tuple(range(W)), (0,) * W}
    windows = np.array(sorted(windows), np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regurgitate, "BASE", base)
        patch.setattr(regurgitate, "CHECKED", 7)
        found = counts_of(windows, tokens_of(ids), block)
    assert found.tolist() == by_hand(windows.tolist(), ids)


def test_counts_of_large_ids_and_of_nothing(rng):
    ids = rng.integers(0, 2**31 - 1, 50).tolist()
    ids += ids[10:30]
    windows = np.array([ids[10:15], ids[3:8], [2**31 - 1] * 5], np.int32)
    assert counts_of(windows, tokens_of(ids)).tolist() == [2, 1, 0]
    assert counts_of(windows[:0], tokens_of(ids)).tolist() == []
    assert counts_of(windows, tokens_of(ids[:4])).tolist() == [0, 0, 0]


# ---- which passages -----------------------------------------------------------------------------------------------


def documents(rng, *texts):
    """Ids in which each (times, text) stands so often, each time as a document, in any order."""
    all_of_them = [text for times, text in texts for _ in range(times)]
    return [id for i in rng.permutation(len(all_of_them)) for id in (EOT, *TOK.encode(all_of_them[i]))]


def random_text(rng, n=60):
    return bytes(rng.integers(97, 123, n).tolist())


def test_passages_are_sorted_by_how_often_they_stand_there(rng):
    often = [(times, random_text(rng)) for times in (*[1] * 12, 2, 3, 4, 10, 11, 15)]
    held_out = documents(rng, (1, random_text(rng)), (1, often[-3][1]))
    ids = documents(rng, *often)
    found = passages(Texts(tokens_of(ids), tokens_of(held_out), [EOT], {}), 20, 15, seed=3)
    times = {"once": {1}, "2 to 3 times": {2, 3}, "4 to 10 times": {4, 10}, "11 times or more": {11, 15}, HELD_OUT: {0}}
    assert [*dict.fromkeys(passage.group for passage in found)] == [*times]
    assert max(Counter(passage.group for passage in found).values()) == 15
    assert by_hand([passage.ids for passage in found], ids) == [passage.times for passage in found]
    for group, some in times.items():
        here = [passage for passage in found if passage.group == group]
        assert len(here) >= 10 and {passage.times for passage in here} == some
        text = held_out if group == HELD_OUT else ids
        assert all(text[p.place : p.place + 20] == p.ids.tolist() for p in here)
    assert len({passage.ids.tobytes() for passage in found}) == len(found)  # no two alike
    assert not any(EOT in passage.ids for passage in found)  # each within one document
    again = passages(Texts(tokens_of(ids), tokens_of(held_out), [EOT], {}), 20, 15, seed=3)
    other = passages(Texts(tokens_of(ids), tokens_of(held_out), [EOT], {}), 20, 15, seed=4)
    places = [[passage.place for passage in some] for some in (found, again, other)]
    assert places[0] == places[1] != places[2]


def test_there_may_be_fewer_passages_than_wanted(rng):
    ids = documents(rng, (1, b"abcdefgh"))
    found = passages(Texts(tokens_of(ids), None, [EOT], {}), 6, 100, seed=0)
    assert sorted(passage.place for passage in found) == [1, 2, 3] and {p.group for p in found} == {"once"}


def test_no_document_is_long_enough(rng):
    with pytest.raises(ValueError, match="--data: no document has 9 tokens; --prompt-tokens"):
        passages(Texts(tokens_of(documents(rng, (5, b"abcdefgh"))), None, [EOT], {}), 9, 10, seed=0)
    with pytest.raises(ValueError, match="no document has 99 tokens"):
        passages(Texts(tokens_of(documents(rng, (5, b"abcdefgh"))), None, [EOT], {}), 99, 10, seed=0)


# ---- what comes back ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def greedy(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model.logits(np.array([ids], np.int32))[0].argmax()))
    return ids


def planted(model, rng, differs, prompt=10, n=12):
    """A passage whose continuation is what the model writes, but from the token number `differs` on."""
    ids = greedy(model, rng.integers(0, 256, prompt), n)
    if differs < n:
        ids[prompt + differs] = (ids[prompt + differs] + 1) % 256
    return Passage("once", 0, 1, np.array(ids, np.int32))


def test_what_comes_back_is_what_greedy_decoding_writes(model, rng):
    differs = [0, 12, 5, 11, 12, 1, 0, 7, 12]
    some = [planted(model, rng, d) for d in differs]
    engine = Engine(Session(model, max_tokens=64 * 4), TOK)
    records = continued(engine, some, prompt=10, at_once=4)
    assert [record["verbatim"] for record in records] == differs
    for passage, record, d in zip(some, records, differs, strict=True):
        assert record["wrote"] == greedy(model, passage.ids[:10], 12)[10 : 10 + min(d + 1, 12)]
        assert record["prompt"] + record["continuation"] == passage.ids.tolist()
    assert engine.idle and engine.session.room == engine.session.pages  # nothing is left behind
    alone = [continued(Engine(Session(model, max_tokens=64), TOK), [p], prompt=10, at_once=1)[0] for p in some]
    assert alone == records


def test_the_end_of_text_is_another_token():
    """A passage holds none: a model that writes one ends what comes back."""
    eager = random_model(CONFIG)
    eager.params["wte.weight"][EOT] = 0
    eager.params["ln_f.bias"][:] += 3
    eager.params["wte.weight"][EOT] += 5  # the head is the embedding again
    assert greedy(eager, [1, 2, 3], 2)[3:] == [EOT, EOT]
    passage = Passage("once", 0, 1, np.arange(10, dtype=np.int32))
    (record,) = continued(Engine(Session(eager, max_tokens=64), TOK), [passage], prompt=3, at_once=1)
    assert (record["verbatim"], record["wrote"]) == (0, [EOT])


def test_the_summary_is_of_means():
    rows = [("once", 0), ("once", 3), ("once", 4), (HELD_OUT, 1)]
    one, other = summary({"group": name, "verbatim": n, "continuation": [0] * 4} for name, n in rows)
    assert (one.name, one.prompts, one.verbatim, one.whole) == ("once", 3, pytest.approx(7 / 3), pytest.approx(1 / 3))
    assert one.verbatim_stderr == pytest.approx(np.std([0, 3, 4], ddof=1) / math.sqrt(3))
    assert one.whole_stderr == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    assert other == (HELD_OUT, 1, 1.0, None, 0.0, None)


# ---- barelm eval --regurgitation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    checkpoint.save(model, path, files={"tokenizer.json": TOK.to_json().encode()})
    return path


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(5)
    parts = [random_text(rng) for _ in range(8)]
    path = tmp_path / "text.txt"
    path.write_bytes(b"|".join([*parts, *parts[:4], *parts[:2] * 4]))
    return path


FLAGS = ["--prompts", 6, "--prompt-tokens", 12, "--continuation-tokens", 8]


def run(capsys, folder, text, *more):
    flags = ["--regurgitation", "--data", text, "--split-at", "|", *FLAGS, *more]
    code = command.main(["eval", "--checkpoint", str(folder), *map(str, flags)])
    return code, *capsys.readouterr()


def test_the_command_tells_by_how_often(folder, model, text, tmp_path, capsys):
    code, out, _ = run(capsys, folder, text, "--out", tmp_path / "out", "--json")
    found = json.loads(out)
    names = ["once", "2 to 3 times", "4 to 10 times"]
    assert code == 0 and [group["name"] for group in found["groups"]] == names
    lines = [json.loads(line) for line in (tmp_path / "out/regurgitation/items.jsonl").read_text().splitlines()]
    assert len(lines) == sum(group["prompts"] for group in found["groups"]) == 18
    whole = text.read_bytes()
    for line in lines:
        ids = line["prompt"] + line["continuation"]
        assert (len(line["prompt"]), len(line["continuation"])) == (12, 8)
        assert whole.count(bytes(ids)) == line["times"]  # these do not overlap with themselves
        written = greedy(model, line["prompt"], 8)[12:]
        assert line["wrote"] == written[: len(line["wrote"])]
    once = [line["verbatim"] for line in lines if line["group"] == "once"]
    assert found["groups"][0]["verbatim"] == pytest.approx(np.mean(once))


def test_the_table(folder, text, tmp_path, capsys):
    code, out, _ = run(capsys, folder, text, "--out", tmp_path / "out")
    head, once, *_, hint, where = out.splitlines()
    assert code == 0 and " ".join(head.split()) == "in the text prompts verbatim, of 8 tokens all 8"
    assert once.startswith("once") and "0.00 ± 0.00" in once and "nothing of it is held out" in hint
    assert where == f"kept in {tmp_path / 'out' / 'regurgitation'}"


def test_of_a_dataset_the_held_out_side_is_asked_too(folder, text, tmp_path, capsys):
    write_dataset(Documents([str(text)], split_at="|"), TOK, tmp_path / "data", val_fraction=0.4)
    out = run(capsys, folder, tmp_path / "data", "--split-at", "", "--out", tmp_path / "out", "--json")[1]
    groups = json.loads(out)["groups"]
    assert groups[-1]["name"] == HELD_OUT and groups[-1]["prompts"] == 6
    lines = [json.loads(line) for line in (tmp_path / "out/regurgitation/items.jsonl").read_text().splitlines()]
    assert {line["times"] for line in lines if line["group"] == HELD_OUT} == {0}


def test_what_was_stopped_goes_on(folder, text, tmp_path, capsys, monkeypatch):
    whole = run(capsys, folder, text, "--json", "--out", tmp_path / "whole")[1]
    monkeypatch.setattr(kept, "AT_ONCE", 4)
    real, calls = regurgitate.continued, []

    def stops(engine, some, *more):
        calls.append(len(some))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(engine, some, *more)

    monkeypatch.setattr(regurgitate, "continued", stops)
    code, out, err = run(capsys, folder, text, "--json", "--out", tmp_path / "parts")
    assert code == 130 and out == "" and "8 of 18 items are kept" in err
    out = run(capsys, folder, text, "--json", "--out", tmp_path / "parts")[1]
    assert calls == [4, 4, 4, 4, 4, 2] and json.loads(out)["groups"] == json.loads(whole)["groups"]
    code, _, err = run(capsys, folder, text, "--seed", 1, "--out", tmp_path / "parts")
    assert code == 2 and "holds results with other seed" in err
    text.write_bytes(text.read_bytes() + b"|and more")
    code, _, err = run(capsys, folder, text, "--out", tmp_path / "parts")
    assert code == 2 and "holds results with other data" in err


HOSTILE = [
    (["--prompt-tokens", 0], "--prompt-tokens: must be above 0"),
    (["--prompts", 0], "--prompts: must be above 0"),
    (["--continuation-tokens", 29], "12 and 29 are more than the 40 tokens that the model sees"),
    (["--prompt-tokens", 40], "--prompt-tokens and --continuation-tokens: 40 and 8 are more than"),
    (["--data", "gone"], "gone: no such file or folder"),
    (["--shots", "1"], "--shots: does not go with --regurgitation"),
    (["--seed", -1], "--seed: must be 0 or more"),
]


@pytest.mark.parametrize("flags, says", HOSTILE, ids=[" ".join(map(str, flags)) for flags, _ in HOSTILE])
def test_mistakes_are_one_line(folder, text, capsys, flags, says):
    code, out, err = run(capsys, folder, text, *flags)
    assert code == 2 and out == ""
    assert says in err and err.startswith("barelm: ") and err.count("\n") == 1
