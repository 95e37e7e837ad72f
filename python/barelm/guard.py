"""The outlier guard: a step whose loss or gradient is far outside what came before it is not made.

One bad batch - broken text, a number that overflowed - would otherwise sit in AdamW's moments for hundreds of steps.
As llm.c does, what is normal is learned from a window of the last good steps (a z-score); what is not finite is always
an outlier.
"""

import math
from collections import deque

__all__ = ["Guard", "TooManySkips"]

WARM = 32  # good steps that must be known before anything finite can be an outlier
LOSS_FLOOR = 0.05  # nats; a very even window must not make a small difference an outlier
NORM_FLOOR = 0.25  # of the logarithm: eight of them are a factor of seven


class TooManySkips(FloatingPointError):
    """The guard has skipped as many steps in a row as it may."""


class Guard:
    """Decides which steps are made.

    deviations   how many standard deviations above the mean of the window is too far; 0: only what is not finite
    window       good steps that are remembered
    patience     skipped steps in a row after which TooManySkips is raised

    Norms are compared by their logarithm: they are positive, and their distribution has a long tail above.
    """

    def __init__(self, deviations: float = 8.0, window: int = 128, patience: int = 10):
        self.deviations, self.patience, self.in_a_row = deviations, patience, 0
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)  # logarithms

    @property
    def loss_limit(self) -> float:
        """A loss above it is an outlier; infinite while too little is known."""
        return self._limit(self._losses, LOSS_FLOOR)

    @property
    def norm_limit(self) -> float:
        """A norm above it is an outlier."""
        return math.exp(min(self._limit(self._norms, NORM_FLOOR), 700.0))

    def made(self, loss: float, norm: float) -> None:
        """A step was made."""
        self.in_a_row = 0
        self._losses.append(loss)
        self._norms.append(math.log(max(norm, 1e-300)))

    def skipped(self, why: str) -> None:
        """A step was skipped.  TooManySkips: it was one too many."""
        self.in_a_row += 1
        if self.in_a_row >= self.patience:
            raise TooManySkips(
                why if self.patience == 1 else f"{self.in_a_row} steps in a row skipped, the last: {why}"
            )

    def state(self) -> dict:
        """Plain data for a checkpoint: JSON gives back every float to the bit."""
        return {"losses": list(self._losses), "norms": list(self._norms), "in_a_row": self.in_a_row}

    def restore(self, state: dict) -> None:
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self.in_a_row = state["in_a_row"]

    def _limit(self, values: deque[float], floor: float) -> float:
        if not self.deviations or len(values) < WARM:
            return math.inf
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        return mean + self.deviations * max(deviation, floor)
