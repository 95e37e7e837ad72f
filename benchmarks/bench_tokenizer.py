"""python benchmarks/bench_tokenizer.py  -- training a vocabulary beside Hugging Face's tokenizers: the same documents,
split pattern, size of vocabulary, least count of a pair and number of threads, one after the other in each round."""

import argparse
import json
import os
import time
from pathlib import Path

import machine
import numpy as np
from barelm import Tokenizer, _core
from barelm.data.documents import Documents
from barelm.tokenizer import EOT, GPT4_PATTERN

HEADER = ("documents", "MB", "vocabulary", "trainer", "s", "MB/s", "x tokenizers", "spread %", "runs", "bytes a token")
WORKLOADS = ((1, 4096), (1, 32768), (8, 4096))  # how often the documents come, vocabulary
SAMPLE = 20  # every 20th document is encoded
PAUSE = 0.1  # seconds: threads that wait for work by spinning have gone to sleep by then


def train_barelm(documents, vocab_size):
    """A function that encodes."""
    return Tokenizer.train(documents, vocab_size).encode


def train_tokenizers(documents, vocab_size):
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    theirs = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(GPT4_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(documents, trainer)
    return lambda text: theirs.encode(text).ids


TRAINERS = {"barelm": train_barelm, "tokenizers": train_tokenizers}


def race(documents, vocab_size, rounds):
    """{trainer: (seconds of each run, bytes a token)}.  They differ in which of two equally frequent pairs goes first,
    and so hardly in how well they pack text: one that does other work is an error, not a row of the table."""
    seconds, packing = {name: [] for name in TRAINERS}, {}
    sample = documents[::SAMPLE]
    for _ in range(rounds):
        for name, train in TRAINERS.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            encode = train(documents, vocab_size)
            seconds[name].append(time.perf_counter() - start)
            if name not in packing:
                packing[name] = sum(len(text.encode()) for text in sample) / sum(len(encode(text)) for text in sample)
    if not np.allclose(packing["barelm"], packing["tokenizers"], rtol=5e-3):
        raise RuntimeError(f"bytes a token: {packing}")
    return {name: (seconds[name], packing[name]) for name in TRAINERS}


def results(source, times, documents, vocab_size, rounds):
    size = sum(len(text.encode()) for text in documents)
    found = race(documents, vocab_size, rounds)
    for name, (seconds, packing) in found.items():
        low, median, high = (float(q) for q in np.quantile(seconds, [0.25, 0.5, 0.75]))
        yield {
            "documents": source if times == 1 else f"{source}, {times} times",
            "bytes": size,
            "vocabulary": vocab_size,
            "trainer": name,
            "seconds": seconds,
            "median": median,
            "spread": (high - low) / median,
            "rate": size / median,
            "ratio": float(np.median(np.array(found["tokenizers"][0]) / seconds)),
            "bytes_a_token": packing,
        }


def row(r):
    return (
        r["documents"],
        f"{r['bytes'] / 1e6:.1f}",
        str(r["vocabulary"]),
        r["trainer"],
        f"{r['median']:.3f}",
        f"{r['rate'] / 1e6:.1f}",
        f"{r['ratio']:.1f}",
        f"{100 * r['spread']:.0f}",
        str(len(r["seconds"])),
        f"{r['bytes_a_token']:.3f}",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("  -- ")[2])
    parser.add_argument("--data", metavar="PATH", help="a text or a folder of them (default: the standard library)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of the first workload")
    parser.add_argument("--rounds", type=int, help="runs of each (default 9)")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON, every time included")
    options = parser.parse_args()
    os.environ |= {"RAYON_NUM_THREADS": str(_core.threads_get()), "TOKENIZERS_PARALLELISM": "true"}
    corpus = Documents(options.data)
    documents = [document.data.decode(errors="replace") for document in corpus]  # they take only str
    about = machine.describe() | {"tokenizers": machine.version("tokenizers")}
    machine.show(about)
    print(f"- tokenizers {about['tokenizers']}")
    print("\n| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    found = []
    for times, vocab_size in WORKLOADS[: 1 if options.quick else None]:
        rounds = options.rounds or (3 if options.quick else 9)
        for r in results(corpus.source, times, documents * times, vocab_size, rounds):
            found.append(r)
            print("| " + " | ".join(row(r)) + " |", flush=True)
    after = machine.load_average()
    print(f"\nLoad average {about['load_average']} before, {after} after.")
    if options.json:
        everything = {"machine": about | {"load_average_after": after}, "corpus": corpus.counts.hash, "results": found}
        Path(options.json).write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
