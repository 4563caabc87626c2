"""What fits where: python -m nanoalign.memory [sft | dpo | kto] --model_name_or_path M [FLAGS]

The bytes that a run would hold, by kind, and which cards have them. FLAGS are those of the script
(train_sft.py, if none is named) with which it is to run. Of the model its config is enough: in a
directory, on the hub, or a config.json by itself. No weight is read.

    python -m nanoalign.memory table M [M ...]       the peaks of several models, side by side
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

from nanoalign.formats.bitsandbytes import is_nf4
from nanoalign.formats.files import from_pretrained
from nanoalign.formats.peft import add_adapter
from nanoalign.formats.weights import FORMATS, all_weights, freeze_linears, skeleton
from nanoalign.logps import fast as head
from nanoalign.packing import ROW_TOKENS
from nanoalign.run.bytes import How, Sizes, row_bytes, sizes_of, standing_bytes
from nanoalign.run.flags import Config, DPOConfig, KTOConfig, SFTConfig, flag, parse
from nanoalign.run.policy import adapter_of, base_of
from nanoalign.run.session import command

CARDS = 8, 16, 24, 48, 80, 141  # GB
USABLE = 0.95  # of a card; the rest is lost in gaps between tensors
CONTEXT = 600 * 2**20  # CUDA's own and its libraries': an estimate
GIB = 2**30

METHODS = {  # each script's flags; of its data this tool needs none
    kind.__name__.removesuffix("Config").lower(): make_dataclass(
        kind.__name__, [("dataset_name", list[str], flag(["any"], "is not read"))], bases=(kind,)
    )
    for kind in (SFTConfig, DPOConfig, KTOConfig)
}
WAYS = {  # flags that make a run smaller, and what their values cost: time, exactness, freedom
    "use_bnb_nested_quant": {True: 1},
    "max_row_tokens": {2048: 1, 1024: 3, 512: 6},
    "lora_dropout": {0.0: 2},
    "gradient_checkpointing": {True: 4},
    "optim": {"paged_adamw_32bit": 4},
    "load_in_4bit": {True: 8},
    "use_peft": {True: 32},
}
SETUPS = {  # the columns of the table
    "4 bits, checkpointed": "--load_in_4bit --use_bnb_nested_quant --gradient_checkpointing",
    "4 bits": "--load_in_4bit",
    "LoRA, checkpointed": "--gradient_checkpointing",
    "LoRA": "",
    "all weights, checkpointed, paged": (
        "--use_peft false --gradient_checkpointing --optim paged_adamw_32bit"
    ),
    "all weights": "--use_peft false",
}


@dataclass
class Shapes:
    """What there is to know of a model that the flags describe, without its weights."""

    name: str
    weights: int
    trained: int
    sizes: Sizes
    standing: dict[str, int]  # bytes by kind
    dtype: torch.dtype  # to compute in
    dropout: float  # before each A


def shapes_of(cfg: Config) -> Shapes:
    """The model and all that trains on it, built on the meta device; and the reference's model."""
    name, _, lora = base_of(cfg)
    config = from_pretrained(AutoConfig, name, trust_remote_code=cfg.trust_remote_code)
    dtype = getattr(config, "dtype", None) if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    four_bit, dtype = cfg.load_in_4bit or is_nf4(config), dtype or torch.float32
    if is_nf4(config):
        del config.quantization_config  # it would call for bitsandbytes' own layers
    own = dtype if cfg.use_peft else torch.float32
    model, dropout = skeleton(config, own, cfg.trust_remote_code), 0.0
    model.requires_grad_(not cfg.use_peft)
    with torch.device("meta"):
        if four_bit:
            how = {"double_quant": True} if cfg.use_bnb_nested_quant else {}
            freeze_linears(model, "meta", freezer(FORMATS[cfg.bnb_4bit_quant_type], **how))
        if cfg.use_peft:
            lora = lora or adapter_of(cfg, name, {})
            add_adapter(model, lora)
            dropout = 0.0 if cfg.disable_dropout else lora.lora_dropout
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    standing = standing_bytes(model)
    if other := vars(cfg).get("ref_model_name_or_path"):
        how = {"ref_model_name_or_path": None, "adapter_name_or_path": None}
        frozen = shapes_of(replace(cfg, model_name_or_path=other, **how)).standing
        kinds = "weights in few bits", "other frozen weights"
        standing["the reference's weights"] = sum(frozen[kind] for kind in kinds)
    return Shapes(name, all_weights(model), trained, sizes_of(model), standing, dtype, dropout)


def freezer(kind: type, **how) -> Callable[[nn.Linear, str], nn.Module]:
    """As kind.from_linear, for weights without memory; each shape is packed once."""

    @cache
    def packed(out_features: int, in_features: int, dtype: torch.dtype) -> nn.Module:
        layer = kind(in_features, out_features, dtype, **how)
        layer.pack(torch.empty(out_features, in_features, dtype=dtype, device="meta"))
        return layer

    def freeze(linear: nn.Linear, name: str) -> nn.Module:
        layer = copy.deepcopy(packed(*linear.weight.shape, linear.weight.dtype))
        layer.bias = linear.bias
        return layer

    return freeze


def count(cfg: Config, shapes: Shapes, card: float) -> dict[str, int]:
    """A run's bytes by kind, on a card of so many GB: a small one gets smaller chunks of logits."""
    cuda = cfg.device != "cpu"
    how = How(
        tokens=longest_row(cfg, cuda),
        size=shapes.dtype.itemsize,
        dropout=shapes.dropout if cfg.lora_dropout or cfg.adapter_name_or_path else 0.0,
        checkpointing=cfg.gradient_checkpointing,
        compiled=cfg.torch_compile,
        train_all=not cfg.use_peft,
        chunk=rows_of_logits(shapes.sizes.vocabulary, cuda, card),
        cuda=cuda,
        example=cfg.max_length,
    )
    kinds = shapes.standing | row_bytes(shapes.sizes, how)
    if cfg.optim == "paged_adamw_32bit" and cuda:  # a part of them comes when the row is gone
        kinds["AdamW's states"] = 0
    if cuda:
        kinds["CUDA's context"] = CONTEXT
    return kinds


def longest_row(cfg: Config, cuda: bool) -> int:
    """Tokens of the longest row: as long as rows may be, but no longer than a batch, nor shorter
    than an example, which is not cut. A pair may be as long as two completions."""
    example = cfg.max_length * (2 if cfg.method == "dpo" else 1)
    limit = cfg.max_row_tokens or ROW_TOKENS["gpu" if cuda else "cpu"]
    return min(max(limit, example), cfg.per_device_train_batch_size * example)


def rows_of_logits(vocabulary: int, cuda: bool, card: float) -> int:
    if cuda:
        return head.gpu_rows(vocabulary, card * GIB)
    return head.chunk_rows(vocabulary, torch.device("cpu"))


def smaller(cfg: Config) -> Iterator[dict]:
    """Flags that may make the run smaller, alone and together: {name: value}. Those come first that
    cost least; the very first are none."""
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
    """The table, line by line."""

    known = {}  # models by the flags that make them

    def count_for(cfg, card):
        key = cfg.use_peft, cfg.load_in_4bit, cfg.use_bnb_nested_quant and cfg.load_in_4bit
        if key not in known:
            known[key] = shapes_of(cfg)
        return count(cfg, known[key], card)

    kinds = count_for(cfg, CARDS[-1])
    (shapes,), cuda = known.values(), cfg.device != "cpu"
    train, frozen = shapes.trained / 1e6, (shapes.weights - shapes.trained) / 1e6
    dtype = str(shapes.dtype).removeprefix("torch.")
    yield f"{shapes.name}: {train:,.1f} million weights train, {frozen:,.1f} are frozen"
    yield f"rows of {longest_row(cfg, cuda):,} tokens, computed in {dtype}"
    yield "     GiB"
    for kind, size in kinds.items():
        if size:
            yield f"{size / GIB:8.2f}  {kind}"
    yield f"{sum(kinds.values()) / GIB:8.2f}  at its largest"
    for card in CARDS if cuda else ():
        needed, there = sum(count_for(cfg, card).values()) / GIB, USABLE * card
        line = f"{card:>4} GB  "
        if needed <= there:
            yield f"{line}fits: {needed:.2f}"
            continue
        for new in smaller(cfg):
            needed = sum(count_for(replace(cfg, **new), card).values()) / GIB
            if needed <= there:
                yield f"{line}fits with {words(new)}: {needed:.2f}"
                break
        else:
            yield f"{line}no"


def words(new: dict) -> str:
    """{"load_in_4bit": True, "max_row_tokens": 512} as it is typed."""
    return " ".join(f"--{name} {value}".lower() for name, value in new.items())


def table(models: list[str]) -> Iterator[str]:
    """Markdown: a line for each model, a column for each setup, and in it the peak in GiB and the
    smallest card that has so much."""
    yield "| | " + " | ".join(SETUPS) + " |"
    yield "|---" * (1 + len(SETUPS)) + "|"
    for name in models:
        cells = []
        for flags in SETUPS.values():
            cfg = parse(METHODS["sft"], ["--model_name_or_path", name, *flags.split()], {})
            shapes = shapes_of(cfg)
            peaks = {card: sum(count(cfg, shapes, card).values()) / GIB for card in CARDS}
            card = next((card for card in CARDS if peaks[card] <= USABLE * card), None)
            cells.append(f"{peaks[card or CARDS[-1]]:.1f} ({card or '-'})")
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
