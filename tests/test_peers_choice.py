"""Multiple-choice scores beside an independent computation with transformers: its own tokenizer, one sequence at a
time, log_softmax in float64, and a reading of the files that shares no line with ours.

Tolerance: both compute logits in fp32; those of the largest magnitude here (about 20) have units of 2e-6 in the last
place, a log-probability some of them, and a sum of up to 126 tokens grows like a random walk.  The sums, of 5 to 842
nats, have differed by up to 8e-5; SUM allows for six times that.  A token too many or too few moves a sum by nats.  The
two best choices of an item are never nearer to each other than 6e-3, or 1.3e-3 per character, so that they must be the
same ones.
"""

import bz2
import gzip
import json

import numpy as np
import pytest
from barelm import Model, Tokenizer, checkpoint
from barelm.choice import right, score
from barelm.convert import llama2c
from barelm.tasks import read_task
from models import random_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peers

N = 200
SUM = 5e-4  # nats


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    """The models are so small that threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["stories260K", "random"])
def folder(request, test_data, tmp_path):
    """A checkpoint with its tokenizer: a trained Llama with a SentencePiece vocabulary, a random GPT-2 with merges."""
    path = tmp_path / "model"
    if request.param == "stories260K":
        source = llama2c.read(test_data / "ckpt" / "stories260K.bin")
        tok = Tokenizer.load(test_data / "ckpt" / "tok512.bin")
        checkpoint.write(source, path, files={"tokenizer.json": tok.to_json().encode()})
    else:
        story = (test_data / "text" / "tinystories_2MB.txt").read_text()[:50_000]
        tok = Tokenizer.train([story], 600, "gpt2")
        config = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=tok.n_vocab, context=512)
        checkpoint.save(random_model(config), path, files={"tokenizer.json": tok.to_json().encode()})
    return path


def their_hellaswag(folder):
    """[(context, continuations, gold)]"""
    with bz2.open(folder / "hellaswag_val_full.txt.bz2", "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n") for _, line in zip(range(6 * N), file, strict=False)]
    return [(lines[i], [" " + line for line in lines[i + 2 : i + 6]], int(lines[i + 1])) for i in range(0, 6 * N, 6)]


def their_arc(folder):
    with gzip.open(folder / "olmo_arc_easy_rc_0shot.jsonl.gz", "rt", encoding="utf-8") as file:
        documents = {}
        for line in map(json.loads, file):
            if line["request"]["context"] != "Answer:":
                documents[line["native_id"]] = line["doc"]
    return [(d["query"], [" " + choice for choice in d["choices"]], d["gold"]) for d in list(documents.values())[:N]]


class Theirs:
    """Sums of continuations by transformers."""

    def __init__(self, folder):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self.tok = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        special = self.tok.backend_tokenizer.get_added_tokens_decoder()
        names = {token.content: id for id, token in special.items()}
        self.first = names.get("<s>", names.get("<|endoftext|>"))

    def ids(self, text):
        return self.tok(text, add_special_tokens=False).input_ids

    def sum(self, context, continuation):
        n = len(self.ids(context))  # no context here ends with a space
        whole = [self.first, *self.ids(context + continuation)]
        with torch.inference_mode():
            logits = self.model(torch.tensor([whole]), use_cache=False).logits[0, n:-1].double()
            logprobs = torch.log_softmax(logits, -1)
        return float(logprobs.gather(1, torch.tensor(whole[n + 1 :])[:, None]).sum())


@pytest.mark.parametrize(
    "name, reader", [("hellaswag_val_full.txt.bz2", their_hellaswag), ("olmo_arc_easy_rc_0shot.jsonl.gz", their_arc)]
)
def test_sums_and_choices_are_those_of_transformers(folder, test_data, name, reader):
    task, theirs = read_task(str(test_data / "eval" / name)), Theirs(folder)
    records = score(Model.load(folder), Tokenizer.load(folder), task.items[:N])
    want = [
        ([theirs.sum(context, text) for text in texts], texts, gold)
        for context, texts, gold in reader(test_data / "eval")
    ]
    assert len(records) == len(want) == N
    hits = np.zeros((2, 2), int)  # ours and theirs, acc and acc_norm
    for record, (sums, texts, gold) in zip(records, want, strict=True):
        assert record["gold"] == gold
        np.testing.assert_allclose(record["logprobs"], sums, rtol=0, atol=SUM)
        for i, divisors in enumerate([[1] * len(texts), [len(text) - 1 for text in texts]]):
            values = np.array(sums) / divisors
            chosen = int(values.argmax())
            ours = np.array(record["logprobs"]) / divisors
            assert int(ours.argmax()) == chosen
            hits[:, i] += right(record, ("acc", "acc_norm")[i]), chosen == gold
    assert (hits[0] == hits[1]).all()
