"""How much memory a run needs: python -m nanoalign.memory [sft | dpo | kto] --model_name_or_path M

This prints the bytes by kind, and which GPUs have enough. Give the same flags as for the training
script (train_sft.py, if no method is named). M may be a directory, a name on the hub or a
config.json by itself, since only the config is read.

    python -m nanoalign.memory table M [M ...]       the peaks of several models in a table
"""

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from nanoalign.fast.head import chunk_rows, gpu_rows
from nanoalign.formats.bitsandbytes import is_nf4
from nanoalign.formats.files import from_pretrained
from nanoalign.formats.peft import add_adapter
from nanoalign.formats.weights import FORMATS, all_weights, freeze_linears, skeleton
from nanoalign.packing import ROW_TOKENS
from nanoalign.run.bytes import Row, Sizes, row_bytes, sharded_bytes, sizes_of, standing_bytes
from nanoalign.run.command import command
from nanoalign.run.device import COMING, bytes_for_a_row, compiles, fastest_fit
from nanoalign.run.flags import POSITIVE, Config, DPOConfig, KTOConfig, SFTConfig, flag, parse
from nanoalign.run.policy import adapter_of, base_of

CARDS = 8, 16, 24, 48, 80, 141  # GB
CONTEXT = 600 * 2**20  # CUDA and its libraries: an estimate
GIB = 2**30

MORE = [  # flags in addition to those of the scripts; the scripts require data, this tool does not
    ("dataset_name", list[str], flag(["any"], "is not read")),
    ("ranks", int, flag(1, "processes of torchrun; --fsdp divides the model", POSITIVE)),
]
METHODS = {
    kind.__name__.removesuffix("Config").lower(): make_dataclass(kind.__name__, MORE, bases=(kind,))
    for kind in (SFTConfig, DPOConfig, KTOConfig)
}
WAYS = {  # {flag that makes a run smaller: {value: how much it costs in time or exactness}}
    "use_bnb_nested_quant": {True: 1},
    "max_row_tokens": {2048: 1, 1024: 3, 512: 6},
    "lora_dropout": {0.0: 2},
    "gradient_checkpointing": {True: 4},
    "optim": {"paged_adamw_32bit": 4},
    "load_in_4bit": {True: 8},
    "use_peft": {True: 32},
}
TABLE = "--max_row_tokens 4096 --torch_compile false"
SETUPS = {  # {column of the table: flags}
    "4 bits, checkpointed": "--gradient_checkpointing true --load_in_4bit --use_bnb_nested_quant",
    "4 bits": "--gradient_checkpointing false --load_in_4bit",
    "LoRA, checkpointed": "--gradient_checkpointing true",
    "LoRA": "--gradient_checkpointing false",
    "all weights, checkpointed, paged": (
        "--gradient_checkpointing true --use_peft false --optim paged_adamw_32bit"
    ),
    "all weights": "--gradient_checkpointing false --use_peft false",
}


@dataclass
class Shapes:
    """The sizes of the model that the flags describe."""

    name: str
    weights: int
    trained: int
    sizes: Sizes
    standing: dict[str, int]  # bytes by kind
    compiled: bool  # are its layers compiled?
    dtype: torch.dtype  # of the computation
    dropout: float  # of LoRA


def shapes_of(cfg: Config) -> Shapes:
    """The sizes of a run's model, which is built on the meta device, so it takes no memory. A
    separate reference model is included."""
    name, _, lora = base_of(cfg)
    config = from_pretrained(AutoConfig, name, trust_remote_code=cfg.trust_remote_code)
    dtype = getattr(torch, cfg.computing_dtype, None) or getattr(config, "dtype", None)
    four_bit, dtype = cfg.load_in_4bit or is_nf4(config), dtype or torch.float32
    if is_nf4(config):
        del config.quantization_config  # with it transformers would make bitsandbytes' layers
    weights = dtype if cfg.use_peft else torch.float32
    model, dropout = skeleton(config, weights, cfg.trust_remote_code), 0.0
    model.requires_grad_(not cfg.use_peft)
    with torch.device("meta"):
        if four_bit:
            settings = {"double_quant": True} if cfg.use_bnb_nested_quant else {}
            freeze_linears(model, "meta", freezer(FORMATS[cfg.bnb_4bit_quant_type], **settings))
        if cfg.use_peft:
            lora = lora or adapter_of(cfg, name, {})
            add_adapter(model, lora)
            dropout = 0.0 if cfg.disable_dropout else lora.lora_dropout
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    standing = standing_bytes(model) if cfg.ranks == 1 else sharded_bytes(model, cfg.ranks)
    if other := vars(cfg).get("ref_model_name_or_path"):
        kind = "adapter" if Path(other, "adapter_config.json").exists() else "model"
        flags = dict.fromkeys(("model_name_or_path", "adapter_name_or_path"))
        flags |= {"ref_model_name_or_path": None, "use_peft": True, f"{kind}_name_or_path": other}
        frozen = shapes_of(replace(cfg, **flags)).standing
        kinds = "weights in few bits", "other frozen weights"
        standing["the reference's weights"] = sum(frozen[kind] for kind in kinds)
    one_graph = cfg.device != "cpu" and cfg.ranks == 1  # true for NVIDIA's cards since 2020
    compiled = compiles(cfg, model, one_graph)
    return Shapes(
        name, all_weights(model), trained, sizes_of(model), standing, compiled, dtype, dropout
    )


def freezer(kind: type, **settings) -> Callable[[nn.Linear, str], nn.Module]:
    """kind.from_linear for weights on the meta device. Each shape is packed only once."""

    @cache
    def packed(out_features: int, in_features: int, dtype: torch.dtype) -> nn.Module:
        layer = kind(in_features, out_features, dtype, **settings)
        layer.pack(torch.empty(out_features, in_features, dtype=dtype, device="meta"))
        return layer

    def freeze(linear: nn.Linear, name: str) -> nn.Module:
        layer = copy.deepcopy(packed(*linear.weight.shape, linear.weight.dtype))
        layer.bias = linear.bias
        return layer

    return freeze


@dataclass
class Footprint:
    """The memory of a run on a card."""

    kinds: dict[str, int]  # bytes by kind
    row: Row
    fits: bool

    @property
    def line(self) -> str:
        way = ", checkpointed" if self.row.checkpointing else ""
        return f"rows of {self.row.tokens:,} tokens{way}: {sum(self.kinds.values()) / GIB:.1f} GiB"


def footprint(cfg: Config, shapes: Shapes, card: float) -> Footprint:
    """The memory of a run on a card with `card` GB. If the flags do not say the length of rows or
    gradient checkpointing, they are chosen as the run would choose them."""
    cuda, sizes, standing = cfg.device != "cpu", shapes.sizes, dict(shapes.standing)
    if cuda:
        standing["CUDA's context"] = CONTEXT
        if cfg.optim == "paged_adamw_32bit" and cfg.ranks == 1:
            standing["AdamW's states"] = 0  # they are copied to the card when the row is freed
    row = Row(
        tokens=0,
        size=shapes.dtype.itemsize,
        dropout=shapes.dropout if cfg.lora_dropout or cfg.adapter_name_or_path else 0.0,
        compiled=shapes.compiled,
        train_all=not cfg.use_peft,
        chunk=rows_of_logits(sizes.vocabulary, cuda, card),
        sharded=cfg.ranks > 1,
        cuda=cuda,
        example=cfg.max_length,
    )
    example = cfg.max_length * (2 if cfg.method == "dpo" else 1)  # at most; DPO has two replies
    batch = cfg.per_device_train_batch_size * example
    loaded = sum(size for kind, size in standing.items() if kind not in COMING)
    left = bytes_for_a_row(card * GIB - loaded, standing)
    flags = cfg.max_row_tokens, cfg.gradient_checkpointing
    if not cuda:  # a run on a CPU does not choose by memory
        flags = cfg.max_row_tokens or ROW_TOKENS["cpu"], bool(cfg.gradient_checkpointing)
    tokens, checkpointing = fastest_fit(left, sizes, row, example, batch, *flags)
    tokens = min(max(tokens, example), batch)
    row = replace(row, tokens=tokens, checkpointing=checkpointing)
    needed = row_bytes(sizes, row)
    return Footprint(standing | needed, row, sum(needed.values()) <= left)


def rows_of_logits(vocabulary: int, cuda: bool, card: float) -> int:
    """How many positions a chunk of logits has; fewer on small cards."""
    if cuda:
        return gpu_rows(vocabulary, card * GIB)
    return chunk_rows(vocabulary, torch.device("cpu"))


def smaller(cfg: Config) -> Iterator[dict]:
    """Combinations of flags that may make the run smaller: {name: value}. The cheapest ones come
    first, and the very first one is empty."""
    offers = [{None: 0} | offer for offer in WAYS.values()]

    def cost(chosen):
        return sum(offer[value] for offer, value in zip(offers, chosen))

    for chosen in sorted(product(*offers), key=cost):
        new = {name: value for name, value in zip(WAYS, chosen) if value is not None}
        all_train = not (cfg.use_peft or "use_peft" in new)
        idle = {"lora_dropout", "load_in_4bit", "use_bnb_nested_quant"} if all_train else set()
        if cfg.adapter_name_or_path or cfg.disable_dropout:
            idle.add("lora_dropout")
        if idle.isdisjoint(new) and all(getattr(cfg, name) != new[name] for name in new):
            yield new


def report(cfg: Config) -> Iterator[str]:
    """The memory by kind on the smallest card that is large enough, and a line for each card."""
    known = {}  # {flags that change the model: its sizes}

    def run(cfg, card):
        double_quant = cfg.use_bnb_nested_quant and cfg.load_in_4bit
        key = cfg.use_peft, cfg.load_in_4bit, double_quant, cfg.ranks
        if key not in known:
            known[key] = shapes_of(cfg)
        return footprint(cfg, known[key], card)

    runs = {card: run(cfg, card) for card in CARDS}
    fitting = next((card for card in CARDS if runs[card].fits), CARDS[-1])
    (shapes,) = known.values()  # so far the user's flags only
    train, frozen = shapes.trained / 1e6, (shapes.weights - shapes.trained) / 1e6
    dtype = str(shapes.dtype).removeprefix("torch.")
    yield f"{shapes.name}: {train:,.1f} million weights train, {frozen:,.1f} are frozen; {dtype}"
    where = f" on {fitting} GB" if runs[fitting].fits else " (too much for one card)"
    yield runs[fitting].line + (where if cfg.device != "cpu" else "")
    for kind, size in runs[fitting].kinds.items():
        if size >= 0.005 * GIB:
            yield f"{size / GIB:8.2f}  {kind}"
    for card in CARDS if cfg.device != "cpu" else ():
        if runs[card].fits:
            yield f"{card:>4} GB  {runs[card].line}"
            continue
        others = ((new, run(replace(cfg, **new), card)) for new in smaller(cfg))
        new, other = next(((new, other) for new, other in others if other.fits), (None, None))
        way = f"with {words(new)}: {other.line}" if new else "no"
        parts = (n for n in (2, 4, 8, 16, 32, 64) if run(replace(cfg, ranks=n), card).fits)
        if cfg.ranks == 1 and (ranks := next(parts, None)):
            way += f"; or --fsdp on {ranks} cards"
        yield f"{card:>4} GB  {way}"


def words(new: dict) -> str:
    """{"load_in_4bit": True, "max_row_tokens": 512} as it is typed on a command line."""
    return " ".join(f"--{name} {value}".lower() for name, value in new.items())


def table(models: list[str]) -> Iterator[str]:
    """A table in Markdown with a line for each model and a column for each setup. A cell has the
    peak in GiB and the smallest card with so much memory."""
    yield "| | " + " | ".join(SETUPS) + " |"
    yield "|---" * (1 + len(SETUPS)) + "|"
    for name in models:
        cells = []
        for flags in SETUPS.values():
            argv = ["--model_name_or_path", name, *TABLE.split(), *flags.split()]
            cfg = parse(METHODS["sft"], argv, {})
            shapes = shapes_of(cfg)
            runs = {card: footprint(cfg, shapes, card) for card in CARDS}
            card = next((card for card in CARDS if runs[card].fits), None)
            peak = sum(runs[card or CARDS[-1]].kinds.values()) / GIB
            cells.append(f"{peak:.1f} ({card or '-'})")
        yield f"| {Path(name).stem} | " + " | ".join(cells) + " |"


@command("memory")
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["table"]:
        lines = table(argv[1:])
    elif argv and argv[0] in METHODS:
        lines = report(parse(METHODS[argv[0]], argv[1:], {}))
    else:
        lines = report(parse(METHODS["sft"], argv, {}))
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
