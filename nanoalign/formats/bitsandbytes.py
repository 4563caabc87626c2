"""An NF4 layer on disk, as bitsandbytes lays it out, and back, without being quantized again.

A linear layer NAME is these tensors of a safetensors file:

    NAME.weight                                   two codes a byte, (n / 2, 1)
    NAME.weight.absmax                            scales: fp32, or uint8 codes when doubled
    NAME.weight.nested_absmax, .nested_quant_map  with double quantization
    NAME.weight.quant_map                         the 16 levels
    NAME.weight.quant_state.bitsandbytes__nf4     shape, dtype, block size: JSON, as bytes
"""

import json

import torch
from torch import nn

from nanoalign import InputError
from nanoalign.nf4 import DYNAMIC_MAP, LEVELS, NF4Linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE = ".weight.quant_state.bitsandbytes__nf4"  # json, as a uint8 tensor
BUFFERS = {"packed": ".weight", "absmax": ".weight.absmax", "absmax2": ".weight.nested_absmax"}
MAPS = {".weight.quant_map": LEVELS, ".weight.nested_quant_map": DYNAMIC_MAP}  # with every layer


def to_bitsandbytes(layer, name):
    """An NF4Linear -> the tensors that transformers + bitsandbytes read as the linear `name`."""
    state = {
        "quant_type": "nf4",
        "blocksize": layer.blocksize,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    if layer.double_quant:
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": layer.offset.item(),
        }
    tensors = {name + BUFFERS[b]: t for b, t in layer.named_buffers() if b in BUFFERS}
    for suffix, levels in list(MAPS.items())[: 2 if layer.double_quant else 1]:
        tensors[name + suffix] = levels.clone()  # safetensors refuses one tensor under two keys
    tensors[name + STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    if layer.bias is not None:
        tensors[name + ".bias"] = layer.bias.detach()
    return tensors


def from_bitsandbytes(tensors, name, shape=None):
    """Such tensors (others may be among them) -> the NF4Linear, without quantizing again.

    `shape` is the (out, in) that the model expects, if known. An InputError names the tensor.
    """

    def check(ok, suffix, message):
        if not ok:
            raise InputError(f"{name}{suffix}: {message}")

    def read(suffix, like):
        check(name + suffix in tensors, suffix, "missing")
        t = tensors[name + suffix]
        check(
            t.dtype == like.dtype and t.numel() == like.numel(),
            suffix,
            f"{t.numel()} x {t.dtype}, expected {like.numel()} x {like.dtype}",
        )
        return t.view(like.shape)

    check(name + STATE in tensors, STATE, "missing, so the weight is not NF4")
    try:
        state = json.loads(bytes(tensors[name + STATE].tolist()))
        kind, blocksize, dtype = state["quant_type"], state["blocksize"], DTYPES[state["dtype"]]
        out_features, in_features = found = tuple(state["shape"])
        double = "nested_offset" in state
        if double:
            nested = state["nested_blocksize"], state["nested_dtype"]
            offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32)
        layer = NF4Linear(in_features, out_features, False, dtype, blocksize, double, "meta")
    except (ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as e:
        raise InputError(f"{name}{STATE}: no quantization state ({e!r})") from None
    check(kind == "nf4", STATE, f"quant_type {kind!r}, expected 'nf4'")
    check(blocksize % 32 == 0, STATE, f"blocksize {blocksize}, expected a multiple of 32")
    check(shape is None or found == tuple(shape), STATE, f"shape {found}, expected {shape}")
    check(
        not double or nested == (256, "float32"),
        STATE,
        "nested blocksize or dtype other than 256, float32",
    )

    for buffer, like in list(layer.named_buffers()):
        if buffer in BUFFERS:
            setattr(layer, buffer, read(BUFFERS[buffer], like))
    if double:
        layer.offset = offset.to(layer.packed.device)
    for suffix, ours in list(MAPS.items())[: 2 if double else 1]:
        same = torch.allclose(read(suffix, ours).cpu(), ours, rtol=0, atol=1e-6)
        check(same, suffix, "other levels than NF4's")
    if name + ".bias" in tensors:
        layer.bias = nn.Parameter(tensors[name + ".bias"])
        check(
            layer.bias.shape == (out_features,),
            ".bias",
            f"shape {tuple(layer.bias.shape)}, expected {(out_features,)}",
        )
    return layer
