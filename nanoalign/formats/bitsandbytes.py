"""Models in NF4 on disk, in bitsandbytes' layout: its files open here, and ours open there.

A linear layer NAME is these tensors of a safetensors file:

    NAME.weight                                   two codes a byte, (n / 2, 1)
    NAME.weight.absmax                            scales: fp32, or uint8 codes when doubled
    NAME.weight.nested_absmax, .nested_quant_map  with double quantization
    NAME.weight.quant_map                         the 16 levels
    NAME.weight.quant_state.bitsandbytes__nf4     shape, dtype, block size: JSON, as bytes

All linear layers but the output head are quantized. Bytes are read and written as they are, and
nothing is quantized again. bitsandbytes computes the same numbers, with three exceptions:

  - its CPU code rounds doubled scales by a coarser table than its CUDA code. So one code in a
    thousand is off by one; nf4.py always takes the nearest;
  - its dequantize is wrong on AVX512 if a row's length is a multiple of 16 but not of the block;
  - with bf16 weights and fp32 input its forward uses the weight before it is rounded to bf16, and
    its backward the rounded one. Here both use the rounded one, which a merge saves, too.

The experts of a mixture are linear layers here and in files of transformers 4. transformers 5 holds
them in 3-D parameters, which bitsandbytes leaves dense. Both kinds of files open here. A mixture
saved here has its experts in 4 bits, and transformers 5 can't open it.
"""

import copy
import json
import math
from pathlib import Path

import torch
from torch import nn

from nanoalign import InputError
from nanoalign.nf4 import DYNAMIC_MAP, LEVELS, NF4Linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE = ".weight.quant_state.bitsandbytes__nf4"  # json, as a uint8 tensor
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32"}  # in the json, if doubled
BUFFERS = {"packed": ".weight", "absmax": ".weight.absmax", "absmax2": ".weight.nested_absmax"}
MAPS = {
    ".weight.quant_map": LEVELS,
    ".weight.nested_quant_map": DYNAMIC_MAP,
}  # also in the file
PACKED = [STATE, *BUFFERS.values(), *MAPS]  # all endings after a layer's name


def to_bitsandbytes(layer, name):
    """An NF4Linear -> the tensors that transformers + bitsandbytes read as the linear `name`."""
    state = {
        "quant_type": "nf4",
        "blocksize": layer.blocksize,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    if layer.double_quant:
        state |= NESTED | {"nested_offset": layer.offset.item()}
    tensors = {name + BUFFERS[b]: t for b, t in layer.named_buffers() if b in BUFFERS}
    for suffix, levels in list(MAPS.items())[: 1 + layer.double_quant]:
        tensors[name + suffix] = levels.clone()  # safetensors refuses one tensor under two keys
    tensors[name + STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    if layer.bias is not None:
        tensors[name + ".bias"] = layer.bias.detach()
    return tensors


def from_bitsandbytes(tensors, name, shape=None):
    """The tensors of the linear layer `name`, among others -> an NF4Linear of the same bytes.

    `shape` is the (out, in) that the model expects, if known. An InputError names the tensor.
    """

    def check(ok, suffix, message):
        if not ok:
            raise InputError(f"{name}{suffix}: {message}")

    def read(suffix, numel, dtype):
        check(name + suffix in tensors, suffix, "missing")
        t = tensors[name + suffix]
        found, expected = f"{t.numel()} x {t.dtype}", f"{numel} x {dtype}"
        check(found == expected, suffix, f"{found}, expected {expected}")
        return t

    check(name + STATE in tensors, STATE, "missing, so the weight is not NF4")
    try:
        state = json.loads(bytes(tensors[name + STATE].tolist()))
        (out_features, in_features), blocksize = state["shape"], state["blocksize"]
        n = torch.empty(out_features, in_features, device="meta").numel()
        blocks, double = math.ceil(n / blocksize), "nested_offset" in state
        sizes = in_features, out_features, DTYPES[state["dtype"]]
        layer = NF4Linear(*sizes, double_quant=double, blocksize=blocksize)
        offset = torch.tensor(float(state["nested_offset"])) if double else None
    except (ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as e:
        raise InputError(f"{name}{STATE}: no quantization state ({e!r})") from None
    expected = {"quant_type": "nf4", "shape": list(shape or state["shape"])}
    for key, value in (expected | NESTED if double else expected).items():
        found = state.get(key)
        check(found == value, STATE, f"{key} {found!r}, expected {value!r}")
    check(blocksize % 32 == 0, STATE, f"blocksize {blocksize}, expected a multiple of 32")

    layer.register_buffer("packed", read(".weight", (n + 1) // 2, torch.uint8).view(-1, 1))
    kind = torch.uint8 if double else torch.float32
    layer.register_buffer("absmax", read(".weight.absmax", blocks, kind).view(-1))
    if double:
        absmax2 = read(".weight.nested_absmax", math.ceil(blocks / 256), torch.float32)
        layer.register_buffer("absmax2", absmax2.view(-1))
        layer.register_buffer("offset", offset.to(absmax2.device))
    for suffix, levels in list(MAPS.items())[: 1 + double]:
        found = read(suffix, levels.numel(), levels.dtype).cpu()
        check(torch.allclose(found, levels, rtol=0, atol=1e-6), suffix, "other levels than NF4's")
    if name + ".bias" in tensors:
        layer.bias = nn.Parameter(tensors[name + ".bias"])
        found, expected = tuple(layer.bias.shape), (out_features,)
        check(found == expected, ".bias", f"shape {found}, expected {expected}")
    return layer


def is_nf4(config) -> bool:
    """Was the model saved in bitsandbytes' NF4?"""
    found = getattr(config, "quantization_config", None) or {}
    found = found if isinstance(found, dict) else found.to_dict()
    return bool(found.get("load_in_4bit")) and found.get("bnb_4bit_quant_type") == "nf4"


def save_4bit(model: nn.Module, directory: str | Path) -> None:
    """Write an NF4 model, without adapter, as transformers + bitsandbytes writes it."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    if not layers:
        raise InputError(f"{directory}: the model to save holds no 4-bit layers")
    tensors = {k: t for k, t in model.state_dict().items() if k.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        tensors |= to_bitsandbytes(layer, name)
    model = copy.copy(model)  # the caller's keeps its config
    model.config = copy.deepcopy(model.config)
    model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_use_double_quant": next(iter(layers.values())).double_quant,
        "bnb_4bit_quant_storage": "uint8",
    }
    model.save_pretrained(directory, state_dict=tensors, save_original_format=False)
