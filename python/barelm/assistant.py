"""An assistant by prompt alone: a transcript that an answer continues, for a model that knows no more than text."""

from collections.abc import Iterable, Iterator

__all__ = ["template", "trimmed"]

PERSON, ASSISTANT = "Person:", "Assistant:"
HEAD = "A conversation. The assistant gives short and correct answers to a person's questions.\n"
TURNS = (
    ("What do bees make?", "Bees make honey."),
    ("How many days does a week have?", "A week has seven days."),
    ("Name three colours.", "Red, green and blue."),
)


def template(question: str) -> tuple[str, tuple[str, ...]]:
    """(prompt, stops): a text that an answer to the question continues, and the strings before which the answer ends,
    for then the next turn begins.  ValueError: there is no question."""
    if not question.strip():
        raise ValueError("there is no question")
    turns = "".join(f"\n{PERSON} {asked}\n{ASSISTANT} {answer}\n" for asked, answer in TURNS)
    return f"{HEAD}{turns}\n{PERSON} {question.strip()}\n{ASSISTANT}", (f"\n{PERSON}", f"\n{ASSISTANT}")


def trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text as they come, without the white space before and behind it."""
    held, begun = "", False
    for piece in pieces:
        text = held + piece if begun else (held + piece).lstrip()
        body = text.rstrip()
        held, begun = text[len(body) :], begun or bool(body)
        if body:
            yield body
