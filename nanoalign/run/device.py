"""What a run settles with the device that it computes on.

How long a row should be, and whether to keep what layers compute or compute it a second time in
backward, depends on how much memory a card has left beside the model. With long rows products are
large and 4-bit weights are decoded seldom; a second forward pass costs a quarter of the speed. So
where the flags leave these two open, the quickest choice is taken that fits by the count of
bytes.py.
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
    How,
    Sizes,
    head_size,
    row_bytes,
    sharded_bytes,
    sizes_of,
    standing_bytes,
)
from nanoalign.run.flags import Config

ROWS = 8192, 4096, 2048  # tokens, from the quickest to the leanest
SPARE = 0.1  # of the free memory: what gaps in the allocator's memory may take
COMING = "its gradients", "AdamW's states"  # of standing_bytes: from the first step on


def use_threads(cfg: Config) -> str:
    """Set the number of a CPU's threads. -> how many there are and why, in a line.

    With another number sums have another order, so a run that is resumed takes the one it had.
    """
    most, then = torch.get_num_threads(), checkpoint.kept_in(cfg, "state.json").get("threads")
    if cfg.threads:
        number, why = cfg.threads, "--threads"
    elif "OMP_NUM_THREADS" in os.environ:
        number, why = most, "OMP_NUM_THREADS"
    elif isinstance(then, int) and then > 0:
        number, why = then, "as before"
    elif pick_device(cfg.device).type != "cpu":
        number, why = most, "one a core"
    elif world.at_home(cfg):
        number, why = 1, "the model is tiny; --threads takes more"
    else:
        number, why = quicker(most)
        number = min(ranks.gather(number))
    torch.set_num_threads(number)
    if then not in (None, number):
        why += f"; before it was {then}, so sums round otherwise"
    return f"computes on the CPU with {number} thread{'s' * (number > 1)} ({why})"


def quicker(most: int, now=time.perf_counter) -> tuple[int, str]:
    """`most` threads or one, by a fifth of a second of small products; and why.

    Threads that share a product wait for each other, and spin meanwhile. Beside one busy program
    each product then takes until the scheduler lets the last of them go on.
    """
    if most == 1:
        return 1, "one core"
    a, b, done = torch.ones(256, 512), torch.ones(512, 512), Counter()
    for number in (most, 1, most, 1):
        torch.set_num_threads(number)
        a @ b  # the threads are there
        begin = now()
        while now() - begin < 0.05:
            a @ b
            done[number] += 1
    gain = done[most] / done[1]
    why = f"{most} threads make {gain:.1f} times the products of one; --threads 1 takes one"
    return (most, why) if gain > 1.1 else (1, why.replace("1 takes one", f"{most} takes them"))


def advice_on_threads(device: torch.device, speed: float, fastest: float) -> str | None:
    """What to say where a run's tokens per second are no more than a part of its `fastest`: the
    probe's choice of threads stands, but it knows nothing of a program that came later."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or speed >= fastest / 3:
        return None
    fell = "tokens per second fell to less than a third"
    return f"{fell}; beside a busy program --threads 1 is faster than {threads}"


def computes_in(lm: PackedLM) -> torch.dtype:
    if lm.autocast:
        return lm.autocast
    table = lm.model.get_input_embeddings()
    trained = isinstance(table, TrainedModule)  # its weight is in fp32, whatever it computes in
    return table.dtype if trained else table.weight.dtype


def use_tf32(cfg: Config, lm: PackedLM) -> None:
    """On CUDA, let float32 products run on the tensor cores, unless the flag forbids it.

    They read a factor's first 10 bits and add up in float32 (TF32); all 23 bits take several times
    as long. bfloat16, in which models are trained as a rule, has 7.
    """
    if lm.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
        if cfg.tf32 and computes_in(lm) == torch.float32:
            print("float32 products keep 10 bits of a factor (TF32); --tf32 false keeps all 23")


def fuses_attention(lm: PackedLM) -> bool:
    """Is attention one kernel, which can be part of a compiled layer?"""
    return flex.has_flex(lm.device, head_size(lm.model.config))


def compiles(cfg: Config, model: nn.Module, one_graph: bool) -> bool:
    """Are the decoder layers compiled? By default wherever a layer becomes one graph.

    `one_graph`: can attention be part of the graph? On a CPU it can't, because its loops depend on
    the row; and where checkpointing meets a broken graph, nothing is compiled. A mixture's experts
    break the graph too, since the data decide which of them compute, and so do the hooks that
    gather a sharded layer.
    """
    if cfg.plain:
        return False
    if cfg.torch_compile is None:
        mixture = any(name.endswith(".experts") for name, _ in model.named_modules())
        return one_graph and not mixture and not cfg.sharded
    return cfg.torch_compile and (one_graph or not cfg.gradient_checkpointing)


def compile_layers(cfg: Config, lm: PackedLM) -> None:
    """Let torch.compile make a few kernels of each decoder layer.

    A layer is some 65 kernels, and all that are no products (norms, rotations, activations, sums)
    do nothing but carry the hidden states to memory and back. In one graph they become a handful,
    and backward computes anew what is cheap instead of keeping it: a quarter less is kept.
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
            # A reference of its own is compiled apart, and starts equal to the policy only if
            # both round as they would without the compiler.
            layer.compile(dynamic=True, options={"emulate_precision_casts": True})


def how_of(cfg: Config, lm: PackedLM, tokens: int = 0) -> How:
    """How a run computes a row of so many tokens."""
    return How(
        tokens,
        size=computes_in(lm).itemsize,
        dropout=max((m.p for m in lm.modules() if isinstance(m, nn.Dropout)), default=0.0),
        checkpointing=lm.model.is_gradient_checkpointing,
        compiled=compiles(cfg, lm.model, fuses_attention(lm)),
        train_all=not cfg.use_peft,
        chunk=chunk_rows(len(lm.model.get_output_embeddings().weight), lm.device),
        sharded=cfg.sharded,
        cuda=lm.device.type == "cuda",
    )


def room(free: float, standing: dict[str, int]) -> float:
    """Bytes that a row may take, of those that all weights leave free."""
    return (1 - SPARE) * free - sum(standing[kind] for kind in COMING)


def settle(
    free: float, sizes: Sizes, how: How, longest: int, most: int, rows=None, checkpointing=None
) -> tuple[int, bool]:
    """Tokens a row, and whether to checkpoint, for `free` bytes. What is given stays as it is.

    An example of `longest` tokens is a row of its own, however short the others are; and no row has
    more than the `most` of a micro-batch. Where nothing fits, the leanest.
    """
    open_rows = ROWS if rows is None else [rows]
    open_ways = (False, True) if checkpointing is None else [checkpointing]
    ways = [(tokens, way) for way in open_ways for tokens in open_rows]
    for tokens, way in ways:
        row = replace(how, tokens=min(max(tokens, longest), most), checkpointing=way)
        if sum(row_bytes(sizes, row).values()) <= free:
            return tokens, way
    return ways[-1]


def checkpoint_layers(model: nn.Module) -> None:
    """Layers keep their input, and compute the rest again in backward."""
    old = model.gradient_checkpointing_enable  # its name in older releases
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})


def settle_rows(cfg: Config, lm: PackedLM, examples: Examples) -> None:
    """On CUDA, settle what the flags leave open with the memory that the loaded model has left
    free, do so, and say so in a line: how long rows are (lm.longest_row), and what layers keep."""
    if lm.device.type != "cuda" or None not in (cfg.max_row_tokens, cfg.gradient_checkpointing):
        return
    torch.cuda.empty_cache()
    free = min(ranks.gather(torch.cuda.mem_get_info(lm.device)[0]))  # on the fullest card
    standing = sharded_bytes(lm.model, ranks.WORLD) if cfg.sharded else standing_bytes(lm.model)
    taken = standing.get("gathered weights", 0)  # for the row itself
    if vars(cfg).get("ref_model_name_or_path"):  # will be loaded: as large, as a rule
        taken += sum(size for kind, size in standing.items() if kind not in COMING)
    if cfg.optim == "paged_adamw_32bit":
        standing["AdamW's states"] = 0
    longest = max(e.tokens for e in examples)
    most = longest * cfg.per_device_train_batch_size
    given = cfg.max_row_tokens, cfg.gradient_checkpointing
    left, sizes = room(free - taken, standing), sizes_of(lm.model)
    tokens, checkpointing = settle(left, sizes, how_of(cfg, lm), longest, most, *given)
    lm.longest_row = tokens
    way = "with" if checkpointing else "without"
    chosen = f"rows of {tokens} tokens, {way} gradient checkpointing"
    print(f"{free / 2**30:.1f} GiB free: {chosen} (--max_row_tokens, --gradient_checkpointing)")
    if checkpointing:
        checkpoint_layers(lm.model)


def settled(cfg: Config, lm: PackedLM) -> dict:
    """What became of the flags that leave something open, under their names."""
    return {
        "device": str(lm.device),
        "dtype": str(computes_in(lm)).removeprefix("torch."),
        "max_row_tokens": cfg.max_row_tokens or lm.row_tokens,
        "gradient_checkpointing": lm.model.is_gradient_checkpointing,
        "threads": torch.get_num_threads(),
    }
