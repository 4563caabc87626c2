"""Adapters in PEFT's format: what is written here opens there and the other way round.

    adapter_model.safetensors    everything that trains, in fp32, under PEFT's names
    adapter_config.json          where it belongs: rank, targets, scale (LoRAConfig)

PEFT warns of a missing tensor and ignores one too many; here both are errors, and a setting that
this code does not know is refused, never left out.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanoalign import InputError
from nanoalign.formats.experts import outside_experts
from nanoalign.lora import LoRALinear, add_lora, add_token_rows, linear_names, plain, tied
from nanoalign.nf4 import FrozenLinear

PREFIX = "base_model.model."  # before every tensor's name in PEFT's files


@dataclass
class LoRAConfig:
    """What adapter_config.json says of an adapter, in PEFT's words."""

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: list[str] | str = "all-linear"  # names, a regex, or all-linear
    use_rslora: bool = False  # scale by alpha / sqrt(r) (arXiv 2312.03732)
    bias: str = "none"  # none, lora_only, all: the biases that train
    modules_to_save: list[str] = field(default_factory=list)  # modules that train whole
    trainable_token_indices: dict[str, list[int]] = field(default_factory=dict)
    base_model_name_or_path: str | None = None

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def target_names(model: nn.Module, target: list[str] | str) -> list[str]:
    """The names of the linear layers that PEFT's target_modules means.

    "all-linear": all but the output head. A name means each layer whose path ends in it; a string
    that is no layer's name is a regex for the whole path. What hits nothing is an InputError. A
    mixture's experts are never meant (experts.py).
    """
    paths, hits = outside_experts(model, linear_names(model)), set()
    if target == "all-linear":
        return paths
    patterns = [target] if isinstance(target, str) else target
    for pattern in patterns:
        found, fault = ending_in(pattern, paths), "no linear layer; there are: "
        try:
            if not found and len(patterns) == 1:
                found = [path for path in paths if re.fullmatch(pattern, path)]
            fault += ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
        except re.error as error:
            fault = f"no regex: {error}"
        if not found:
            raise InputError(f"--lora_target_modules {pattern}: {fault}")
        hits.update(found)
    return [path for path in paths if path in hits]


def ending_in(name: str, paths: Iterable[str]) -> list[str]:
    """The modules that a name means: `q_proj`, or as much of the path before it as you like."""
    return [path for path in paths if f".{path}".endswith(f".{name}")]


class TrainedModule(nn.Module):
    """A module of which some parameters train: kept in fp32, cast to its own dtype at each use.

    PEFT's modules_to_save train whole; of a layer whose bias trains it is the bias alone.
    """

    def __init__(self, module: nn.Module, names: list[str]):
        super().__init__()
        self.dtype = next(module.parameters()).dtype
        self.modules_to_save, self.names = module, names
        for name in names:
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    @property
    def weight(self) -> Tensor:
        return self.modules_to_save.weight

    @property
    def bias(self) -> Tensor | None:
        return self.modules_to_save.bias

    def forward(self, *args, **kwargs):
        cast = {n: self.modules_to_save.get_parameter(n).to(self.dtype) for n in self.names}
        return torch.func.functional_call(self.modules_to_save, cast, args, kwargs)

    def merge(self) -> nn.Module:
        return plain(self.modules_to_save)  # what trained is in fp32 there


def add_adapter(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freeze the model and give it what `config` lets train. Returns the names of LoRA layers."""
    names = target_names(model, config.target_modules)
    add_lora(model, config.r, config.scaling, config.lora_dropout, names)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    for name in config.modules_to_save:
        paths = ending_in(name, dict(model.named_modules()))
        if not paths:
            raise InputError(f"--lora_modules_to_save {name}: the model has no module of that name")
        for path in paths:
            module = model.get_submodule(path)
            if any(isinstance(m, FrozenLinear) for m in module.modules()):
                raise InputError(f"--lora_modules_to_save {name}: is in 4 bits, and can't train")
            if any(module is table for table in tables) and tied(model):
                # a head that trains on its own is no longer the embedding, nor the other way round
                module.weight = nn.Parameter(module.weight.detach().clone())
            every = [n for n, _ in module.named_parameters()]
            model.set_submodule(path, TrainedModule(module, every))
    add_token_rows(model, config.trainable_token_indices)
    ends = {"none": (), "lora_only": ".base_layer.bias", "all": ".bias"}[config.bias]
    for name in [n for n, _ in model.named_parameters() if n.endswith(ends)]:
        path = name.removesuffix(".bias")
        model.set_submodule(path, TrainedModule(model.get_submodule(path), ["bias"]))
    return names


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The base model: every LoRA layer switched off."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's name of everything that trains -> the parameter."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {PREFIX + n.replace(".modules_to_save.", "."): p for n, p in named.items()}


def save_adapter(model: nn.Module, config: LoRAConfig, directory: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them."""
    tensors = {n: p.detach().cpu().contiguous() for n, p in trained_tensors(model).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = config.target_modules
    layers = [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    if targets == "all-linear":  # PEFT reads it too, but says what it means only after loading
        targets = sorted({name.rpartition(".")[2] for name in layers})
    elif isinstance(targets, str) and ending_in(targets, layers):
        targets = [targets]  # one name: a string by itself is a regex to PEFT
    text = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    text |= {k: None if v in ([], {}) else v for k, v in vars(config).items()}
    text["target_modules"] = targets
    (directory / "adapter_config.json").write_text(json.dumps(text, indent=2) + "\n")


def _names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _rows(value) -> bool:
    tables = list(value.values()) if isinstance(value, dict) else [value]
    lists = all(isinstance(rows, list) for rows in tables)
    return lists and all(type(row) is int and row >= 0 for rows in tables for row in rows)


NUMBER = (int, float)
FIELDS = {  # of adapter_config.json: what it may be, in words and in code
    "r": ("a whole number from 1 to 65535", lambda v: type(v) is int and 0 < v < 2**16),
    "lora_alpha": ("a number above 0", lambda v: type(v) in NUMBER and 0 < v < 1e30),
    "lora_dropout": ("a number from 0 to below 1", lambda v: type(v) in NUMBER and 0 <= v < 1),
    "target_modules": ("names", lambda v: isinstance(v, str) or _names(v)),
    "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
    "bias": ("none, lora_only or all", lambda v: v in ("none", "lora_only", "all")),
    "modules_to_save": ("a list of names", _names),
    "trainable_token_indices": ("ids, in a list or in one for each table", _rows),
    "base_model_name_or_path": ("a name", lambda v: isinstance(v, str)),
}
IDLE = ("peft_type", "task_type", "inference_mode", "peft_version", "revision", "auto_mapping",
        "megatron_core", "qalora_group_size")  # fmt: skip


def read_adapter_config(directory: Path) -> LoRAConfig:
    """PEFT's adapter_config.json; what this file can't do is refused, never left out."""
    path = Path(directory) / "adapter_config.json"
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{directory}: no adapter_config.json: not an adapter directory") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(text, dict):
        raise InputError(f"{path}: no JSON object; expected PEFT's adapter_config.json")
    if text.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {text.get('peft_type')}; only LORA is known here")
    start = text.pop("init_lora_weights", True)  # PiSSA, OLoRA and others change the base as well
    if start not in (True, False, "gaussian", "orthogonal"):
        raise InputError(f"{path}: init_lora_weights {start} is not known here")
    given = {k: v for k, v in text.items() if k in FIELDS and v is not None}
    for key, value in text.items():
        if value and key not in FIELDS and key not in IDLE:  # use_dora, rank_pattern, ...
            raise InputError(f"{path}: {key} is not known here")
        if key in given and not FIELDS[key][1](value):
            raise InputError(f"{path}: {key} is {value!r}; expected {FIELDS[key][0]}")
    config = LoRAConfig(**{"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, **given})  # PEFT's own
    if isinstance(config.trainable_token_indices, list):  # of the embedding, PEFT's short form
        config.trainable_token_indices = {"embed_tokens": config.trainable_token_indices}
    return config


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Fill what trains from an adapter file that holds exactly that, or raise InputError."""
    path, wanted = Path(directory) / "adapter_model.safetensors", trained_tensors(model)
    try:
        found = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: not there") from None
    except (SafetensorError, OSError) as error:  # an OSError of a directory, say
        raise InputError(f"{path}: damaged: {error}") from None
    others = {"lacks": wanted.keys() - found.keys(), "also has": found.keys() - wanted.keys()}
    for what, rest in others.items():
        if rest:
            what = f"{what} {len(rest)} tensors, e.g. {min(rest).removeprefix(PREFIX)}"
            raise InputError(f"{path}: {what}: an adapter of another base or configuration?")
    for name, parameter in wanted.items():
        tensor, short = found[name], name.removeprefix(PREFIX)
        if tensor.shape != parameter.shape:
            fault = f"has shape {tuple(tensor.shape)}, here it is {tuple(parameter.shape)}"
            raise InputError(f"{path}: {short} {fault}: an adapter of another base?")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"{path}: {short} holds what is no finite number")
        parameter.data.copy_(tensor)
