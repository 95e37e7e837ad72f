"""Learning from examples in the prompt: tasks whose answers are right, questions that stay, and what a model gets that
understands them."""

import json
import math

import numpy as np
import pytest
from barelm import Model, Tokenizer, checkpoint, choice
from barelm import __main__ as command
from barelm.incontext import CHOICES, MOST, NAMES, OPPOSITES, TASKS, WORDS, items, numbers
from conftest import GPT2
from models import random_model

TOK = Tokenizer.bytes()
SHOTS = [0, 1, 2, 4, 8, 16, MOST]


def parts(item):
    """(examples [(question, answer)], question, answers to choose from, the right one)"""
    (context,) = {request.context for request in item.requests}
    *lines, last = context.split("\n")
    assert last.endswith(" ->") and all(request.continuation.startswith(" ") for request in item.requests)
    choices = [request.continuation[1:] for request in item.requests]
    return [tuple(line.split(" -> ")) for line in lines], last[:-3], choices, choices[item.gold]


OPPOSITE = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
ANSWERS = {
    "copy": lambda question, shown: question,
    "reverse": lambda question, shown: " ".join(question.split()[::-1]),
    "letters": lambda question, shown: dict(shown).get(question),
    "successor": lambda question, shown: str(int(question) + 1),
    "opposites": lambda question, shown: OPPOSITE[question],
}


def test_words_are_words():
    assert (
        len(set(WORDS)) == len(WORDS) > MOST and len(set(NAMES)) == len(NAMES) and len(OPPOSITE) == 2 * len(OPPOSITES)
    )
    assert len(OPPOSITES) > MOST and not set(WORDS) & set(NAMES)


@pytest.mark.parametrize("shots", SHOTS)
@pytest.mark.parametrize("task", TASKS)
def test_examples_and_answers_are_right(task, shots):
    golds = []
    for item in items(task, shots, 40, seed=1):
        shown, question, choices, answer = parts(item)
        assert len(shown) == shots and len(set(choices)) == len(choices) == CHOICES
        assert all(ANSWERS[task](asked, shown) == said for asked, said in shown)
        if task != "letters":
            assert ANSWERS[task](question, shown) == answer and question not in dict(shown)
        elif shots >= CHOICES:
            assert ANSWERS[task](question, shown) == answer
            assert {said for _, said in shown} == set(choices)
        golds.append(item.gold)
    assert {0, 1, 2, 3} == set(golds)  # the right one stands anywhere


@pytest.mark.parametrize("task", TASKS)
def test_only_the_number_of_examples_differs(task):
    most = [parts(item) for item in items(task, MOST, 10, seed=2)]
    for shots in SHOTS:
        for (shown, *rest), (all_shown, *same) in zip(map(parts, items(task, shots, 10, seed=2)), most, strict=True):
            assert rest == same and shown == all_shown[MOST - shots :]
    assert [parts(item) for item in items(task, MOST, 4, seed=2)] == most[:4]
    assert [parts(item) for item in items(task, MOST, 10, seed=3)] != most


@pytest.mark.parametrize("task", ["copy", "letters", "opposites"])
def test_wrong_answers_are_those_of_the_nearest_examples(task):
    """With four examples or more each wrong answer stands in the prompt: to repeat what stands there is no help."""
    for item in items(task, 4, 20, seed=0):
        shown, _, choices, answer = parts(item)
        assert set(choices) - {answer} <= {said for _, said in shown}


def test_wrong_answers_are_those_of_one_who_has_not_understood():
    for item in items("reverse", 4, 20, seed=0):
        assert parts(item)[1] in parts(item)[2]  # who copies is wrong
    for item in items("successor", 0, 20, seed=0):
        _, question, choices, _ = parts(item)
        assert sorted(map(int, choices)) == [int(question) + i for i in (-1, 0, 1, 2)]


def test_questions_stay_what_they_are():
    """A seed's questions are the same everywhere and for ever, or results could not be compared."""
    shown, question, choices, answer = parts(items("copy", 2, 1, seed=0)[0])
    assert (shown, question, choices, answer) == COPY
    assert parts(items("letters", 4, 1, seed=7)[0]) == LETTERS


COPY = ([("honey", "honey"), ("video", "video")], "night", ["honey", "video", "night", "queen"], "night")
LETTERS = (
    [("c", "blue"), ("h", "grey"), ("e", "brown"), ("d", "white")],
    "d",
    ["white", "blue", "brown", "grey"],
    "white",
)


# ---- barelm eval --in-context -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model = random_model(GPT2 | dict(vocab_size=TOK.n_vocab, context=100, n_layer=1))
    checkpoint.save(model, path, files={"tokenizer.json": TOK.to_json().encode()})
    return path


def run(capsys, folder, *more):
    code = command.main(["eval", "--checkpoint", str(folder), "--in-context", *map(str, more)])
    return code, *capsys.readouterr()


class Understands:
    """Scores choices as one would who knows the answers."""

    def __call__(self, model, tok, asked, batch, T):
        records = real_score(model, tok, asked, batch, T)
        for record, item in zip(records, asked, strict=True):
            shown, question, choices, _ = parts(item)
            task = item.name.split(",")[0]
            record["cut"] = 0
            record["logprobs"] = [-float(choice != ANSWERS[task](question, shown)) for choice in choices]
        return records


real_score = choice.score


def test_who_understands_is_right(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(choice, "score", Understands())
    flags = ["--questions", 30, "--shots", "0,4", "--out", tmp_path, "--json"]
    found = json.loads(run(capsys, folder, *flags)[1])
    cells = {(cell["task"], cell["shots"]): cell for cell in found["cells"]}
    assert found["chance"] == 0.25 and len(cells) == 2 * len(TASKS)
    for (task, shots), cell in cells.items():
        if (task, shots) == ("letters", 0):  # nothing says what the letters stand for
            assert cell["acc"] == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 30))
        else:
            assert (cell["acc"], cell["acc_stderr"]) == (1.0, 0.0)


def test_the_command_says_what_the_model_says(folder, tmp_path, capsys):
    flags = ["--questions", 8, "--shots", "2,0", "--out", tmp_path, "--seed", 5]
    code, out, _ = run(capsys, folder, *flags, "--json")
    cells = json.loads(out)["cells"]
    assert code == 0 and [(c["task"], c["shots"]) for c in cells] == [(task, k) for task in TASKS for k in (2, 0)]
    model = Model.load(folder)
    for cell in cells:
        hits = [choice.right(r, "acc") for r in choice.score(model, TOK, items(cell["task"], cell["shots"], 8, 5))]
        assert cell["acc"] == np.mean(hits)
        assert cell["acc_stderr"] == pytest.approx(np.std(hits, ddof=1) / math.sqrt(8))
    code, table, _ = run(capsys, folder, *flags)  # what is kept is told again
    head, *rows, says, where = table.splitlines()
    assert head.split() == ["examples", "2", "0"] and [row.split()[0] for row in rows] == [*TASKS]
    assert f"{cells[0]['acc']:.2f}±{cells[0]['acc_stderr']:.2f}" == rows[0].split()[1]
    assert "chance 0.25" in says and where == f"kept in {tmp_path / 'in-context'}"


def test_examples_that_do_not_fit_are_no_result(folder, tmp_path, capsys):
    flags = ["--questions", 3, "--shots", "0,16", "--out", tmp_path]
    _, out, _ = run(capsys, folder, *flags)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1 : 1 + len(TASKS)]}
    assert rows["copy"][1] == "-" != rows["copy"][0]
    assert "do not fit into the model's context" in out
    cells = json.loads(run(capsys, folder, *flags, "--json")[1])["cells"]
    assert [(cell["acc"], cell["acc_stderr"]) for cell in cells if cell["task"] == "copy"][1] == (None, None)


def test_numbers_of_examples():
    assert numbers("0,1, 32") == [0, 1, 32]
    for bad in ("", "1,,2", "-1", "33", "two", "1.5", "9" * 5000, "٣x"):
        with pytest.raises(ValueError, match=r"--shots: '.*' is not a whole number from 0 to 32"):
            numbers(bad)
    with pytest.raises(ValueError, match="--shots: '1,2,1' has a number twice"):
        numbers("1,2,1")


HOSTILE = [
    (["--shots", "64"], "--shots: '64' is not a whole number from 0 to 32"),
    (["--questions", 0], "--questions: must be above 0"),
    (["--context", 101], "--context: 101 is more than the 100 tokens"),
    (["--prompts", 3], "--prompts: does not go with --in-context"),
    (["--data", "x"], "--data: does not go with --in-context"),
]


@pytest.mark.parametrize("flags, says", HOSTILE, ids=[" ".join(map(str, flags)) for flags, _ in HOSTILE])
def test_mistakes_are_one_line(folder, capsys, flags, says):
    code, out, err = run(capsys, folder, *flags)
    assert code == 2 and out == ""
    assert says in err and err.startswith("barelm: ") and err.count("\n") == 1
