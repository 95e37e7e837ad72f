"""llm.c (github.com/karpathy/llm.c), a peer on the GPU: its own program train_gpt2cu on our weights and tokens.

It runs as it does by itself, says a line a step, and is stopped (SIGSTOP) while others are timed.  Its data loader
shuffles: batches come in another order than ours.
"""

import os
import pty
import re
import shlex
import signal
import subprocess
from pathlib import Path

import numpy as np
from barelm.checkpoint import open_weights
from barelm.convert import llmc
from barelm.data.tokens import FORMS, HEADER

STEP = re.compile(r"step +\d+/\d+ \| (?:train )?loss ([-+.\deninf]+)")
ALLOCATED = re.compile(r"allocat(?:ed|ing) (\d+) MiB")
NEVER = 10**6  # steps


class Llmc:
    """The running program, which waits.

    command   train_gpt2cu of a build in bf16, and what else it is to be told: "train_gpt2cu -r 0"
    folder    takes its files
    weights   a checkpoint of barelm's
    """

    def __init__(self, command, folder, weights, workload, lr, weight_decay):
        folder.mkdir()
        llmc.write(open_weights(weights), folder / "model.bin", "BF16")
        _write_tokens(folder / "tokens.bin", workload.row())
        words = {"-i": "tokens.bin", "-j": "tokens.bin", "-e": "model.bin", "-b": workload.B, "-t": workload.T}
        words |= {"-d": workload.tokens, "-x": NEVER, "-l": lr, "-c": weight_decay}
        words |= {"-v": NEVER, "-m": 1, "-s": 0}  # one batch is evaluated before the first step, nothing is sampled
        program, *others = shlex.split(command)
        arguments = [str(word) for pair in words.items() for word in pair]
        ours, theirs = pty.openpty()  # a terminal: a pipe would get its lines in blocks of 4 KiB
        self._process = subprocess.Popen(
            [Path(program).absolute(), *arguments, *others], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self._said, self._lines, self.mib = os.fdopen(ours, "rb"), [], 0

    def __call__(self, batches):
        """Wait for the next step's end; its loss.  The program goes on: see rest."""
        self._process.send_signal(signal.SIGCONT)
        while line := self._line():
            if found := STEP.match(line):
                return float(found[1])
            self.mib += sum(map(int, ALLOCATED.findall(line)))
            self._lines = [*self._lines[-20:], line]
        raise RuntimeError(f"llm.c ended with {self._process.wait()}; it said:\n" + "".join(self._lines))

    def _line(self):
        try:
            return self._said.readline().decode(errors="replace")
        except OSError:  # what a terminal says when its last process has gone
            return ""

    def rest(self):
        """It computes nothing until it is asked for the next step."""
        self._process.send_signal(signal.SIGSTOP)

    def close(self):
        self._process.kill()
        self._process.wait()
        self._said.close()


def _write_tokens(path, row):
    """A shard in llm.c's form."""
    header = np.zeros(HEADER, "<i4")
    (magic, version), dtype = next(iter(FORMS.items()))
    header[:3] = magic, version, len(row)
    path.write_bytes(header.tobytes() + row.astype(dtype).tobytes())
