"""barelm: language models on bare metal - hand-written kernels, a thin Python layer, no deep-learning framework.

The names below are loaded when they are first used: importing barelm, and `barelm --help`, cost nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .drawing import Sampling as Sampling
    from .engine import Engine as Engine
    from .engine import generate as generate
    from .lora import Lora as Lora
    from .model import Config as Config
    from .model import Model as Model
    from .session import CacheFull as CacheFull
    from .session import Session as Session
    from .session import StaleRow as StaleRow
    from .tokenizer import Tokenizer as Tokenizer

_HOME = {
    "CacheFull": "session",
    "Config": "model",
    "Engine": "engine",
    "Lora": "lora",
    "Model": "model",
    "Sampling": "drawing",
    "Session": "session",
    "StaleRow": "session",
    "Tokenizer": "tokenizer",
    "generate": "engine",
}

__all__ = [
    "CacheFull",
    "Config",
    "Engine",
    "Lora",
    "Model",
    "Sampling",
    "Session",
    "StaleRow",
    "Tokenizer",
    "__version__",
    "generate",
]


def __getattr__(name: str):
    if name == "__version__":
        value = importlib.import_module("._core", __name__).version()
    elif name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module 'barelm' has no attribute {name!r}")
    globals()[name] = value
    return value
