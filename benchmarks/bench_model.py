"""python benchmarks/bench_model.py  -- whole training steps beside PyTorch: same model, weights, batches and update.

Each peer is a process of its own that waits for its turn, so that threads of one never spin while another is timed; the
turns go round and round, so that all share what else the machine does.  A step is forward and backward of one or
several micro-batches, clipping to norm 1 and AdamW.  Peers that do not compute the same loss are an error, not a row of
the table.  With `--device cuda` on a GPU: GPT-2 from 124M to 1558M.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]
import machine  # noqa: E402
import tuned  # noqa: E402
from barelm import Config, Model, _core  # noqa: E402
from barelm.loop import flops_per_token, step  # noqa: E402

LR, CLIP = 1e-4, 1.0
ADAMW = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
CPU_PEERS = (
    "barelm fp32",
    "barelm bf16",
    "torch eager fp32",
    "torch compile fp32",
    "torch eager bf16",
    "torch compile bf16",
    "torch eager tuned fp32",
    "torch compile tuned fp32",
    "torch eager tuned bf16",
    "torch compile tuned bf16",
)
CUDA_PEERS = ("barelm bf16", "torch eager bf16", "torch compile bf16", "llm.c bf16")
HEADER = (
    "model",
    "B, T",
    "peer",
    "ms a step",
    "tokens/s",
    "% of peak",
    "x stock PyTorch",
    "x tuned",
    "x llm.c",
    "spread %",
    "rounds",
    "GiB",
    "loss",
)
CUDA_PEAK = {
    "bf16": 989.4e12,
    "fp32": 66.9e12,
}  # FLOP/s of an H200 (NVIDIA H200 data sheet: half of those with sparsity)
RIVALS = ("stock", "tuned", "llm.c")  # of PyTorch the first two
PAUSE = 0.2  # seconds between turns: threads that wait for work by spinning have gone to sleep by then


@dataclass(frozen=True)
class Workload:
    name: str
    sizes: dict
    B: int
    T: int
    micro_batches: int = 1
    device: str = "cpu"

    @property
    def tokens(self):
        return self.B * self.T * self.micro_batches

    @property
    def config(self):
        return Config(**self.sizes)

    def row(self):
        """The tokens of four steps and the one that follows them, int32."""
        return np.random.default_rng(0).integers(0, self.config.vocab_size, 4 * self.tokens + 1, dtype=np.int32)

    def batches(self):
        """A step's micro-batches, each tokens, targets (B, T) int32: those of four steps, round and round, so that
        updates that work show in the loss."""
        row, shape = self.row(), (4, self.micro_batches, self.B, self.T)
        steps = zip(row[:-1].reshape(shape), row[1:].reshape(shape), strict=True)
        return itertools.cycle([list(zip(*step, strict=True)) for step in steps])


GPT2 = dict(vocab_size=50304)  # 124M; the vocabulary that PyTorch is fastest with
SMALL = dict(n_layer=6, n_head=6, n_embd=384, vocab_size=4096, context=256)
RECIPE = dict(n_layer=4, n_head=4, n_embd=128, vocab_size=65, context=64, bias=False)
CPU_WORKLOADS = (
    Workload("gpt2", GPT2, 4, 64),
    Workload("gpt2", GPT2, 4, 256),
    Workload("gpt2", GPT2, 1, 1024),
    Workload("small", SMALL, 16, 256),
    Workload("nanogpt", RECIPE, 12, 64),
)


def gpt2(name, B, micro_batches):
    return Workload(name, Config.preset(name, **GPT2).to_dict(), B, 1024, micro_batches, "cuda")


CUDA_WORKLOADS = (gpt2("gpt2", 64, 1), gpt2("gpt2-medium", 16, 8), gpt2("gpt2-large", 16, 8), gpt2("gpt2-xl", 16, 8))
KINDS = {"cpu": (CPU_WORKLOADS, CPU_PEERS), "cuda": (CUDA_WORKLOADS, CUDA_PEERS)}


# ---- in the process of a peer


def barelm_step(workload, precision, folder):
    """A function that takes one step and returns its loss."""
    model = Model.load(folder, precision=precision, device=workload.device)
    return lambda batches: step(model, batches, LR, clip=CLIP, **ADAMW).loss


def torch_step(workload, precision, folder, compiled):
    import torch
    import torch_gpt2
    from barelm.convert.huggingface import from_file_name
    from safetensors.numpy import load_file

    torch.set_num_threads(_core.threads_get())
    weights = load_file(folder / "model.safetensors")
    model = torch_gpt2.GPT2(workload.config).load({from_file_name(workload.config, n): p for n, p in weights.items()})
    model.to(workload.device)
    optimizer = torch_gpt2.adamw(model, LR, **ADAMW, fused=True)
    loss_of = torch.compile(model) if compiled else model

    def take(batches):
        total = 0.0
        for batch in batches:
            tokens, targets = (torch.from_numpy(a).to(workload.device).long() for a in batch)
            with torch.autocast(workload.device, dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of(tokens, targets) / len(batches)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    if workload.device == "cuda":
        take.rest = torch.cuda.empty_cache  # what it would keep for its next turn has no room beside the others
    return take


def llmc_step(workload, folder, command):
    import llmc

    return llmc.Llmc(command, folder.parent / "llm.c", folder, workload, LR, ADAMW["weight_decay"])


def serve(pipe, peer, workload, folder, llmc):
    """Answer each number n with (the seconds that n steps took, the loss of the last one).  Before several, one goes
    that is not timed: it brings back what the others drove out of the caches, and memory that was given back."""
    library, *mode, precision = peer.split()
    if library == "barelm":
        take = barelm_step(workload, precision, folder)
    elif library == "torch":
        take = torch_step(workload, precision, folder, mode[0] == "compile")
    else:
        take = llmc_step(workload, folder, llmc)
    with contextlib.closing(take) if library == "llm.c" else contextlib.nullcontext():
        batches = workload.batches()
        while n := pipe.recv():
            if n > 1:
                take(next(batches))
            ready, loss = [next(batches) for _ in range(n)], 0.0
            start = time.perf_counter()
            for batch in ready:
                loss = take(batch)
            spent = time.perf_counter() - start
            if hasattr(take, "rest"):
                take.rest()
            pipe.send((spent, loss))
        pipe.send(peak_memory() if workload.device == "cpu" else device_memory(library, workload, take))


def peak_memory():
    """The most memory that this process ever had, in GiB; None where the system does not say.  Not getrusage: what it
    says begins with the parent's."""
    lines = [line.split() for line in machine.read("/proc/self/status").splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) / 2**20 if lines else None


def device_memory(library, workload, take):
    """The GiB of the GPU that a peer has taken."""
    if library == "barelm":
        return sum(workload.config.memory(workload.B, workload.T, precision="bf16", device="cuda").values()) / 2**30
    if library == "llm.c":
        return take.mib / 2**10
    import torch

    return torch.cuda.max_memory_reserved() / 2**30


# ---- in this process


class Peer:
    """A running peer, warmed up: the first of its steps compiles where something is to be compiled."""

    def __init__(self, name, workload, folder, llmc=None):
        context = multiprocessing.get_context("spawn")
        self.name, self.seconds = name, []
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, workload, folder, llmc), daemon=False)
        with tuned.preloaded(folder.parent) if "tuned" in name else contextlib.nullcontext():
            self.process.start()
        theirs.close()
        self.losses = [self.turn(1)[1] for _ in range(2)]
        self.turn(1)
        self.warm = self.turn(1)[0]

    def turn(self, n):
        """(seconds, loss) of n steps, while every other peer sleeps."""
        try:
            self.pipe.send(n)
            answer = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"{self.name}: the peer died; what it said is above") from None
        time.sleep(PAUSE)
        return answer

    def end(self):
        """Peak memory of the process in GiB."""
        memory = self.turn(0)
        self.process.join()
        return memory

    def stop(self):
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def check_losses(peers):
    """The first loss is that of the same weights and batch, the second has one update in it: these agree up to rounding
    (of which bf16 does more).  Later ones drift apart: PyTorch adds up the norm of 124M gradients in fp32, 1e-4 off.
    """
    first = peers[0]
    for peer in peers:
        start = 2e-3 if "bf16" in peer.name + first.name else 1e-4
        tolerance = np.array([start] * 2 + [2e-2] * (len(first.losses) - 2)) * np.abs(first.losses)
        if not (np.abs(np.subtract(peer.losses, first.losses)) <= tolerance).all():
            raise RuntimeError(f"{peer.name} computes the losses {peer.losses}, {first.name} {first.losses}")


def race(workload, names, rounds, seconds, llmc=None):
    """Run all peers on one workload; each round gives every peer one turn of some steps.  `llmc`: llm.c's program
    and its options."""
    peers = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "start"
        Model(workload.config, seed=1).save(weights, optimizer=False)
        try:
            for name in names:
                print(f"{workload.name} ({workload.B}, {workload.T}): {name} warms up", file=sys.stderr, flush=True)
                peers.append(Peer(name, workload, weights, llmc))
            check_losses(peers)
            warm = float(np.median([peer.warm for peer in peers]))
            steps = max(2 if workload.device == "cuda" else 1, round(seconds / warm))
            for _, peer in itertools.product(range(rounds), peers):
                spent, loss = peer.turn(steps)
                peer.seconds.append(spent / steps)
                peer.losses.append(loss)
            check_losses(peers)
            memory = {peer.name: peer.end() for peer in peers}
        finally:
            for peer in peers:
                peer.stop()
    return [
        {
            "workload": asdict(workload),
            "peer": p.name,
            "seconds": p.seconds,
            "steps_a_turn": steps,
            "losses": p.losses,
            "gib": memory[p.name],
        }
        for p in peers
    ]


def rival(peer):
    """Which of RIVALS a peer is; None: barelm."""
    library, *mode, _ = peer.split()
    return None if library == "barelm" else library if library == "llm.c" else "tuned" if "tuned" in mode else "stock"


def summarize(results, peak):
    """Add to each result its median, spread, tokens/s, share of peak and ratios to the best of each of RIVALS."""
    for r in results:
        workload, precision = Workload(**r["workload"]), r["peer"].split()[-1]
        seconds, tokens = np.array(r["seconds"]), workload.tokens
        low, r["median"], high = (float(q) for q in np.quantile(seconds, [0.25, 0.5, 0.75]))
        r["spread"], r["tokens_per_second"] = (high - low) / r["median"], tokens / r["median"]
        r["share_of_peak"] = flops_per_token(workload.config, workload.T) * r["tokens_per_second"] / peak[precision]
        for kind in RIVALS:
            same = [t for t in results if t["peer"].endswith(precision) and rival(t["peer"]) == kind]
            rivals = [np.array(t["seconds"]) for t in same]
            best = min(rivals, key=np.median, default=None)
            # the one with the better median; its time over ours in each round, both having met the same noise
            r[kind] = None if best is None else float(np.median(best / seconds))
    return results


def row(r):
    workload = Workload(**r["workload"])
    ratios = ["" if r[kind] is None else f"{r[kind]:.2f}" for kind in RIVALS]
    memory = "" if r["gib"] is None else f"{r['gib']:.2f}"
    return (
        workload.name,
        f"{workload.B}, {workload.T}" + (f" x {workload.micro_batches}" if workload.micro_batches > 1 else ""),
        r["peer"],
        f"{r['median'] * 1e3:.1f}",
        f"{r['tokens_per_second']:.0f}",
        f"{100 * r['share_of_peak']:.0f}",
        *ratios,
        f"{100 * r['spread']:.0f}",
        str(len(r["seconds"])),
        memory,
        f"{r['losses'][-1]:.4f}",
    )


def selected(options):
    workloads, names = KINDS[options.device]
    names = [name for name in names if any(word in name for word in options.peers or [""])]
    why = tuned.missing()
    if why and any("tuned" in name for name in names):
        print(f"left out: tuned PyTorch ({why})", file=sys.stderr)
        names = [name for name in names if "tuned" not in name]
    if not options.llmc and "llm.c bf16" in names:
        print("left out: llm.c (--llmc names its program)", file=sys.stderr)
        names.remove("llm.c bf16")
    workloads = [w for w in workloads if any(word in f"{w.name} {w.B},{w.T}" for word in options.only or [""])]
    if not names or not workloads:
        raise SystemExit("nothing to run: --only and --peers leave no workload or no peer")
    return workloads, names


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("  -- ")[2])
    parser.add_argument(
        "--only",
        action="append",
        metavar="WORD",
        help="workloads with this in their name, as in 'gpt2 4,64' (may be repeated)",
    )
    known = dict.fromkeys(CPU_PEERS + CUDA_PEERS)
    parser.add_argument("--peers", action="append", metavar="WORD", help=f"of {', '.join(known)} (may be repeated)")
    parser.add_argument("--device", choices=KINDS, default="cpu")
    parser.add_argument(
        "--llmc", metavar="COMMAND", help="on a GPU: llm.c's program and its options, as in 'llm.c/train_gpt2cu -r 0'"
    )
    parser.add_argument("--rounds", type=int, help="turns of each peer (default 9)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of short turns")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON, every turn's time included")
    options = parser.parse_args()
    if options.llmc and options.device != "cuda":
        parser.error("--llmc: llm.c is measured on a GPU, with --device cuda")
    if options.llmc and not Path(shlex.split(options.llmc)[0]).is_file():
        parser.error(f"--llmc: there is no program {shlex.split(options.llmc)[0]}")
    workloads, names = selected(options)
    about = machine.describe()
    machine.show(about)
    if options.device == "cuda":
        ceilings = {about["backend"]: CUDA_PEAK}
        print(
            f"\n% of peak: of the H200's dense {CUDA_PEAK['bf16'] / 1e12:.0f} TFLOP/s in bf16, its data sheet's number."
        )
    else:
        ceilings = machine.ceilings([about["backend"]])
        machine.show_ceilings(ceilings)
    print("\n| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    results = []
    for workload in workloads:
        rounds, seconds = options.rounds or (3 if options.quick else 9), 0.3 if options.quick else 1.5
        found = race(workload, names, rounds, seconds, options.llmc)
        for r in summarize(found, ceilings[about["backend"]]):
            print("| " + " | ".join(row(r)) + " |", flush=True)
        results += found
        about["load_average_after"] = machine.load_average()
        if options.json:  # of each workload as soon as there is one
            everything = {"machine": about, "ceilings": ceilings, "results": results}
            Path(options.json).write_text(json.dumps(everything, indent=1) + "\n")
    before, after = about["load_average"], about["load_average_after"]
    print(f"\nLoad average {before} before, {after} after (this run keeps every core busy by itself).")


if __name__ == "__main__":
    main()
