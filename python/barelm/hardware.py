"""What others' machines do and cost: GPUs for rent, and what it took to train GPT-2, each fact with its source.

Prices are examples of their date; they differ by a factor of five between providers, and change by the month.
"""

from typing import NamedTuple

from .loop import flops_per_token
from .model import Config

__all__ = ["GPU", "GPUS", "HISTORY", "Past", "Reference"]


class Reference(NamedTuple):
    """A run whose time is public: it says which share of its machine's peak a good trainer reaches."""

    name: str
    preset: str
    tokens: int
    seconds: float
    flops: float  # peak of all its GPUs together, FLOP/s
    source: str

    @property
    def share(self) -> float:
        """Of peak, with operations counted as `loop.flops_per_token` counts them."""
        return flops_per_token(Config.preset(self.preset), 1024) * self.tokens / (self.seconds * self.flops)


_A100, _H100 = 312e12, 989e12

# 18,865 steps of 524,288 tokens at 300 ms; 32,000 steps of 1,048,576 in 24 hours
ON_A100 = Reference(
    "llm.c's GPT-2 124M on 8 A100", "gpt2", 18_865 * 524_288, 18_865 * 0.3, 8 * _A100, "llm.c scripts/run_gpt2_124M.sh"
)
ON_H100 = Reference(
    "llm.c's GPT-2 1558M on 8 H100",
    "gpt2-xl",
    32_000 * 1_048_576,
    24 * 3600.0,
    8 * _H100,
    "llm.c scripts/run_gpt2_1558M.sh",
)


class GPU(NamedTuple):
    gb: int  # memory, 10^9 bytes
    flops: float  # peak of dense bf16 products with fp32 sums, FLOP/s
    price: float  # $ an hour
    reference: Reference  # whose share of peak is assumed
    flops_source: str
    price_source: str


# Data sheets that count zeros ("with sparsity") are halved.
GPUS = {
    "a100-40": GPU(40, _A100, 1.99, ON_A100, "NVIDIA A100 data sheet", "Lambda's list, November 2026"),
    "a100-80": GPU(80, _A100, 1.75, ON_A100, "NVIDIA A100 data sheet", "llm.c scripts/run_gpt2_124M.sh, 2024"),
    "h100": GPU(80, _H100, 3.50, ON_H100, "NVIDIA H100 data sheet (SXM)", "llm.c scripts/run_gpt2_1558M.sh, 2024"),
    "h200": GPU(141, _H100, 4.59, ON_H100, "NVIDIA H200 data sheet (SXM)", "RunPod's list, October 2026"),
    "l4": GPU(24, 121e12, 0.80, ON_H100, "NVIDIA L4 data sheet", "Modal's list, May 2026"),
    "rtx-3090": GPU(24, 71e12, 0.22, ON_H100, "NVIDIA GA102 white paper", "RunPod's list, March 2026"),
    "rtx-4090": GPU(24, 165.2e12, 0.34, ON_H100, "NVIDIA Ada white paper", "RunPod's list, March 2026"),
}


class Past(NamedTuple):
    what: str
    year: int
    machine: str
    hours: float
    dollars: float
    source: str


HISTORY = (
    Past("GPT-2 1558M, OpenAI", 2019, "32 TPU v3", 168, 43_000, "nanochat dev/LEADERBOARD.md"),
    Past("GPT-2 124M, llm.c", 2024, "8 A100", 1.57, 22, "llm.c scripts/run_gpt2_124M.sh"),
    Past("GPT-2 1558M, llm.c", 2024, "8 H100", 24, 672, "llm.c discussion 677"),
    Past("GPT-2's CORE score, nanochat", 2026, "8 H100", 3.04, 73, "nanochat README, January"),
    Past("GPT-2's CORE score, nanochat", 2026, "8 H100", 1.65, 40, "nanochat leaderboard; at its $24 an hour"),
)
