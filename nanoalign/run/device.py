"""What depends on the device: threads, precision, compiling, the length of a row.

A long row is fast: its products are large, and 4-bit weights are decoded seldom. Gradient
checkpointing makes a run slower by a quarter. How much of both is needed depends on the memory that
the model leaves free on a GPU. If the flags leave these two open, a run takes the fastest choice
that fits, as bytes.py counts it.
"""

import os
import time
from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from nanoalign import world
from nanoalign.data import Examples
from nanoalign.fast import flex
from nanoalign.fast.head import chunk_rows
from nanoalign.formats.peft import TrainedModule, is_layer
from nanoalign.formats.weights import pick_device
from nanoalign.logps import PackedLM
from nanoalign.run import checkpoint, ranks
from nanoalign.run.bytes import (
    Row,
    Sizes,
    head_size,
    row_bytes,
    sharded_bytes,
    sizes_of,
    standing_bytes,
)
from nanoalign.run.flags import Config

ROWS = 8192, 4096, 2048  # tokens, the fastest first
SPARE = 0.1  # share of the free memory that is left to gaps in the allocator's memory
COMING = "its gradients", "AdamW's states"  # kinds of standing_bytes that the first step allocates


def use_threads(cfg: Config) -> str:
    """Set the number of threads on a CPU. -> a line that says the number and the reason. Sums round
    differently with another number, so a resumed run takes the number that it had."""
    most, before = torch.get_num_threads(), checkpoint.kept_in(cfg, "state.json").get("threads")
    if cfg.threads:
        number, why = cfg.threads, "--threads"
    elif "OMP_NUM_THREADS" in os.environ:
        number, why = most, "OMP_NUM_THREADS"
    elif isinstance(before, int) and before > 0:
        number, why = before, "as before"
    elif pick_device(cfg.device).type != "cpu":
        number, why = most, "one a core"
    elif world.at_home(cfg):
        number, why = 1, "the model is tiny; --threads takes more"
    else:
        number, why = faster(most)
        number = min(ranks.gather(number))
    torch.set_num_threads(number)
    if before not in (None, number):
        why += f"; before it was {before}, so sums round differently"
    return f"computes on the CPU with {number} thread{'s' * (number > 1)} ({why})"


def faster(most: int, now=time.perf_counter) -> tuple[int, str]:
    """Time small products for a fifth of a second. -> `most` or 1 threads; the reason. Threads that
    share a product wait for each other. If another program is busy, a product waits until the
    scheduler runs the last thread, and one thread alone is faster."""
    if most == 1:
        return 1, "one core"
    a, b, done = torch.ones(256, 512), torch.ones(512, 512), Counter()
    for number in (most, 1, most, 1):
        torch.set_num_threads(number)
        a @ b  # starts the threads
        begin = now()
        while now() - begin < 0.05:
            a @ b
            done[number] += 1
    gain = done[most] / done[1]
    why = f"{most} threads make {gain:.1f} times the products of one; --threads 1 takes one"
    return (most, why) if gain > 1.1 else (1, why.replace("1 takes one", f"{most} takes them"))


def advice_on_threads(device: torch.device, speed: float, fastest: float) -> str | None:
    """What to say if a run on a CPU has become slow; both numbers are tokens per second. Another
    program may have started after `faster` chose the threads."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or speed >= fastest / 3:
        return None
    fell = "tokens per second fell to less than a third"
    return f"{fell}; beside a busy program --threads 1 is faster than {threads}"


def computes_in(lm: PackedLM) -> torch.dtype:
    """The dtype of the hidden states."""
    if lm.autocast:
        return lm.autocast
    table = lm.model.get_input_embeddings()
    trained = isinstance(table, TrainedModule)  # its weight is always fp32
    return table.dtype if trained else table.weight.dtype


def use_tf32(cfg: Config, lm: PackedLM) -> None:
    """On CUDA, compute float32 products on the tensor cores (TF32), unless the flag forbids it.
    They use the first 10 bits of a factor and add in float32. All 23 bits take several times as
    long. bfloat16, the usual dtype for training, has 7."""
    if lm.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
        if cfg.tf32 and computes_in(lm) == torch.float32:
            print("float32 products keep 10 bits of a factor (TF32); --tf32 false keeps all 23")


def fuses_attention(lm: PackedLM) -> bool:
    """Is attention a single kernel? Then it can be part of a compiled layer."""
    return flex.has_flex(lm.device, head_size(lm.model.config))


def compiles(cfg: Config, model: nn.Module, one_graph: bool) -> bool:
    """Are the decoder layers compiled? By default they are if a layer becomes one graph.

    `one_graph`: can attention be part of that graph? On a CPU it can't: its loops depend on the
    row. Two more things break the graph: the experts of a mixture, because the data decide which of
    them compute, and the hooks that gather a sharded layer. With checkpointing a layer with a
    broken graph is not compiled at all.
    """
    if cfg.plain:
        return False
    if cfg.torch_compile is None:
        mixture = any(name.endswith(".experts") for name, _ in model.named_modules())
        return one_graph and not mixture and not cfg.sharded
    return cfg.torch_compile and (one_graph or not cfg.gradient_checkpointing)


def compile_layers(cfg: Config, lm: PackedLM) -> None:
    """Compile each decoder layer with torch.compile, if `compiles` says so.

    A layer has some 65 kernels. Norms, rotations, activations and sums are bound by memory: each
    reads and writes all hidden states. The compiler fuses them into a few kernels. It also
    recomputes in backward what is cheap, so a quarter less is kept.
    """
    if not compiles(cfg, lm.model, fuses_attention(lm)):
        if cfg.torch_compile:
            idle = "--torch_compile has nothing to do beside --gradient_checkpointing"
            print(f"{idle} on this device")
        return
    if cfg.torch_compile is None:
        print("compiles the layers: a minute or two at first; --torch_compile false does without")
    for layer in lm.model.modules():
        if is_layer(layer):
            # Policy and reference may be compiled separately. They start equal only if both round
            # as they do without the compiler.
            layer.compile(dynamic=True, options={"emulate_precision_casts": True})


def row_of(cfg: Config, lm: PackedLM, tokens: int = 0) -> Row:
    """A row of `tokens` tokens, as this run computes it."""
    return Row(
        tokens,
        size=computes_in(lm).itemsize,
        dropout=max((m.p for m in lm.modules() if isinstance(m, nn.Dropout)), default=0.0),
        checkpointing=checkpointed(lm.model),
        compiled=compiles(cfg, lm.model, fuses_attention(lm)),
        train_all=not cfg.use_peft,
        chunk=chunk_rows(len(lm.model.get_output_embeddings().weight), lm.device),
        sharded=cfg.sharded,
        cuda=lm.device.type == "cuda",
    )


def bytes_for_a_row(free: float, standing: dict[str, int]) -> float:
    """What a row may take of the bytes that the loaded weights leave free."""
    return (1 - SPARE) * free - sum(standing[kind] for kind in COMING)


def fastest_fit(
    free: float, sizes: Sizes, row: Row, longest: int, most: int, rows=None, checkpointing=None
) -> tuple[int, bool]:
    """-> tokens in a row, and whether to checkpoint, so that a row fits in `free` bytes. `rows` and
    `checkpointing` are the flags; None lets this function choose.

    A row has at least the `longest` example's tokens, and at most the `most` that a micro-batch
    has. If nothing fits, the choice is the one that takes the least memory.
    """
    lengths = ROWS if rows is None else [rows]
    checkpointings = (False, True) if checkpointing is None else [checkpointing]
    choices = [(tokens, recompute) for recompute in checkpointings for tokens in lengths]
    for tokens, recompute in choices:
        row = replace(row, tokens=min(max(tokens, longest), most), checkpointing=recompute)
        if sum(row_bytes(sizes, row).values()) <= free:
            return tokens, recompute
    return choices[-1]


def checkpointed(model: nn.Module) -> bool:
    """Do its layers compute twice? transformers gave the property another name."""
    new = "is_activation_checkpointing"
    return getattr(model, new if hasattr(type(model), new) else "is_gradient_checkpointing")


def checkpoint_layers(model: nn.Module) -> None:
    """Make the layers keep only their input and compute the rest again in backward."""
    old = model.gradient_checkpointing_enable  # the name in older releases
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})


def choose_row_length(cfg: Config, lm: PackedLM, examples: Examples) -> None:
    """On CUDA, set lm.longest_row and gradient checkpointing where the flags leave them open. The
    free memory decides. Prints the choice."""
    if lm.device.type != "cuda" or None not in (cfg.max_row_tokens, cfg.gradient_checkpointing):
        return
    torch.cuda.empty_cache()
    free = min(ranks.gather(torch.cuda.mem_get_info(lm.device)[0]))  # on the fullest GPU
    standing = sharded_bytes(lm.model, ranks.WORLD) if cfg.sharded else standing_bytes(lm.model)
    taken = standing.get("gathered weights", 0)  # while a row is computed
    if vars(cfg).get("ref_model_name_or_path"):  # will be loaded; it usually has the same size
        taken += sum(size for kind, size in standing.items() if kind not in COMING)
    if cfg.optim == "paged_adamw_32bit":
        standing["AdamW's states"] = 0
    longest = max(e.tokens for e in examples)
    most = longest * cfg.per_device_train_batch_size
    left, sizes = bytes_for_a_row(free - taken, standing), sizes_of(lm.model)
    flags = cfg.max_row_tokens, cfg.gradient_checkpointing
    choice = fastest_fit(left, sizes, row_of(cfg, lm), longest, most, *flags)
    lm.longest_row, checkpointing = choice
    with_or_without = "with" if checkpointing else "without"
    chosen = f"rows of {lm.longest_row} tokens, {with_or_without} gradient checkpointing"
    print(f"{free / 2**30:.1f} GiB free: {chosen} (--max_row_tokens, --gradient_checkpointing)")
    if checkpointing:
        checkpoint_layers(lm.model)


def effective_settings(cfg: Config, lm: PackedLM) -> dict:
    """The values in use for flags whose default leaves the choice to the run."""
    return {
        "device": str(lm.device),
        "dtype": str(computes_in(lm)).removeprefix("torch."),
        "max_row_tokens": cfg.max_row_tokens or lm.row_tokens,
        "gradient_checkpointing": checkpointed(lm.model),
        "threads": torch.get_num_threads(),
    }
