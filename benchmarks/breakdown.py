"""Where the time of a training step goes.

    python benchmarks/breakdown.py --model MODEL --dpo_data PAIRS.jsonl --methods dpo

Steps as in compare.py run under torch's profiler. It counts CPU seconds of one thread, so others
may use the machine, too. Its operators are grouped, forward and backward together:

    weights    products with the model's frozen weights, after decoding in 4 bits
    LoRA       products with A and B, which have few rows, so memory limits them
    attention  everything in attention, and the backward pass of it
    head       from hidden states to log-probs and their gradient
    decoding   4 bits to 16
    optimizer  AdamW
    elements   everything else that torch does: norms, rotary embeddings, SiLU, residual sums, casts
    Python     the rest: the interpreter and autograd between operators, and the profiler

"weights alone" is the time of the same products without anything between them, each shape by
itself. A step with these products can't be faster.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import compare
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import nanoalign.fast.attention
import nanoalign.fast.head
import nanoalign.fast.nf4
from nanoalign.run.flags import SFTConfig

SCOPES = {
    "attention": (nanoalign.fast.attention, "attention"),
    "head": (nanoalign.fast.head, "token_logps"),
    "decoding": (nanoalign.fast.nf4, "rebuild"),
    "optimizer": (torch.optim.AdamW, "step"),
}
PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}  # which are factors
OF_ATTENTION = {"aten::bmm", "aten::baddbmm", "aten::_softmax_backward_data"}


def part_of(event, rank: int) -> str:
    """The part that an operator belongs to: by what it lies in, else by what it does."""
    above = event
    while above is not None:
        if above.name in SCOPES:
            return above.name
        above = above.cpu_parent
    if event.name in OF_ATTENTION or "scaled_dot_product" in event.name:
        return "attention"
    if event.name in PRODUCTS:
        return "LoRA" if rank in sum(factors(event), ()) else "weights"
    return "elements"


def factors(event) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of a product's two matrices."""
    return tuple(tuple(event.input_shapes[i]) for i in PRODUCTS[event.name])


def alone(products: Counter, dtype: torch.dtype) -> float:
    """CPU seconds of these products, {shapes: how often}, with nothing between them."""
    seconds = 0.0
    for (a, b), times in products.items():
        a, b = torch.randn(a, dtype=dtype), torch.randn(b, dtype=dtype)
        a @ b  # to warm up
        start = time.process_time()
        for _ in range(3):
            a @ b
        seconds += times * (time.process_time() - start) / 3
    return seconds


class Profiled(compare.Clock):
    """A clock of CPU seconds that profiles from its first tick to the last of `steps` more. The
    profiler reads the wall's clock: `share` is how much of that time the process was computing."""

    now = time.process_time

    def __init__(self, steps: int):
        super().__init__("cpu")
        self.steps = steps
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def tick(self) -> None:
        super().tick()
        if len(self.moments) == 1:
            self.profile.start()
            self.started = time.monotonic()
        elif len(self.moments) == 1 + self.steps:
            self.share = self.seconds() / (time.monotonic() - self.started)
            self.profile.stop()


def parts(profiled: Profiled, rank: int) -> tuple[dict[str, float], Counter]:
    """Seconds of each part; and the products with the weights, {shapes: how often}."""
    seconds, products = dict.fromkeys(["weights", "LoRA", *SCOPES, "elements"], 0.0), Counter()
    for event in profiled.profile.events():
        name = part_of(event, rank)
        seconds[name] += event.self_cpu_time_total / 1e6 * profiled.share
        if name == "weights":
            products[factors(event)] += 1
    seconds["Python"] = profiled.seconds() - sum(seconds.values())
    return seconds, products


def scoped(name: str, function):
    """The function, its operators under `name` in the profile."""

    def run(*given, **more):
        with record_function(name):
            return function(*given, **more)

    return run


def breakdown(args, method: str, qlora: bool) -> dict[str, float]:
    """Seconds of a step's parts, of all that is timed, and of its products alone."""
    clock = Profiled(args.steps)
    with tempfile.TemporaryDirectory() as home:
        args.method, args.qlora, args.directory = method, qlora, home
        compare.prepare(args, method, Path(home))
        compare.Clock = lambda device: clock
        compare.run_ours(args)
    seconds, products = parts(clock, SFTConfig().lora_r)
    limit = alone(products, getattr(torch, args.dtype))
    seconds |= {"all": clock.seconds(), "weights alone": limit}
    return {name: value / args.steps for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a model directory with a ChatML tokenizer")
    for method in compare.METHODS:
        parser.add_argument(f"--{method}_data", help="a data file; else rows of random words")
    parser.add_argument("--methods", nargs="+", choices=compare.METHODS, default=compare.METHODS)
    parser.add_argument("--bases", nargs="+", choices=["lora", "qlora"], default=["lora", "qlora"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    more = dict(worker="ours", device="cpu", lora_dropout=0.05)
    args = argparse.Namespace(**vars(args), **more, checkpointing=False)
    os.environ["OMP_NUM_THREADS"] = "1"  # as the scripts say it
    torch.set_num_threads(1)
    for name, (owner, function) in SCOPES.items():
        setattr(owner, function, scoped(name, getattr(owner, function)))
    for method in args.methods:
        for base in args.bases:
            seconds = breakdown(args, method, base == "qlora")
            print(f"{method.upper()} {base}: {seconds['all']:.2f} s a step; " + ", ".join(
                f"{name} {value / seconds['all']:.1%}"
                for name, value in seconds.items() if name != "all" and value
            ), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
