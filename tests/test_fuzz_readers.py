"""Changed files: every reader reads them or refuses them, by name, and takes no memory for what they claim to hold.

fuzz_readers.py does the same by the million.
"""

import json

import numpy as np
import pytest
from barelm.convert import gguf_file
from formats import NAMES, dumped, rewritten_gguf
from fuzz_readers import Fuzzer, mutated, peak_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore:config.json")  # dropout that is ignored
ROOM = 4 << 20  # bytes that reading may take beyond the size of the file: parts, names, the vocabulary
fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    fuzzer = Fuzzer(tmp_path_factory.mktemp("fuzz"))
    assert list(fuzzer.files) == NAMES
    return fuzzer


@pytest.mark.parametrize("name", NAMES)
@fuzz
@given(rng=st.randoms(use_true_random=False))
def test_a_changed_file_is_read_or_refused(fuzzer, name, rng):
    fuzzer.attempt(name, mutated(fuzzer.valid[name], rng))


@pytest.mark.parametrize("name", NAMES)
@settings(fuzz, max_examples=40)
@given(rng=st.randoms(use_true_random=False))
def test_a_changed_file_takes_no_more_memory_than_it_has(fuzzer, name, rng):
    data = mutated(fuzzer.valid[name], rng)
    assert peak_of(lambda: fuzzer.attempt(name, data)) < len(data) + ROOM


@pytest.mark.parametrize("name", NAMES)
def test_both_happen(fuzzer, name):
    """Changes that everything survives, or nothing does, would say little."""
    results = [fuzzer.attempt(name, fuzzer.change(name, seed)) for seed in range(300)]
    assert results.count("refused") > 50 and "read" in results


@pytest.mark.parametrize("name", NAMES)
def test_any_cut_is_read_or_refused(fuzzer, name):
    data = fuzzer.valid[name]
    for n in range(0, len(data), max(1, len(data) // 80)):
        whole = name == "tokenizer.bin" or not data[n:].strip(b"\0\n")  # pieces, or padding alone, may be left out
        assert fuzzer.attempt(name, data[:n]) == "refused" or whole


LONG = {  # what the fuzzer found: texts of any length that came to the file system, or into a message
    "a base's name is no file's": ("adapter_config.json", b'path": "', b'path": "' + b"a" * 300),
    "a base's name fills the screen": ("adapter_config.json", b'path": "', b'path": "' + b"a/" * 500),
    "a shard's name is no file's": ("index", b'"model-00001', b'"' + b"a" * 700 + b"model-00001"),
    "a field fills the screen": ("config.json", b'"rope_type": "', b'"rope_type": "' + b"a" * 900),
}


@pytest.mark.parametrize("what", LONG)
def test_long_texts_are_refused_in_few_words(fuzzer, what):
    name, old, new = LONG[what]
    assert old in fuzzer.valid[name]
    assert fuzzer.attempt(name, fuzzer.valid[name].replace(old, new)) == "refused"


ENDLESS = {"a text": "\x7f" * 400, "a number": 10**4000, "a list": ["\x7f"] * 400, "an object": {"\x7f" * 400: 1}}


def with_each_replaced(value, new):
    """What is in a description, again and again with another value, or another name, in one place of it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            others = {k: v for k, v in value.items() if k != key}
            yield from ({**others, key: changed} for changed in with_each_replaced(inner, new))
            if isinstance(new, str):
                yield {**others, new: inner}
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from ([*value[:i], changed, *value[i + 1 :]] for changed in with_each_replaced(inner, new))
    yield new


@pytest.mark.parametrize("what", ENDLESS)
@pytest.mark.parametrize(
    "name", ["index", "config.json", "adapter_config.json", "tokenizer.json", "tokenizer.json: BPE"]
)
def test_whatever_is_endless_is_refused_in_few_words(fuzzer, name, what):
    described = json.loads(fuzzer.valid[name])
    changed = list(with_each_replaced(described, ENDLESS[what]))
    results = [fuzzer.attempt(name, dumped(other)) for other in changed[:: max(1, len(changed) // 150)]]
    assert "refused" in results


@pytest.mark.parametrize("name", [name for name in NAMES if ".gguf" in name])
def test_endless_values_of_gguf_are_refused_in_few_words(fuzzer, name):
    values = gguf_file.read(fuzzer.files[name]).values
    results = [
        fuzzer.attempt(name, rewritten_gguf(fuzzer.files[name], {key: new}))
        for new in ("\x7f" * 400, ["\x7f" * 400] * 2, np.full(400, 1.5))
        for key in values
    ]
    assert "refused" in results


def test_a_warning_quotes_in_few_words(fuzzer):
    described = json.loads(fuzzer.valid["config.json"]) | {"\x1b" * 900 + "_pdrop": 0.5}
    with pytest.warns(UserWarning, match="there is no dropout") as told:
        assert fuzzer.attempt("config.json", dumped(described)) == "read"
    says = str(told[0].message)
    assert len(says) < 600 and says.isprintable()
