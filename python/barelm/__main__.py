"""The command line: `barelm COMMAND --flag value`, where a command is one word or two (`tokenizer train`).

One table of commands; each is `main(config)` of one module, and its flags are the fields of its config.  A command's
module is imported when it is called, so that help comes at once.
"""

import argparse
import dataclasses
import difflib
import importlib
import os
import sys
import typing
from typing import Any, NamedTuple, NoReturn

__all__ = ["main", "parse"]


class Command(NamedTuple):
    module: str  # it has main(config)
    config: str  # the name of the config's class in it
    what: str


COMMANDS = {
    "demo": Command(
        "demo", "DemoConfig", "minutes, offline: train a small model on Python's own library, let it write"
    ),
    "data": Command(
        "prepare", "PrepareConfig", "look at text: documents, tokens, what is refused; make token shards of it"
    ),
    "tokenizer train": Command("vocabulary.train", "TrainConfig", "learn a vocabulary from text"),
    "tokenizer encode": Command("vocabulary.encode", "EncodeConfig", "the ids of a text"),
    "tokenizer show": Command("vocabulary.show", "ShowConfig", "the tokens of a text, in colour"),
    "tokenizer compare": Command("vocabulary.compare", "CompareConfig", "how well tokenizers compress texts"),
    "train": Command("train", "TrainConfig", "train a model on your text"),
    "eval": Command(
        "evaluate",
        "EvalConfig",
        "score a text under a trained model, in bits per byte; or tasks, recall, learning in context",
    ),
    "plan": Command("plan", "PlanConfig", "what a run will take, before it starts: memory, time, money"),
    "sample": Command("sample", "SampleConfig", "let a trained model continue a prompt"),
    "import": Command("importing", "ImportConfig", "make a checkpoint of another project's model"),
    "export": Command("exporting", "ExportConfig", "write a checkpoint for transformers, llama.cpp or llm.c"),
    "doctor": Command("doctor", "DoctorConfig", "what was built, what this machine has, what is missing"),
}
USAGE, FAILED, INTERRUPTED = 2, 1, 130  # exit codes; 0: all is well


class UsageError(ValueError):
    """What was typed cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.  A mistake of the user is one line; BARELM_DEBUG=1 shows its origin."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, ImportError, ArithmeticError, MemoryError, KeyboardInterrupt) as error:
        if os.environ.get("BARELM_DEBUG"):
            raise
        return _explain(error)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"barelm {_version()}")
        return 0
    name, argv = _command(argv)
    module = importlib.import_module(f"barelm.{COMMANDS[name].module}")
    config = parse(getattr(module, COMMANDS[name].config), argv, f"barelm {name}")
    return 0 if config is None else module.main(config)


def _command(argv: list[str]) -> tuple[str, list[str]]:
    """The command that argv begins with, and what follows it."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, argv[words:]
    group = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
    if not group:
        names = COMMANDS.keys() | {name.split()[0] for name in COMMANDS}
        raise UsageError(f"unknown command '{argv[0]}'{_nearest(argv[0], names)}; barelm --help lists them")
    if len(argv) == 1 or argv[1].startswith("-"):
        raise UsageError(f"'{argv[0]}' is not a whole command: {', '.join(group)}")
    name = " ".join(argv[:2])
    raise UsageError(f"unknown command '{name}'{_nearest(name, group)}; barelm --help lists them")


def _explain(error: BaseException) -> int:
    """The line on standard error, and the exit code."""
    if isinstance(error, BrokenPipeError):  # who read our output has gone: not worth a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    if isinstance(error, KeyboardInterrupt):
        print("barelm: interrupted", file=sys.stderr)
        return INTERRUPTED
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    print(f"barelm: {text}", file=sys.stderr)
    return USAGE if isinstance(error, ValueError | OSError) else FAILED


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}   {command.what}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "barelm: language models on bare metal, from text to a model that writes",
            "",
            "usage: barelm COMMAND [--flag value ...]",
            "",
            *lines,
            "",
            "barelm COMMAND --help lists the flags of a command; barelm --version prints the version.",
        ]
    )


def _version() -> str:
    from . import _core

    return _core.version()


def _nearest(name: str, names: typing.Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean '{found[0]}'?" if found else ""


# ---- a config from flags ------------------------------------------------------------------------------------------


def parse(cls: type, argv: list[str], prog: str = "barelm") -> Any:
    """An instance of a dataclass from its flags; None where only help was asked for.

    --field-name value for each field, --x and --no-x for a bool; the type and the words of the help are the field's
    annotation, Annotated[type, "help"].  A field without default must be given.  Those that the class lists as
    `positional` are words without a flag, in that order.  Where the class has a field `given`, it gets the names of the
    flags that were there.  UsageError: anything else.
    """
    words = getattr(cls, "positional", ())
    parser = _Parser(
        prog=prog,
        description=cls.__doc__,
        usage=" ".join([prog, *map(str.upper, words), "[--flag value ...]"]),
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawTextHelpFormatter(prog, max_help_position=30, width=120),
    )
    group = parser.add_argument_group("flags")
    for field, hint in _flags(cls):
        if field.name in words:
            parser.add_argument(field.name, nargs="?", metavar=field.name.upper(), help=typing.get_args(hint)[1])
        else:
            _add(group, field, hint)
    group.add_argument("-h", "--help", action="store_true", help="this text")
    given, extra = parser.parse_known_args(argv)
    given = vars(given)
    if given.pop("help", False):
        print(parser.format_help(), end="")
        return None
    if extra:
        raise UsageError(_unknown(extra[0], parser, prog))
    missing = [field.name for field, _ in _flags(cls) if _required(field) and field.name not in given]
    if missing:
        name = missing[0].upper() if missing[0] in words else _flag(missing[0])
        raise UsageError(f"{name} must be given; {prog} --help lists the flags")
    config = cls(**given)
    if any(field.name == "given" for field in dataclasses.fields(cls)):
        config.given = frozenset(given)
    return config


def _flags(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init]


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add(group, field: dataclasses.Field, hint: Any) -> None:
    kind, words = typing.get_args(hint)[:2]
    silent = _required(field) or field.default == "" or kind is bool
    default = "" if silent else f" ({field.default})"
    words = (words + default).replace("%", "%%")
    if kind is bool:
        group.add_argument(_flag(field.name), action=argparse.BooleanOptionalAction, help=words)
    elif typing.get_origin(kind) is typing.Literal:
        group.add_argument(_flag(field.name), choices=typing.get_args(kind), help=words)
    else:
        group.add_argument(_flag(field.name), type=_reader(kind), metavar=_METAVAR[kind], help=words)


_METAVAR = {int: "N", float: "X", str: "TEXT"}


def _reader(kind: type) -> typing.Callable[[str], Any]:
    """How a flag reads its value; argparse puts the name of the flag before what we raise."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            names = {int: "a whole number", float: "a number"}
            raise argparse.ArgumentTypeError(f"'{text}' is not {names[kind]}") from None

    return read


def _unknown(word: str, parser: argparse.ArgumentParser, prog: str) -> str:
    if not word.startswith("-"):
        return f"'{word}' stands alone: every value follows its flag; {prog} --help lists them"
    names = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    word = word.split("=")[0]
    return f"unknown flag '{word}'{_nearest(word, names)}; {prog} --help lists them"


if __name__ == "__main__":
    sys.exit(main())
