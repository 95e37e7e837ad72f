"""barelm beside tokenizers: the same ids from the same tokenizer.json, on two megabytes of everything."""

import inspect
import json
import random
import tarfile

import numpy as np
import pytest
from barelm import Tokenizer
from barelm.merges import ways
from test_tokenizer import EOT, load_gpt2, load_llama3, small_bpe

tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.peers

FILES = ["wiki_demo.txt", "tinystories_2MB.txt", "c4_demo.jsonl", "tinyshakespeare.txt"]
STRANGE = [
    *map(chr, range(33)),  # control characters, some of which are white space
    *"\x7f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000",  # more white space
    *"\u200b\u200d\u202e\ufeff\ufffd\U000e0001\U0010ffff",  # formats and no characters
    *["\r\n", "\n\n", "  ", "    ", " ", "\n"],
    *["🦙", "👩‍👩‍👧‍👦", "🇩🇪", "e\u0301", "\u0301", "\u017f", "\u212a", "\u0130", "ß", "\u01c5", "\u02b0", "東京", "กำ"],
    *["\u2167", "½", "\u0663", "\u0967\u0968\u0969", "²", "\U0001d7d8", "12345", "1"],
    *["'s", "'S", "'\u017f", "'ll", "'LL", "'vE", "'re", "'", "\u2019s", ".", "...", "=====", "a", "Hello", " the"],
]


def pages(folder):
    """Web pages in several languages, as HTML."""
    with tarfile.open(folder / "web" / "trafilatura_eval_50.tar.gz") as tar:
        return [tar.extractfile(member).read().decode("utf-8", "replace") for member in tar if member.isfile()]


def mixed(folder):
    """Two megabytes: English, code, every language of the declaration of human rights, markup, and what is strange."""
    rights = (folder / "web" / "udhr.json").read_text(encoding="utf-8")
    return [
        *((folder / "text" / name).read_text(encoding="utf-8")[:300_000] for name in FILES),
        *(path.read_text(encoding="utf-8") for path in sorted((folder / "tok" / "cs336").iterdir())),
        rights,
        json.dumps(json.loads(rights), ensure_ascii=False, indent=8)[:200_000],
        "".join(pages(folder))[:500_000],
        inspect.getsource(inspect),
        "".join(random.Random(0).choices(STRANGE, k=100_000)),
    ]


def every_way(tok):
    """The form of Llama-3 in circulation, which lists every merge of two tokens to a third."""
    file = json.loads(tok.to_json())
    chars = {tok.token_bytes(id): text for text, id in file["model"]["vocab"].items()}
    pairs = [pair for token in tok._vocab for pair in ways(token, tok._vocab)]
    file["model"]["merges"] = [[chars[left], chars[right]] for left, right in pairs]
    return json.dumps(file)


def tokenizer_json(name, folder):
    if name == "gpt2":
        return load_gpt2(folder / "tok" / "gpt2_vocab.bpe", folder / "tok" / "gpt2_encoder.json").to_json()
    if name.startswith("llama3"):
        tok = load_llama3(folder / "tok" / "llama3_tokenizer.model")
        return every_way(tok) if "every way" in name else tok.to_json()
    documents = [(folder / "text" / file).read_bytes()[:300_000] for file in FILES[:2]]
    documents.append((folder / "web" / "udhr.json").read_bytes())
    return Tokenizer.train(documents, 3000, pattern=name.split()[1], special=(EOT, "<|a|>")).to_json()


def load(text, folder):
    """(ours, theirs)"""
    path = folder / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    return Tokenizer.load(path), tokenizers.Tokenizer.from_file(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama3, every way", "trained: gpt2", "trained: gpt4"])
def test_two_megabytes_of_everything_have_the_same_ids(name, test_data, tmp_path):
    ours, theirs = load(tokenizer_json(name, test_data), tmp_path)
    texts = mixed(test_data)
    assert sum(len(text.encode()) for text in texts) > 2_000_000
    for text, ids in zip(texts, ours.encode_batch(texts, special=True), strict=True):  # as theirs always are
        np.testing.assert_array_equal(ids, theirs.encode(text, add_special_tokens=False).ids, err_msg=text[:100])


TAILS = [
    "",
    " ",
    "  ",
    "\n",
    " \n",
    "\n ",
    "\n  ",
    " \n ",
    "\r\n\r\n",
    "\t\n\t",
    "\x85 ",
    "\x1c",
    " \x1c ",
    "\u3000\n\u3000",
]


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_white_space_at_the_end_and_alone(name, test_data, tmp_path):
    ours, theirs = load(tokenizer_json(name, test_data), tmp_path)
    for text in (head + tail for head in ("", "a", "1", ".", "a ") for tail in TAILS):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


def test_merges_that_never_come_about_are_passed_over(tmp_path):
    """lo + r is out of reach: o + r happens first."""
    file = json.loads(small_bpe().to_json())
    file["model"]["vocab"] |= {"or": 900, "lo": 901, "lor": 902}
    file["model"]["merges"] += ["o r", "l o", "lo r"]
    ours, theirs = load(json.dumps(file), tmp_path)
    for text in ("lor", "lo", "hello lor or lo", "hellor"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids and 902 not in ids
