"""LoRA: train a low-rank change of frozen weights, and keep the reference for free.

LoRA (Hu et al. 2021, arXiv 2106.09685) leaves a layer's weight W as it is and learns a change of
rank r beside it:

    y = W x + (alpha / r) * B A x        A: (r, in), B: (out, r), B = 0 at the start

With r = 16 a 4096 x 4096 weight has 131 thousand trained numbers instead of 16.8 million, and
gradients and optimizer states shrink with them. Since B = 0 the model starts as itself, and without
the change it is as it was: the reference of DPO and KTO costs nothing.

Modules are wrapped, never patched. `merge` gives the plain module that a wrapper amounts to.
Trained weights are fp32 whatever the base is. They have PEFT's names, so that formats/peft.py reads
off what an adapter file holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoalign import InputError
from nanoalign.fast import dropout as fast  # Dropout, but quicker on a CPU

Dropout = nn.Dropout


class LoRALinear(nn.Module):
    """base_layer(x) + scaling * B A dropout(x), for any linear layer with in_features and
    out_features. As in PEFT, A starts uniform within 1 / sqrt(in_features), and B at zero."""

    def __init__(self, base_layer: nn.Module, r: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling, self.dropout, self.enabled = scaling, fast.Dropout(dropout), True

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        flat = x.flatten(0, -2)  # (T, in)
        y = self.base_layer(flat)  # (T, out), and no view, so it can be changed in place
        if self.enabled:
            a, b = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
            y.addmm_(F.linear(self.dropout(flat), a), b.T, alpha=self.scaling)
        return y.view(*x.shape[:-1], -1)

    def delta(self) -> Tensor:
        """The learned change of the weight, (out, in) in fp32."""
        return self.scaling * self.lora_B.weight @ self.lora_A.weight

    def merge(self) -> nn.Module:
        """The linear layer with weight W + scaling * B A in fp32. It consumes base_layer."""
        base = plain(self.base_layer).float()
        base.weight = nn.Parameter(base.weight + self.delta(), requires_grad=False)  # W may be tied
        return base


def plain(module: nn.Module) -> nn.Module:
    """What a wrapper or a 4-bit layer amounts to; any other module as it is."""
    return module.merge() if hasattr(module, "merge") else module


class TokenRows(nn.Module):
    """An embedding, or an output head, of which only the rows of some tokens train: `row_weight`
    (k, d) in fp32. The frozen table has a copy in its own dtype, brought up to date at each use.
    Tied tables share the parameter."""

    def __init__(self, base_layer: nn.Embedding | nn.Linear, rows: list[int], tied: Tensor | None):
        super().__init__()
        self.base_layer = base_layer
        start = base_layer.weight.detach()[rows].float()
        delta = nn.Parameter(start) if tied is None else tied
        self.token_adapter = nn.ParameterDict({"trainable_tokens_delta": delta})  # PEFT's name
        self.register_buffer("rows", torch.tensor(rows, device=start.device), persistent=False)

    @property
    def row_weight(self) -> Tensor:
        return self.token_adapter["trainable_tokens_delta"]

    @property
    def weight(self) -> Tensor:
        table = self.base_layer.weight
        if not hasattr(table, "placements"):  # FSDP, outside of forward, has a part of the table
            with torch.no_grad():
                table[self.rows] = self.row_weight.to(table.dtype)
        return table

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base_layer, nn.Linear):  # in generation only: see logps.Head
            return F.linear(x, self.weight, self.bias)
        out = F.embedding(x, self.weight)  # (..., d)
        here = x[..., None] == self.rows  # (..., k)
        new = F.embedding(here.int().argmax(-1), self.row_weight).to(out.dtype)
        out = torch.where(here.any(-1, keepdim=True), new, out)
        return out * self.base_layer.embed_scale.to(out.dtype) if scales(self.base_layer) else out

    def merge(self) -> nn.Module:
        """The embedding or head with the trained rows, in fp32."""
        table = plain(self.base_layer).float()
        table.weight.data[self.rows] = self.row_weight.data
        return table


def scales(table: nn.Module) -> bool:
    """Does an embedding multiply what it reads by its buffer `embed_scale`, as Gemma's does?"""
    return "embed_scale" in dict(table.named_buffers())


def linear_names(model: nn.Module) -> list[str]:
    """All linear layers but the output head: whatever has in_features, as nn.Linear and NF4Linear
    do. InputError where there are none: GPT-2's are transformers' Conv1D."""
    head = model.get_output_embeddings()
    found = [n for n, m in model.named_modules() if hasattr(m, "in_features") and m is not head]
    if not found:
        fault = "has no linear layers for LoRA; --use_peft false trains all its weights"
        raise InputError(f"{model.name_or_path or type(model).__name__}: {fault}")
    return found


def add_lora(model: nn.Module, r: int, scaling: float, dropout: float = 0.0, names=None) -> None:
    """Freeze the model and put LoRA on the linear layers `names` (None: on all but the head)."""
    model.requires_grad_(False)
    for name in linear_names(model) if names is None else names:
        put(model, name, LoRALinear(model.get_submodule(name), r, scaling, dropout))


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a layer with its wrapper, which moves to the layer's device."""
    tensors = *layer.base_layer.parameters(), *layer.base_layer.buffers()
    model.set_submodule(name, layer.to(tensors[0].device))


def tied(model: nn.Module) -> bool:
    """Is the output head's weight the embedding's?"""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def add_token_rows(model: nn.Module, indices: dict[str, list[int]]) -> None:
    """Let rows of embedding and head train: {the last part of a table's name: its rows}."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    one_table, paths = tied(model), {id(module): name for name, module in model.named_modules()}
    for name, rows in indices.items():
        tables = [embedding] if one_table else [embedding, head]
        table = next((table for table in tables if paths[id(table)].endswith(name)), None)
        if table is None:
            raise InputError(f"trainable_token_indices: {name} is no embedding of this model")
        if type(table) not in (nn.Embedding, nn.Linear) and not scales(table):  # it may do more
            raise InputError(f"new tokens can't be trained in a {type(table).__name__}")
        if wrong := [row for row in rows if row >= len(table.weight)]:
            raise InputError(f"trainable_token_indices: {name} has no row {wrong[0]}")
        wrapped = TokenRows(table, rows, None)
        model.set_submodule(paths[id(table)], wrapped)
        if one_table:
            model.set_submodule(paths[id(head)], TokenRows(head, rows, wrapped.row_weight))


class Reference:
    """The policy as it was before the first step: `with reference(): ...`, in eval mode. New LoRA
    layers (B = 0) are switched off. Of all else that trains (an adapter that is continued, biases,
    token rows) a frozen copy is swapped in."""

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
