"""python benchmarks/bench_plan.py  -- what `barelm plan` foretells beside what a training process then takes.

Each workload is planned in one fresh process and trained in another, several times in turn; of times the best counts on
both sides.  A step is as many micro-batches as the flags say, and an update.  Peak memory is that of the whole process.
"""

import argparse
import json
import subprocess
import sys
import time

import machine
import numpy as np

# flags of `barelm plan`; the last plans from a few layers what the first times whole
WORKLOADS = {
    "gpt2 124M": dict(preset="gpt2", context=64, batch=4, tokens_per_step=512),
    "small llama": dict(family="llama", n_layer=6, n_head=6, n_embd=384, vocab=4096, batch=16, tokens_per_step=4096),
    "bytes": dict(n_layer=4, n_head=4, n_embd=256, vocab=257, batch=8, tokens_per_step=2048),
    "bytes, bf16": dict(n_layer=4, n_head=4, n_embd=256, vocab=257, batch=8, tokens_per_step=2048, precision="bf16"),
    "gpt2 124M, extrapolated": dict(preset="gpt2", context=64, batch=4, tokens_per_step=512),
}
HEADER = ("workload", "s a step: planned", "taken", "ratio", "memory: planned", "taken", "ratio", "how")
STEPS = 3


def foretell(name, clock):
    """In a process of its own: what `barelm plan` says."""
    from barelm import plan

    plan.clock = clock
    if "extrapolated" in name:
        plan.SECONDS_AT_MOST["whole"] = 0.0
    print(json.dumps(plan.plan(plan.PlanConfig(**WORKLOADS[name]))))


def train(name, clock):
    """In a process of its own: the best time of a step, and the most memory that the process had."""
    from barelm import plan
    from barelm.loop import step
    from barelm.model import Config, Model

    config = plan.PlanConfig(**WORKLOADS[name])
    sizes = plan.plan(plan.replace(config, measure=False))
    model = Model(Config(**sizes["model"]["config"]), precision=config.precision)
    B, T, V = sizes["run"]["batch"], sizes["run"]["context"], model.config.vocab_size
    rng, seconds = np.random.default_rng(1), []
    for _ in range(STEPS + 1):
        began = clock()
        batches = [tuple(rng.integers(0, V, (2, B, T), dtype=np.int32)) for _ in range(sizes["run"]["accumulate"])]
        step(model, batches, 1e-4)
        seconds.append(clock() - began)
    lines = [line.split() for line in machine.read("/proc/self/status").splitlines() if line.startswith("VmHWM:")]
    print(json.dumps({"step": min(seconds[1:]), "memory": int(lines[0][1]) * 1024}))


def in_process(role, name, cpu):
    command = [sys.executable, __file__, "--role", role, "--only", name, *["--cpu"] * cpu]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout)


def compare(name, rounds, cpu):
    planned, taken = [], []
    for _ in range(rounds):
        planned.append(in_process("foretell", name, cpu))
        taken.append(in_process("train", name, cpu))
    said, did = min(p["time"]["step"] for p in planned), min(t["step"] for t in taken)
    memory, used = planned[0]["memory"]["total"], max(t["memory"] for t in taken)
    return (
        name,
        f"{said:.3f}",
        f"{did:.3f}",
        f"{said / did:.3f}",
        f"{memory / 1e6:.1f} MB",
        f"{used / 1e6:.1f} MB",
        f"{memory / used:.3f}",
        planned[0]["time"]["how"],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("  -- ")[2])
    parser.add_argument("--only", metavar="WORD", default="", help="workloads with this in their name")
    parser.add_argument("--rounds", type=int, default=3, help="plans and trainings of each workload (default 3)")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="CPU time, not the clock's: for a busy machine; with BARELM_THREADS=1, because threads wait by spinning",
    )
    parser.add_argument("--role", choices=("foretell", "train"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        clock = time.process_time if options.cpu else time.perf_counter
        return {"foretell": foretell, "train": train}[options.role](options.only, clock)
    machine.show(machine.describe())
    print("\n| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    for name in WORKLOADS:
        if options.only in name:
            print("| " + " | ".join(compare(name, options.rounds, options.cpu)) + " |", flush=True)
    print(f"\nLoad average {machine.load_average()} after (this run keeps every core busy by itself).")


if __name__ == "__main__":
    main()
