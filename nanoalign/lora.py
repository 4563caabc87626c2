"""LoRA: train a low-rank change of frozen weights, and get the reference model for free.

LoRA (Hu et al. 2021, arXiv 2106.09685) freezes a layer's weight W and learns a change of rank r:

    y = W x + (alpha / r) * B A x        A: (r, in), B: (out, r), B = 0 at the start

With r = 16 a 4096 x 4096 weight has 131 thousand trained numbers instead of 16.8 million, and
gradients and optimizer states shrink as much. At the start B = 0 and the change is zero. With the
change switched off, the model is still what it was then: this is the reference of DPO and KTO.

A layer is wrapped in a module, and `merge` gives a plain layer that computes the same. Trained
weights are fp32, whatever the base has. Their names are PEFT's, for formats/peft.py.
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
    """base_layer(x) + scaling * B A dropout(x). The base may be any layer with in_features and
    out_features. As in PEFT, A starts uniform in +-1 / sqrt(in_features), and B at zero."""

    def __init__(self, base_layer: nn.Module, r: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling, self.dropout, self.enabled = scaling, fast.Dropout(dropout), True

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        flat = x.flatten(0, -2)  # (T, in)
        y = self.base_layer(flat)  # (T, out), no view: addmm_ may not change some views
        if self.enabled:
            a, b = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
            y.addmm_(F.linear(self.dropout(flat), a), b.T, alpha=self.scaling)
        return y.view(*x.shape[:-1], -1)

    def delta(self) -> Tensor:
        """The change of the weight, (out, in) in fp32."""
        return self.scaling * self.lora_B.weight @ self.lora_A.weight

    def merge(self) -> nn.Module:
        """A linear layer with the weight W + scaling * B A, in fp32. It changes base_layer."""
        base = plain(self.base_layer).float()
        # a new parameter: another layer may use the old one
        base.weight = nn.Parameter(base.weight + self.delta(), requires_grad=False)
        return base


def plain(module: nn.Module) -> nn.Module:
    """The plain layer that computes the same as a wrapper or a 4-bit layer."""
    return module.merge() if hasattr(module, "merge") else module


class TokenRows(nn.Module):
    """An embedding or output head in which only k tokens train. Their vectors are the parameter
    `row_weight`, (k, d) in fp32, which tied tables share. Each use copies them into the table."""

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
        if not hasattr(table, "placements"):  # under FSDP it may be a part of the table only
            with torch.no_grad():
                table[self.rows] = self.row_weight.to(table.dtype)
        return table

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base_layer, nn.Linear):  # in generation; training uses logps.Head
            return F.linear(x, self.weight, self.bias)
        out = F.embedding(x, self.weight)  # (..., d)
        here = x[..., None] == self.rows  # (..., k)
        new = F.embedding(here.int().argmax(-1), self.row_weight).to(out.dtype)
        out = torch.where(here.any(-1, keepdim=True), new, out)
        return out * self.base_layer.embed_scale.to(out.dtype) if scales(self.base_layer) else out

    def merge(self) -> nn.Module:
        """The embedding or head with the trained vectors in it, in fp32."""
        table = plain(self.base_layer).float()
        table.weight.data[self.rows] = self.row_weight.data
        return table


def scales(table: nn.Module) -> bool:
    """Does the embedding multiply its vectors by a buffer `embed_scale`, as Gemma's does?"""
    return "embed_scale" in dict(table.named_buffers())


def linear_names(model: nn.Module) -> list[str]:
    """The names of all layers with in_features (nn.Linear, NF4Linear), without the output head.
    InputError: there are none. GPT-2 has another class, Conv1D."""
    head = model.get_output_embeddings()
    found = [n for n, m in model.named_modules() if hasattr(m, "in_features") and m is not head]
    if not found:
        fault = "has no linear layers for LoRA; --use_peft false trains all its weights"
        raise InputError(f"{model.name_or_path or type(model).__name__}: {fault}")
    return found


def add_lora(model: nn.Module, r: int, scaling: float, dropout: float = 0.0, names=None) -> None:
    """Freeze the model, then put LoRA on the layers `names`. None: on all of linear_names."""
    model.requires_grad_(False)
    for name in linear_names(model) if names is None else names:
        put(model, name, LoRALinear(model.get_submodule(name), r, scaling, dropout))


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a layer with a wrapper, on the same device."""
    tensors = *layer.base_layer.parameters(), *layer.base_layer.buffers()
    model.set_submodule(name, layer.to(tensors[0].device))


def tied(model: nn.Module) -> bool:
    """Do embedding and output head use the same weight?"""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def table_paths(model: nn.Module) -> dict[str, nn.Module]:
    """The embedding and the output head, by their paths in the model."""
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {module: path for path, module in model.named_modules()}
    return {paths[table]: table for table in tables}


def add_token_rows(model: nn.Module, indices: dict[str, list[int]]) -> None:
    """Let some tokens' vectors train in embedding and head: {end of the layer's name: token ids}.
    Tied tables need one entry. InputError: no such layer or token, or no way to train it."""
    *others, head = tables = table_paths(model)
    one_table = tied(model)
    for name, rows in indices.items():
        path = next((p for p in (others if one_table else tables) if p.endswith(name)), None)
        if path is None:
            raise InputError(f"trainable_token_indices: {name} is no embedding of this model")
        table = tables[path]
        if type(table) not in (nn.Embedding, nn.Linear) and not scales(table):
            raise InputError(f"new tokens can't be trained in a {type(table).__name__}")
        if wrong := [row for row in rows if row >= len(table.weight)]:
            raise InputError(f"trainable_token_indices: {name} has no row {wrong[0]}")
        wrapped = TokenRows(table, rows, None)
        model.set_submodule(path, wrapped)
        if one_table:
            model.set_submodule(head, TokenRows(tables[head], rows, wrapped.row_weight))


class Reference:
    """The model as it was when this was made. In `with reference(): ...` the model computes as the
    reference, in eval mode. New LoRA layers (B = 0) are switched off there. Every other trained
    parameter (of an older adapter, say) is exchanged for a copy of its first value."""

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
