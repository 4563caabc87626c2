"""Adapters in PEFT's format. PEFT opens what is written here, and its adapters open here.

    adapter_model.safetensors    everything that trains, in fp32, under PEFT's names
    adapter_config.json          the settings: rank, target layers, scale (LoRAConfig)

PEFT warns of a missing tensor, and ignores one that it does not expect. Here both are errors, and a
setting that this code does not know is refused. If tokens were added before training, PEFT saves
the whole embedding and head as well; such tables are read here, and saved again unchanged.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanoalign import InputError
from nanoalign.formats.files import is_finite
from nanoalign.formats.mixture import Experts
from nanoalign.lora import (
    LoRALinear,
    TokenRows,
    add_token_rows,
    linear_names,
    plain,
    put,
    scales,
    table_paths,
    tied,
)
from nanoalign.nf4 import FrozenLinear

PREFIX = "base_model.model."  # before every tensor's name in PEFT's files


@dataclass
class LoRAConfig:
    """What adapter_config.json says of an adapter, in PEFT's words."""

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: list[str] | str = "all-linear"  # names, a regex, or all-linear
    exclude_modules: list[str] | str = field(default_factory=list)  # names or a regex: no LoRA
    layers_to_transform: list[int] | int = field(default_factory=list)  # numbers; none: all
    layers_pattern: list[str] | str = field(default_factory=list)  # names before the numbers
    rank_pattern: dict[str, int] = field(default_factory=dict)  # {name or regex: its r}
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False  # scale by alpha / sqrt(r) (arXiv 2312.03732)
    bias: str = "none"  # none, lora_only, all: the biases that train
    modules_to_save: list[str] = field(default_factory=list)  # all their weights train
    ensure_weight_tying: bool = False  # tied tables stay tied if all their weights train
    trainable_token_indices: dict[str, list[int]] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    # Not in the file:
    source: str = "--lora_"  # where the settings are from; errors put it before a setting's name
    tables: dict[str, Tensor] = field(default_factory=dict)  # an adapter's whole tables, frozen


def ending_in(name: str, paths: Iterable[str]) -> list[str]:
    """The paths that end in a name: q_proj, or self_attn.q_proj."""
    return [path for path in paths if f".{path}".endswith(f".{name}")]


PATIENCE = 10  # seconds for a regex
MATCH = """import json, re, sys
patterns, paths = json.load(sys.stdin)
print(json.dumps([[path for path in paths if re.fullmatch(p, path)] for p in patterns]))"""


def matches(patterns: list[str], paths: list[str], name: str) -> list[list[str]]:
    """The paths that each regex matches; `name` is that of the setting, for errors.

    A regex can search for hours, and Python can't stop it. An adapter from elsewhere may hold such
    a regex, so another process does the search.
    """
    command, asked = [sys.executable, "-I", "-c", MATCH], json.dumps([patterns, paths])
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"{name}: as a regex it takes more than {PATIENCE} seconds") from None
    if done.returncode:
        raise InputError(f"{name}: no regex: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def target_names(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The paths of the layers that get LoRA: linear layers, embedding and output head.

    "all-linear" means all linear layers but the head. A name means each layer whose path ends in
    it. A string that is no such name is a regex for the whole path. Left out are the experts of a
    mixture, and what `exclude_modules` and `modules_to_save` name. InputError if nothing is left,
    or if a name of --lora_target_modules is that of no layer.
    """
    experts = [f"{path}." for path, m in model.named_modules() if isinstance(m, Experts)]
    linear = [path for path in linear_names(model) if not path.startswith(tuple(experts))]
    paths = [path for path, _ in model.named_modules() if path in {*linear, *table_paths(model)}]
    target, setting = config.target_modules, f"{config.source}target_modules"
    names = [target] if isinstance(target, str) else target
    found = {each: ending_in(each, paths) for each in names}
    if target == "all-linear":
        found = {target: linear}
    elif isinstance(target, str) and not found[target]:
        found = {target: matches([target], paths, f"{setting} {target:.80}")[0]}
    hits = set().union(*found.values())
    missing = [each for each in names if not found[each]]
    if missing and (not hits or config.source == LoRAConfig.source):
        known = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
        raise InputError(f"{setting} {missing[0]:.80}: no linear layer; there are: {known}")
    hits = {path for path in hits if isinstance(target, str) or in_layers(path, config)}
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        hits.difference_update(*matches([excluded], paths, f"{config.source}exclude_modules"))
    else:
        hits.difference_update(*(ending_in(each, paths) for each in excluded))
    saved = [f".{each}." for each in config.modules_to_save]
    hits = {path for path in hits if not any(part in f".{path}." for part in saved)}
    if not hits:
        raise InputError(f"{setting}: no layer is left for LoRA")
    return [path for path in paths if path in hits]


def in_layers(path: str, config: LoRAConfig) -> bool:
    """Is a path in one of the layers whose numbers `layers_to_transform` lists? The number is the
    first in the path, or the one after a name of `layers_pattern`."""
    wanted, before = config.layers_to_transform, config.layers_pattern
    wanted, before = ([v] if isinstance(v, (int, str)) else v for v in (wanted, before))
    starts = [rf"(?:.*?\.)?{re.escape(each)}" for each in before] or [r".*?\.[^.]*"]
    number = next(filter(None, (re.match(rf"{start}\.(\d+)\.", path) for start in starts)), None)
    listed = bool(number) and int(number[1]) in wanted
    return not wanted or path in config.target_modules or listed


def by_layer(pattern: dict, default: float, paths: list[str], name: str) -> dict[str, float]:
    """{path: value}, by the first name or regex of `pattern` that matches the path, or else the
    default."""
    if all(re.fullmatch(r"[\w.]+", key) for key in pattern):
        hits = [ending_in(key, paths) for key in pattern]
    else:
        hits = matches([rf"(.*\.)?({key})" for key in pattern], paths, name)
    values = dict.fromkeys(paths, default)
    for value, found in reversed([*zip(pattern.values(), hits)]):
        values |= dict.fromkeys(found, value)
    return values


class LoRAHead(LoRALinear):
    """LoRA on the output head. Training multiplies by the weight of a head and does not call it
    (logps.py), so the sum of weight and change is made at each use: (V, d), without dropout."""

    @property
    def weight(self) -> Tensor:
        weight = self.base_layer.weight
        if not self.enabled or hasattr(weight, "placements"):  # as in TokenRows.weight
            return weight
        return (weight + self.delta()).requires_grad_()  # else its mean would be cached

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias


class LoRAEmbedding(nn.Module):
    """LoRA on an embedding: base_layer(ids) + scaling * B A[:, ids]. As in PEFT, A (r, V) starts at
    zero and B (d, r) normal."""

    def __init__(self, base_layer: nn.Embedding, r: int, scaling: float):
        super().__init__()
        self.base_layer, self.scaling, (v, d) = base_layer, scaling, base_layer.weight.shape
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, v))
        self.lora_embedding_B = nn.Parameter(torch.randn(d, r))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., d)
        y = self.base_layer(ids)
        change = F.embedding(ids, self.lora_embedding_A.T) @ self.lora_embedding_B.T
        if scales(self.base_layer):
            change = change * self.base_layer.embed_scale
        return (y + self.scaling * change).to(y.dtype)

    def merge(self) -> nn.Module:
        table = plain(self.base_layer).float()
        delta = self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T  # (V, d)
        table.weight = nn.Parameter(table.weight + delta, requires_grad=False)  # it may be tied
        return table


class TrainedModule(nn.Module):
    """A module with trained parameters `names`, in fp32; they are cast to `dtype` at each use. In a
    module of modules_to_save these are all parameters, otherwise a bias."""

    def __init__(self, module: nn.Module, names: list[str], dtype: torch.dtype):
        super().__init__()
        self.modules_to_save, self.names, self.dtype = module, names, dtype
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
        return plain(self.modules_to_save)  # its trained parameters are in fp32


def add_adapter(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freeze the model, and add what trains. Returns the paths of the layers with LoRA."""
    saved, names = paths_to_save(model, config), target_names(model, config)
    if both := [path for path in saved if path in names]:
        raise InputError(f"{config.source}modules_to_save {both[0]}: is a layer that LoRA trains")
    tables, one_table = table_paths(model), tied(model)
    model.requires_grad_(False)
    ranks = by_layer(config.rank_pattern, config.r, names, f"{config.source}rank_pattern")
    alphas = by_layer(
        config.alpha_pattern, config.lora_alpha, names, f"{config.source}alpha_pattern"
    )
    for name in names:
        base, r = model.get_submodule(name), ranks[name]
        scaling = alphas[name] / (math.sqrt(r) if config.use_rslora else r)
        if isinstance(base, nn.Embedding):
            put(model, name, LoRAEmbedding(base, r, scaling))
        else:
            kind = LoRAHead if name in tables else LoRALinear
            put(model, name, kind(base, r, scaling, config.lora_dropout))
    if one_table and config.ensure_weight_tying and not tables.keys().isdisjoint(saved):
        saved = [*dict.fromkeys((*saved, *tables))]
    dtypes = {path: next(model.get_submodule(path).parameters()).dtype for path in saved}
    for path, dtype in dtypes.items():
        module = model.get_submodule(path)
        if path in tables and tied(model) and not config.ensure_weight_tying:
            # otherwise training the one of them would change the other
            module.weight = nn.Parameter(module.weight.detach().clone())
        every = [n for n, _ in module.named_parameters()]
        model.set_submodule(path, TrainedModule(module, every, dtype))
    if config.trainable_token_indices:
        add_token_rows(model, config.trainable_token_indices)
    ends = {"none": (), "lora_only": ".base_layer.bias", "all": ".bias"}[config.bias]
    biases = [n for n, p in model.named_parameters() if n.endswith(ends) and not p.requires_grad]
    for path in (name.removesuffix(".bias") for name in biases):
        layer = model.get_submodule(path)
        model.set_submodule(path, TrainedModule(layer, ["bias"], layer.bias.dtype))
    return names


def is_layer(module: nn.Module) -> bool:
    """Is a module a decoder layer of transformers?"""
    # late: this import loads torch's compiler, and --help would take two seconds more
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def paths_to_save(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The paths that end in a name of `modules_to_save`, of modules that train with all weights. As
    in PEFT "norm" means each "input_layernorm", too. InputError for what can't train so."""
    paths = [path for path, _ in model.named_modules()]
    hits = {name: [p for p in paths if p.endswith(name)] for name in config.modules_to_save}
    saved = [*dict.fromkeys(path for found in hits.values() for path in found)]
    for name, found in hits.items():
        modules = [m for path in found for m in model.get_submodule(path).modules()]
        inside = tuple(f"{path}." for path in found)
        if not found:
            fault = "the model has no module of that name"
        elif any(isinstance(m, nn.ModuleList) or is_layer(m) for m in modules):
            fault = "holds whole layers; expected a module inside of them"
        elif any(isinstance(m, FrozenLinear) for m in modules):
            fault = "is in 4 bits, and can't train"
        elif any(not [*model.get_submodule(path).parameters()] for path in found):
            fault = "has no weights"
        elif any(path.startswith(inside) for path in saved):
            fault = "holds another module that is named"
        else:
            continue
        raise InputError(f"{config.source}modules_to_save {name:.80}: {fault}")
    return saved


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """{PEFT's name: parameter} of all that trains. Tied tables are there twice if all their weights
    train, and once if only rows do."""
    found, rows = {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and parameter not in rows:
            found[PREFIX + name.replace(".modules_to_save.", ".")] = parameter
            if name.endswith(".trainable_tokens_delta"):
                rows.add(parameter)
    return found


def save_adapter(model: nn.Module, config: LoRAConfig, directory: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them."""
    tensors, seen = dict(config.tables), set()
    for name, parameter in trained_tensors(model).items():
        tensor = parameter.detach().cpu().contiguous()
        tensors[name] = tensor.clone() if parameter in seen else tensor  # in a file nothing is tied
        seen.add(parameter)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = config.target_modules
    layers = [n for n, m in model.named_modules() if isinstance(m, (LoRALinear, LoRAEmbedding))]
    if targets == "all-linear":  # so that the file names the layers
        targets = sorted({name.rpartition(".")[2] for name in layers})
    elif isinstance(targets, str) and ending_in(targets, layers):
        targets = [targets]  # PEFT would read a string as a regex
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    settings |= {k: v for k, v in vars(config).items() if k in FIELDS and v not in ([], {}, None)}
    settings["target_modules"] = targets
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _rows(value) -> bool:
    tables = list(value.values()) if isinstance(value, dict) else [value]
    lists = all(isinstance(rows, list) for rows in tables)
    return lists and all(type(row) is int and row >= 0 for rows in tables for row in rows)


def _rank(value) -> bool:
    return type(value) is int and 0 < value < 2**16


def _alpha(value) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def _each(value, right: Callable) -> bool:
    return isinstance(value, dict) and all(map(right, value.values()))


NAMES = "names, or a regex", lambda v: isinstance(v, str) or _names(v)
FLAG = "true or false", lambda v: isinstance(v, bool)
FIELDS = {  # of adapter_config.json: the valid values, in words and in code
    "r": ("a whole number from 1 to 65535", _rank),
    "lora_alpha": ("a number above 0", _alpha),
    "lora_dropout": ("a number from 0 to below 1",
                     lambda v: type(v) in (int, float) and 0 <= v < 1),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_to_transform": ("numbers of layers", lambda v: type(v) is int or _rows(v)),
    "layers_pattern": ("names", lambda v: isinstance(v, str) or _names(v)),
    "rank_pattern": ("a rank for each name", lambda v: _each(v, _rank)),
    "alpha_pattern": ("a number above 0 for each name", lambda v: _each(v, _alpha)),
    "use_rslora": FLAG,
    "bias": ("none, lora_only or all", lambda v: v in ("none", "lora_only", "all")),
    "modules_to_save": ("a list of names", _names),
    "ensure_weight_tying": FLAG,
    "trainable_token_indices": ("ids, in a list or in one for each table", _rows),
    "base_model_name_or_path": ("a name", lambda v: isinstance(v, str) and len(v) < 1024),
}  # fmt: skip
IDLE = ("peft_type", "task_type", "inference_mode", "peft_version", "revision", "auto_mapping",
        "megatron_core", "qalora_group_size")  # fmt: skip


def read_adapter_config(directory: Path) -> LoRAConfig:
    """PEFT's adapter_config.json. InputError for a setting that is not known here."""
    path = Path(directory) / "adapter_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{directory}: no adapter_config.json: not an adapter directory") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: no JSON object; expected PEFT's adapter_config.json")
    if found.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {found.get('peft_type')}; only LORA is known here")
    start = found.pop("init_lora_weights", True)  # PiSSA, OLoRA and others change the base, too
    if start not in (True, False, "gaussian", "orthogonal"):
        raise InputError(f"{path}: init_lora_weights {start} is not known here")
    settings = {k: v for k, v in found.items() if k in FIELDS and v is not None}
    for key, value in found.items():
        if value and key not in FIELDS and key not in IDLE:  # use_dora, lora_bias, ...
            raise InputError(f"{path}: {key} is not known here")
        if key in settings and not FIELDS[key][1](value):
            raise InputError(f"{path}: {key} is {value!r:.80}; expected {FIELDS[key][0]}")
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}  # PEFT's
    config = LoRAConfig(**defaults | settings)
    config.source = f"{path}: "
    if isinstance(config.trainable_token_indices, list):  # PEFT's short form, for the embedding
        config.trainable_token_indices = {"embed_tokens": config.trainable_token_indices}
    return config


def other_tables(model: nn.Module) -> dict[str, nn.Parameter | None]:
    """What PEFT may save of embedding and head beside the trained tensors: {its name: the frozen
    parameter}, or None if the tensor is not needed."""
    found = {}
    for path, table in table_paths(model).items():
        for name, parameter in table.named_parameters():
            if isinstance(table, TokenRows):
                name = name.replace("base_layer.", "token_adapter.base_layer.")
            name = f"{PREFIX}{path}.{name}"
            if not parameter.requires_grad:
                found[name.replace(".modules_to_save.", ".")] = parameter
            else:  # a table that trains, and the copy of it as it was; or the rows of a tied head
                found[name] = found[name.replace("modules_to_save", "original_module")] = None
    return found


def read_tensors(directory: Path, name="adapter_model.safetensors") -> dict[str, Tensor]:
    """The tensors of an adapter, mapped into memory."""
    path = Path(directory) / name
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: not there") from None
    except (SafetensorError, OSError) as error:  # OSError: a directory
        raise InputError(f"{path}: damaged: {error}") from None


def table_rows(model: nn.Module, directory: Path) -> int | None:
    """The number of rows of the embedding or head in an adapter's file, if there is one."""
    starts = tuple(f"{PREFIX}{path}." for path in table_paths(model))
    for name, tensor in read_tensors(directory).items():
        is_table = name.startswith(starts) and name.endswith(".weight") and tensor.dim() == 2
        if is_table and ".lora_" not in name:
            return len(tensor)
    return None


def load_adapter(model: nn.Module, config: LoRAConfig, directory: Path) -> None:
    """Fill what trains from an adapter's file. InputError if the file lacks a tensor of it, or has
    another one. Whole tables in the file fill those of the base, and are kept in config.tables."""
    path, found = Path(directory) / "adapter_model.safetensors", read_tensors(directory)
    wanted, tables = trained_tensors(model), other_tables(model)
    extra = found.keys() - wanted.keys() - tables.keys()
    for what, rest in {"lacks": wanted.keys() - found.keys(), "also has": extra}.items():
        if rest:
            what = f"{what} {len(rest)} tensors, e.g. {min(rest).removeprefix(PREFIX)}"
            raise InputError(f"{path}: {what}: an adapter of another base or configuration?")
    kept = {name: p for name, p in tables.items() if name in found and p is not None}
    config.tables = {name: found[name] for name in kept}
    for name, parameter in (kept | wanted).items():
        tensor, short = found[name], name.removeprefix(PREFIX)
        if tensor.shape != parameter.shape:
            fault = f"has shape {tuple(tensor.shape)}, here it is {tuple(parameter.shape)}"
            raise InputError(f"{path}: {short} {fault}: an adapter of another base?")
        if not tensor.is_floating_point() or not is_finite(tensor.to(parameter.dtype)):
            raise InputError(f"{path}: {short} holds what is no finite number")
        parameter.data.copy_(tensor)
