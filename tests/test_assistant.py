"""An assistant by prompt alone: what the model reads, where an answer ends, and `barelm sample --assistant`."""

import json

import pytest
from barelm import Tokenizer, checkpoint, sample
from barelm import __main__ as command
from barelm.assistant import template, trimmed
from conftest import GPT2
from hypothesis import given
from hypothesis import strategies as st
from models import random_model

TOK = Tokenizer.bytes()


def test_the_question_comes_last_and_an_answer_is_next():
    prompt, stops = template("  What is a river?\n")
    assert prompt.endswith("\n\nPerson: What is a river?\nAssistant:")
    assert prompt.count("\nPerson: ") == prompt.count("\nAssistant:") == 4  # three are examples, answered
    assert prompt.count("\nAssistant: ") == 3  # the space before the answer is the answer's
    assert stops == ("\nPerson:", "\nAssistant:")


def test_no_turn_of_the_examples_ends_an_answer_early():
    """Every example ends at the next header, and nowhere before."""
    prompt, stops = template("x")
    for turn in prompt.split("\nAssistant:")[1:-1]:
        answer, _, rest = turn.partition(stops[0])
        assert answer.strip() and rest and stops[1] not in answer


def test_there_must_be_a_question():
    for nothing in ("", " \n"):
        with pytest.raises(ValueError, match="there is no question"):
            template(nothing)


@given(st.lists(st.text(st.sampled_from("ab \n\t\u3000"), max_size=5)))
def test_a_text_is_trimmed_as_it_comes(pieces):
    found = list(trimmed(iter(pieces)))
    assert "".join(found) == "".join(pieces).strip()
    assert all(found)
    for i in range(len(pieces)):  # nothing waits that need not
        assert "".join(trimmed(pieces[:i])) == "".join(pieces[:i]).strip()


# ---- barelm sample --assistant ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model = random_model(GPT2 | dict(vocab_size=TOK.n_vocab, context=400, n_layer=1))
    checkpoint.save(model, path, files={"tokenizer.json": TOK.to_json().encode()})
    return path


def says(text):
    """For Engine._choose: a text is written in every row, whatever the model says."""
    ids = [*TOK.encode(text), TOK.eot]
    return lambda engine, rows, logits, n: [(ids[min(len(row.tokens), len(ids) - 1)], 0.0, [0.0]) for _, row in rows]


def run(capsys, monkeypatch, folder, answer, *more):
    monkeypatch.setattr(sample.Engine, "_choose", says(answer))
    flags = ["--assistant", "--prompt", "What is up?", "--max-tokens", 60, *more]
    code = command.main(["sample", "--checkpoint", str(folder), *map(str, flags)])
    return code, *capsys.readouterr()


ANSWER = " The sky.\nIt is blue. \n\nPerson: And what is down?\nAssistant: The floor."


def test_the_answer_alone_is_printed(folder, capsys, monkeypatch):
    assert run(capsys, monkeypatch, folder, ANSWER) == (0, "The sky.\nIt is blue.\n", "")
    assert run(capsys, monkeypatch, folder, " Up.\nAssistant: Up.") == (0, "Up.\n", "")
    assert run(capsys, monkeypatch, folder, " Up.") == (0, "Up.\n", "")  # the end-of-text token ends it too
    code, out, _ = run(capsys, monkeypatch, folder, ANSWER, "--n", 2)
    assert code == 0 and out == "--- 1 of 2 ---\nThe sky.\nIt is blue.\n\n--- 2 of 2 ---\nThe sky.\nIt is blue.\n"


def test_json_has_question_and_answer(folder, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, folder, ANSWER, "--json")
    found = json.loads(out)
    assert code == 0 and (found["prompt"], found["text"]) == ("What is up?", "The sky.\nIt is blue.")
    assert found["finish"] == "stop" and TOK.decode(found["ids"]).startswith(" The sky.")


def test_a_stop_string_of_the_user_ends_it_too(folder, capsys, monkeypatch):
    assert run(capsys, monkeypatch, folder, ANSWER, "--stop", "It")[1] == "The sky.\n"


def test_the_model_reads_the_template(folder, capsys, monkeypatch):
    read = []
    real = sample.Engine.add
    monkeypatch.setattr(
        sample.Engine, "add", lambda self, prompt, *a, **k: read.append(prompt) or real(self, prompt, *a, **k)
    )
    run(capsys, monkeypatch, folder, " x")
    assert TOK.decode(read[0]) == template("What is up?")[0]


def test_a_question_must_be_asked(folder, capsys):
    assert command.main(["sample", "--checkpoint", str(folder), "--assistant"]) == 2
    assert capsys.readouterr().err == "barelm: --prompt: with --assistant it must be a question\n"
