"""LoRA: train a low-rank change of frozen weights, and keep the reference for free.

LoRA (Hu et al. 2021, arXiv 2106.09685) leaves a layer's weight W as it is and learns a change of
rank r beside it:

    y = W x + (alpha / r) * B A x        A: (r, in), B: (out, r), B = 0 at the start

With r = 16 and a 4096 x 4096 weight that is 131 thousand trained numbers instead of 16.8 million,
and so much less memory for gradients and optimizer states. Since B = 0 the model starts as itself,
and switching the change off gives the model as it was: DPO's and KTO's reference costs nothing.

Everything here wraps modules and patches nothing. The names of the wrappers' parameters are those
of PEFT, so that "what trains" and "what an adapter file holds" are the same list: an adapter
written here opens there and the other way round. Trained weights are fp32 whatever the base is.
PEFT warns of a missing tensor and ignores one too many; here both are errors.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nanoalign import InputError

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


class Dropout(nn.Dropout):
    """nn.Dropout, but on a CPU an element's fate is 16 random bits: torch draws a double there,
    which takes as long as the layer's product. p is rounded to 1/65536, and the scale fits it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or not x.is_cpu:
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view_as(x)  # uniform on [-2^15, 2^15)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of the 2^16 values
        keep = (bits >= dropped - 2**15).to(x.dtype)
        return x * keep.mul_(2**16 / (2**16 - dropped))


class LoRALinear(nn.Module):
    """base_layer(x) + scaling * B A dropout(x), for any linear layer, quantized or not.

    base_layer needs in_features, out_features and forward, and is not trained. A starts as PEFT's
    (and torch's) linear layer does, uniform within 1 / sqrt(in_features); B starts at zero.
    """

    def __init__(self, base_layer: nn.Module, r: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling, self.dropout, self.enabled = scaling, Dropout(dropout), True

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = self.base_layer(x)
        if not self.enabled:
            return y
        a, b = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        low = F.linear(self.dropout(x), a).flatten(0, -2)  # (T, r)
        return torch.addmm(y.flatten(0, -2), low, b.T, alpha=self.scaling).view_as(y)

    def delta(self) -> Tensor:
        """The learned change of the weight, (out, in) in fp32."""
        return self.scaling * self.lora_B.weight @ self.lora_A.weight


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


class TokenRows(nn.Module):
    """An embedding, or an output head, of which only the rows of some tokens train.

    The rows' fp32 values are `row_weight` (k, d), the parameter; the frozen table holds a copy in
    its own dtype, brought up to date at each use. Tied tables share one parameter.
    """

    def __init__(self, base_layer: nn.Embedding | nn.Linear, rows: list[int], tied: Tensor | None):
        super().__init__()
        self.base_layer = base_layer
        start = base_layer.weight.detach()[rows].float()
        delta = nn.Parameter(start) if tied is None else tied
        self.token_adapter = nn.ParameterDict({"trainable_tokens_delta": delta})  # PEFT's name
        self.register_buffer("rows", torch.tensor(rows), persistent=False)

    @property
    def row_weight(self) -> Tensor:
        return self.token_adapter["trainable_tokens_delta"]

    @property
    def weight(self) -> Tensor:
        with torch.no_grad():
            self.base_layer.weight[self.rows] = self.row_weight.to(self.base_layer.weight.dtype)
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base_layer, nn.Linear):  # generation; training reads weight, row_weight
            return F.linear(x, self.weight, self.bias)
        out = F.embedding(x, self.weight)  # (..., d)
        here = x[..., None] == self.rows  # (..., k)
        new = F.embedding(here.int().argmax(-1), self.row_weight).to(out.dtype)
        return torch.where(here.any(-1, keepdim=True), new, out)


def is_linear(module: nn.Module) -> bool:
    """Anything that LoRALinear can wrap: nn.Linear, NF4Linear, or a layer of your own."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def target_names(model: nn.Module, target: list[str] | str) -> list[str]:
    """The names of the linear layers that `target` means.

    "all-linear": all but the output head. A name means each layer whose path ends in it; a string
    that is no layer's name is a regex for the whole path. What hits nothing is an InputError.
    """
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if is_linear(m)}
    linears = [name for name, module in linears.items() if module is not head]
    if target == "all-linear":
        return linears
    hits = set()
    for pattern in [target] if isinstance(target, str) else target:
        found = {n for n in linears if f".{n}".endswith(f".{pattern}")}
        if not found and (isinstance(target, str) or len(target) == 1):
            try:
                found = {n for n in linears if re.fullmatch(pattern, n)}
            except re.error as error:
                raise InputError(f"--lora_target_modules {pattern}: no regex: {error}") from None
        if not found:
            names = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise InputError(
                f"--lora_target_modules {pattern}: no linear layer; there are: {names}"
            )
        hits |= found
    return [name for name in linears if name in hits]


def add_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freeze the model and give it what `config` lets train. Returns the names of LoRA layers."""
    model.requires_grad_(False)
    names = target_names(model, config.target_modules)
    for name in names:
        base = model.get_submodule(name)
        layer = LoRALinear(base, config.r, config.scaling, config.lora_dropout)
        device = next(t for t in (*base.parameters(), *base.buffers())).device
        _replace(model, name, layer.to(device))
    for name in config.modules_to_save:
        paths = [n for n, _ in model.named_modules() if f".{n}".endswith(f".{name}")]
        if not paths:
            raise InputError(f"--lora_modules_to_save {name}: the model has no module of that name")
        for path in paths:
            module = model.get_submodule(path)
            if any(is_linear(m) and not hasattr(m, "weight") for m in module.modules()):
                raise InputError(f"--lora_modules_to_save {name}: is in 4 bits, and can't train")
            tables = (model.get_input_embeddings(), model.get_output_embeddings())
            if any(module is table for table in tables) and _tied(model):
                # a head that trains on its own is no longer the embedding, nor the other way round
                module.weight = nn.Parameter(module.weight.detach().clone())
            _replace(model, path, TrainedModule(module, [n for n, _ in module.named_parameters()]))
    if config.trainable_token_indices:
        _add_token_rows(model, config.trainable_token_indices)
    if config.bias != "none":
        biased = [
            n.removesuffix(".bias") for n, _ in model.named_parameters() if n.endswith(".bias")
        ]
        for path in biased:
            if config.bias == "all" or path.endswith(".base_layer"):
                _replace(model, path, TrainedModule(model.get_submodule(path), ["bias"]))
    return names


def _tied(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _add_token_rows(model, indices: dict[str, list[int]]) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = _tied(model)
    if type(embedding) is not nn.Embedding:
        raise InputError(f"new tokens can't be trained in a {type(embedding).__name__}")
    paths = {id(module): name for name, module in model.named_modules()}
    for name, rows in indices.items():
        if wrong := [row for row in rows if row >= embedding.num_embeddings]:
            raise InputError(f"trainable_token_indices: {name} has no row {wrong[0]}")
        if paths[id(embedding)].endswith(name):
            wrapped = TokenRows(embedding, rows, None)
            _replace(model, paths[id(embedding)], wrapped)
            if tied:
                _replace(model, paths[id(head)], TokenRows(head, rows, wrapped.row_weight))
        elif paths[id(head)].endswith(name) and not tied:
            _replace(model, paths[id(head)], TokenRows(head, rows, None))
        else:
            raise InputError(f"trainable_token_indices: {name} is no embedding of this model")


class Reference:
    """The policy as it was when training began, in the same weights.

    A new LoRA layer (B = 0) is switched off. Whatever else trains (an adapter that is continued,
    biases, token rows) is kept in a frozen copy and swapped in. Make it after the policy is loaded
    and before the first step; then

        with reference():
            ...  # the model is the reference here, in eval mode
    """

    def __init__(self, model: nn.Module):
        self.model = model
        layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
        self.new = [m for m in layers if not m.lora_B.weight.any()]
        off = {id(p) for m in self.new for p in (m.lora_A.weight, m.lora_B.weight)}
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in off]
        self.start = [(p, p.detach().clone()) for p in trained]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        training = self.model.training
        self._swap(enabled=False)
        self.model.eval()
        try:
            yield
        finally:
            self._swap(enabled=True)
            self.model.train(training)

    def _swap(self, enabled: bool) -> None:
        for layer in self.new:
            layer.enabled = enabled
        for parameter, start in self.start:
            parameter.data, start.data = start.data, parameter.data


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
    elif any(f".{name}".endswith(f".{targets}") for name in layers):
        targets = [targets]  # one name: a string by itself is a regex to PEFT
    text = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "use_rslora": config.use_rslora,
        "bias": config.bias,
        "modules_to_save": config.modules_to_save or None,
        "trainable_token_indices": config.trainable_token_indices or None,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(text, indent=2) + "\n")


def _number(value, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value < high


def _list_of(kind: type, value) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _rows(value) -> bool:
    return _list_of(int, value) and all(row >= 0 for row in value)


FIELDS = {  # of adapter_config.json: what it may be, in words and in code
    "r": ("a whole number from 1 to 65535", lambda v: type(v) is int and 0 < v < 2**16),
    "lora_alpha": ("a number above 0", lambda v: _number(v, 1e-30, 1e30)),
    "lora_dropout": ("a number from 0 to below 1", lambda v: _number(v, 0, 1)),
    "target_modules": ("names", lambda v: isinstance(v, str) or _list_of(str, v)),
    "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
    "bias": ("none, lora_only or all", lambda v: v in ("none", "lora_only", "all")),
    "modules_to_save": ("a list of names", lambda v: _list_of(str, v)),
    "trainable_token_indices": (
        "ids, in a list or in one for each table",
        lambda v: all(map(_rows, v.values())) if isinstance(v, dict) else _rows(v),
    ),
    "base_model_name_or_path": ("a name", lambda v: isinstance(v, str)),
}


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
    idle = ("peft_type", "task_type", "inference_mode", "peft_version", "revision", "auto_mapping",
            "megatron_core", "qalora_group_size", "init_lora_weights")  # fmt: skip
    for key, value in text.items():
        if value and key not in FIELDS and key not in idle:  # use_dora, rank_pattern, ...
            raise InputError(f"{path}: {key} is not known here")
    start = text.get("init_lora_weights", True)  # PiSSA, OLoRA and others change the base as well
    if start not in (True, False, "gaussian", "orthogonal"):
        raise InputError(f"{path}: init_lora_weights {start} is not known here")
    given = {k: v for k, v in text.items() if k in FIELDS and v is not None}
    for key, value in given.items():
        expected, fits = FIELDS[key]
        if not fits(value):
            raise InputError(f"{path}: {key} is {value!r}; expected {expected}")
    config = LoRAConfig(**{"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, **given})  # PEFT's own
    if isinstance(config.trainable_token_indices, list):  # of the embedding, PEFT's short form
        config.trainable_token_indices = {"embed_tokens": config.trainable_token_indices}
    return config


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Fill what trains from an adapter file that holds exactly that, or raise InputError."""
    path = Path(directory) / "adapter_model.safetensors"
    wanted = trained_tensors(model)
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for what, rest in (
                ("lacks", wanted.keys() - names),
                ("also has", names - wanted.keys()),
            ):
                if rest:
                    example = min(rest).removeprefix(PREFIX)
                    raise InputError(
                        f"{path}: {what} {len(rest)} tensors, e.g. {example}: "
                        "an adapter of another base or configuration?"
                    )
            for name, parameter in wanted.items():
                tensor = file.get_tensor(name)
                if tensor.shape != parameter.shape:
                    raise InputError(
                        f"{path}: {name.removeprefix(PREFIX)} has shape {tuple(tensor.shape)}, "
                        f"here it is {tuple(parameter.shape)}: an adapter of another base?"
                    )
                if not tensor.is_floating_point() or not tensor.isfinite().all():
                    short = name.removeprefix(PREFIX)
                    raise InputError(f"{path}: {short} holds what is no finite number")
                parameter.data.copy_(tensor)
    except FileNotFoundError:
        raise InputError(f"{path}: not there") from None
    except SafetensorError as error:
        raise InputError(f"{path}: damaged: {error}") from None
