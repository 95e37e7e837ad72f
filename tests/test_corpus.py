"""Corpus: what is read, how it is split, and that batches depend on (seed, step, micro) alone."""

import math
import os

import numpy as np
import pytest
from barelm import Tokenizer
from barelm.data.corpus import Corpus, TokenData, read_documents
from barelm.evaluate import evaluate


def token_data(*texts):
    return TokenData.encode([(str(i), text) for i, text in enumerate(texts)], Tokenizer.bytes())


def test_a_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("hé")
    corpus = read_documents(tmp_path / "a.txt")
    assert corpus.documents == [("a.txt", "hé")] and corpus.n_bytes == 3


def test_a_folder_is_read_recursively_sorted_and_without_what_is_no_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, data in {
        "z.txt": b"z",
        "b/a.md": b"a",
        ".hidden/x": b"x",
        ".dot": b"d",
        "image": b"\0\1",
        "empty": b"",
        "latin1.txt": b"caf\xe9",
    }.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    corpus = read_documents(tmp_path)
    assert corpus.documents == [("b/a.md", "a"), ("latin1.txt", "caf\ufffd"), ("z.txt", "z")]
    assert (corpus.repaired, corpus.skipped) == (1, 2)


def test_the_standard_library_is_the_default():
    corpus = read_documents()
    names = [name for name, _ in corpus]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert corpus.n_bytes > 2e6
    assert corpus.hash() == read_documents().hash()


def test_the_hash_sees_names_texts_and_where_one_ends():
    hashes = {
        Corpus(documents, "").hash()
        for documents in ([("a", "bc")], [("ab", "c")], [("a", "bc"), ("", "")], [("a", "bd")], [("a", "b"), ("c", "")])
    }
    assert len(hashes) == 5


def test_what_holds_no_text_is_an_error(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="no text here"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="no text here"):
        read_documents(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_documents(tmp_path / "nowhere")


def test_one_document_gives_its_last_tenth_to_validation():
    train, validation = Corpus([("a", "0123456789" * 10)], "").split()
    assert (len(train[0][1]), len(validation[0][1])) == (90, 10)


def test_several_documents_give_a_tenth_that_does_not_depend_on_their_order():
    documents = [(f"{i}.txt", str(i)) for i in range(50)]
    train, validation = Corpus(documents, "").split()
    assert len(validation) == 5 and sorted(train + validation) == sorted(documents)
    assert sorted(Corpus(documents[::-1], "").split()[1]) == sorted(validation)
    assert len(Corpus(documents[:2], "").split()[1]) == 1


def test_each_document_begins_with_the_end_of_text_token():
    assert token_data("ab", "", "c").tokens.tolist() == [256, 97, 98, 256, 256, 99]
    assert token_data("ab").tokens.dtype == np.int32


def test_targets_are_the_tokens_one_later():
    data = token_data("the quick brown fox" * 10)
    tokens, targets = data.batch(step=0, micro=0, B=5, T=7)
    assert tokens.dtype == targets.dtype == np.int32 and tokens.shape == targets.shape == (5, 7)
    assert tokens.flags.c_contiguous and targets.flags.c_contiguous
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    text = "".join(map(chr, data.tokens))
    for row, last in zip(tokens, targets[:, -1], strict=True):
        assert "".join(map(chr, [*row, last])) in text


def test_a_batch_depends_on_seed_step_and_micro_alone():
    data = token_data("".join(map(str, range(5000))))
    first = data.batch(3, 1, 4, 16, seed=7)
    data.batch(0, 0, 4, 16)
    np.testing.assert_array_equal(first, data.batch(3, 1, 4, 16, seed=7))
    for other in ((4, 1, 7), (3, 0, 7), (3, 1, 8)):
        assert not np.array_equal(first, data.batch(*other[:2], 4, 16, seed=other[2]))


def test_every_window_is_drawn_the_first_and_the_last_too():
    data = token_data("abcdefg")  # 8 tokens, windows of 3: 5 places
    starts = {int(row[0]) for step in range(40) for row in data.batch(step, 0, 4, 3)[0]}
    assert starts == {256, 97, 98, 99, 100}


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(ValueError, match="context: a window of 8 needs 9 tokens, the data has only 3"):
        token_data("ab").batch(0, 0, 1, 8)
    assert token_data("ab").batch(0, 0, 1, 2)[1].tolist() == [[97, 98]]


@pytest.mark.parametrize("B, T", [(1, 1), (2, 4), (3, 7), (8, 64)])
def test_validation_windows_hold_every_token_but_the_first_once(B, T):
    data = token_data("héllo", "wörld, how are you")
    seen, size = [], 0
    for tokens, targets, n_bytes in data.windows(B, T):
        assert tokens.shape == targets.shape and tokens.shape[1] == T and tokens.shape[0] <= B
        flat = targets[targets >= 0]
        start = 1 + len(seen)
        np.testing.assert_array_equal(tokens[targets >= 0], data.tokens[start - 1 : start - 1 + len(flat)])
        seen += flat.tolist()
        size += n_bytes
    assert seen == data.tokens[1:].tolist()
    assert size == len("héllowörld, how are you".encode())
    assert len(list(data.windows(1, 1, batches=3))) == 3


def test_a_uniform_model_needs_as_many_bits_as_its_vocabulary_says():
    class Uniform:
        def forward(self, tokens, targets):
            return np.where(targets < 0, 0, -math.log(257)).astype(np.float32)

    text = "x" * 1000
    result = evaluate(Uniform(), token_data(text), B=4, T=32)
    assert result.tokens == 1000 and result.n_bytes == 1000
    assert result.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)  # float32 log-probabilities
    assert result.loss == pytest.approx(math.log(257), rel=1e-6)
