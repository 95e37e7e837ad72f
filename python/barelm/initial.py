"""What `barelm train --init` begins with: a model that has learnt already, and its vocabulary.

Weights and vocabulary are taken, AdamW's moments are not: those of an earlier run belong to another text and another
learning rate, and a model of others comes without.  So the run begins at step 0.
"""

import hashlib

import numpy as np

from . import checkpoint
from .convert.source import Source
from .lora import Lora
from .model import Model
from .tokenizer import Tokenizer

__all__ = ["begun_with", "check_unchanged", "make", "vocabulary"]


def vocabulary(source: Source, asked: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a run on this model; `asked`: that of --tokenizer.

    ValueError: there is none, there are two, it has ids that the model lacks, or the folder's cannot be read.
    """
    try:
        own = source.tokenizer
    except ValueError as error:
        raise ValueError(f"{error}; `barelm import` makes a checkpoint with another tokenizer") from None
    if own is None and asked is None:
        raise ValueError(f"--tokenizer: must be given, for {source.path} has none")
    if own is not None and asked is not None and own.hash() != asked.hash():
        raise ValueError(f"--tokenizer: {source.path} has another ({own!r} instead of {asked!r}); leave the flag out")
    tok, V = own or asked, source.config.vocab_size
    if tok.n_vocab > V:
        raise ValueError(f"--tokenizer: its ids go up to {tok.n_vocab - 1}, the vocabulary of {source.path} has {V}")
    return tok


def make(source: Source, lora: Lora | None = None, seed: int = 0, **options) -> Model:
    """The model, read to be trained; with `lora` an adapter on it, drawn by the seed.  options: those of Model.empty.

    ValueError: the adapter could not find its model again, or the model has no such module.
    """
    if lora and (not checkpoint.is_checkpoint(source.path) or checkpoint.is_adapter(source.path)):
        raise ValueError(
            f"--lora-rank: {source.path} is no folder with a whole model; barelm import or export makes one"
        )
    model = Model.empty(source.config, **options)
    source.fill_model(model)
    if lora:
        model.source = str(source.path.resolve())
        try:
            model.adapt(lora, seed)
        except ValueError as error:
            raise ValueError(f"--lora-{error}") from None
    return model


def begun_with(folder: str, model: Model) -> dict[str, str]:
    """{"folder", "sha256"} for run.json: where a model comes from, and what its weights were as float32."""
    hash = hashlib.sha256()
    for name, p in model.params.items():
        hash.update(f"{name} {p.shape}\n".encode())
        hash.update(np.ascontiguousarray(p).data.cast("B"))
    return {"folder": folder, "sha256": hash.hexdigest()}


def check_unchanged(now: dict[str, str], before: dict[str, str]) -> None:
    """ValueError: the weights are not those that a run was begun with."""
    if now["sha256"] != before["sha256"]:
        raise ValueError(f"--init: {now['folder']} has other weights than when the run was begun")
