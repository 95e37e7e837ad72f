"""Small files of tasks in every form that barelm reads, written with none of its code."""

import bz2
import gzip
import io
import json
import tarfile


def hellaswag(items):
    """items: (context, gold, four endings)."""
    return "".join("\n".join([context, str(gold), *endings]) + "\n" for context, gold, endings in items).encode()


def olmo_lines(items, task="quiz", unconditional=True):
    """items: (context, gold, choices); a list of the objects, one for each choice."""
    lines = []
    for offset in (0, 1_000_000) if unconditional else (0,):
        for number, (context, gold, choices) in enumerate(items):
            for idx, choice in enumerate(choices):
                request = {"context": "Answer:" if offset else context, "continuation": " " + choice}
                line = {"request_type": "loglikelihood", "doc": {"gold": gold}, "request": request, "idx": idx}
                lines.append(line | {"task_name": task, "doc_id": offset + number, "label": gold})
    return lines


def olmo(items, **options):
    return "".join(json.dumps(line) + "\n" for line in olmo_lines(items, **options)).encode()


def tar(files):
    """files: {name: content or a TarInfo without one}"""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def mmlu(subjects):
    """subjects: {name: (examples, questions)}, each a list of (question, four choices, letter)."""

    def csv(rows):
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in (q, *cs, letter)) for q, cs, letter in rows]
        return ("\n".join(quoted) + "\n").encode()

    files = {"data/mmlu/README.txt": b"examples and questions"}
    for name, (examples, questions) in subjects.items():
        files[f"data/mmlu/dev/{name}_dev.csv"] = csv(examples)
        files[f"data/mmlu/val/{name}_val.csv"] = csv(questions)
    return tar(files)


PACKERS = {"plain": bytes, "gzip": gzip.compress, "bzip2": bz2.compress}
SWAG = [
    (f"A man {i} walks. he", i % 4, [f"sits down {i}.", "runs away from it.", "sings.", "is a tree."]) for i in range(7)
]
QUIZ = [
    ("Question: what is up?\nAnswer:", 1, ["down", "sky", "the floor"]),
    ("Question: and é?\nAnswer:", 0, ["éé", "b"]),
    ("", 4, ["a", "b", "c", "d", "e"]),
]
FOUR = ["one", "two, or so", 'a "third"', "4"]
EXAMPLES = [(f"Example {i}?", FOUR, "ABCD"[i % 4]) for i in range(6)]
SUBJECTS = {
    "world_history": (EXAMPLES, [("When?\nThen.", FOUR, "D"), (" Who? ", FOUR, "A")]),
    "anatomy": (EXAMPLES[::-1], [("Where?", FOUR, "B")]),
}
