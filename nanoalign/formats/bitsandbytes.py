"""Models in NF4 on disk, as bitsandbytes lays them out: its files open here, ours open there.

A linear layer NAME is these tensors of a safetensors file:

    NAME.weight                                   two codes a byte, (n / 2, 1)
    NAME.weight.absmax                            scales: fp32, or uint8 codes when doubled
    NAME.weight.nested_absmax, .nested_quant_map  with double quantization
    NAME.weight.quant_map                         the 16 levels
    NAME.weight.quant_state.bitsandbytes__nf4     shape, dtype, block size: JSON, as bytes

All linear layers but the output head are quantized; embeddings, norms and the head stay dense. In
both directions the bytes are taken as they are, and nothing is quantized again. The numbers are the
same too, but for three traps of bitsandbytes:

  - its CPU code rounds doubled scales through a coarser table than its CUDA code, and one code in a
    thousand is off by one; nf4.py takes the nearest, always;
  - on AVX512, its dequantize is wrong where a row is no multiple of the block (but is one of 16);
  - with bf16 weights and fp32 input, its forward uses the weight before rounding to bf16 and its
    backward the one after; here both use the one after, which is also what a merge would save.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from nanoalign import InputError
from nanoalign.nf4 import DYNAMIC_MAP, LEVELS, NF4Linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE = ".weight.quant_state.bitsandbytes__nf4"  # json, as a uint8 tensor
BUFFERS = {"packed": ".weight", "absmax": ".weight.absmax", "absmax2": ".weight.nested_absmax"}
MAPS = {".weight.quant_map": LEVELS, ".weight.nested_quant_map": DYNAMIC_MAP}
PACKED = [STATE, *BUFFERS.values(), *MAPS]  # all that may follow a layer's name


def maps(layer: NF4Linear) -> dict[str, torch.Tensor]:
    """The levels that stand in the file with each layer: of its weights, of its doubled scales."""
    return dict(list(MAPS.items())[: 2 if layer.double_quant else 1])


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
    for suffix, levels in maps(layer).items():
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
        found, expected = (f"{x.numel()} x {x.dtype}" for x in (t, like))
        check(found == expected, suffix, f"{found}, expected {expected}")
        return t.view(like.shape)

    check(name + STATE in tensors, STATE, "missing, so the weight is not NF4")
    try:
        state = json.loads(bytes(tensors[name + STATE].tolist()))
        kind, blocksize, dtype = state["quant_type"], state["blocksize"], DTYPES[state["dtype"]]
        out_features, in_features = found = tuple(state["shape"])
        how = {"double_quant": "nested_offset" in state, "blocksize": blocksize, "dtype": dtype}
        layer = NF4Linear(in_features, out_features, **how, device="meta")
        if layer.double_quant:
            nested = state["nested_blocksize"], state["nested_dtype"]
            offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32)
    except (ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as e:
        raise InputError(f"{name}{STATE}: no quantization state ({e!r})") from None
    check(kind == "nf4", STATE, f"quant_type {kind!r}, expected 'nf4'")
    check(blocksize % 32 == 0, STATE, f"blocksize {blocksize}, expected a multiple of 32")
    check(shape is None or found == tuple(shape), STATE, f"shape {found}, expected {shape}")
    if layer.double_quant:
        other = "nested blocksize or dtype other than 256, float32"
        check(nested == (256, "float32"), STATE, other)
        layer.offset = offset.to(tensors[name + STATE].device)

    for buffer in BUFFERS.keys() & dict(layer.named_buffers()).keys():
        setattr(layer, buffer, read(BUFFERS[buffer], getattr(layer, buffer)))
    for suffix, levels in maps(layer).items():
        same = torch.allclose(read(suffix, levels).cpu(), levels, rtol=0, atol=1e-6)
        check(same, suffix, "other levels than NF4's")
    if name + ".bias" in tensors:
        layer.bias = nn.Parameter(tensors[name + ".bias"])
        found, expected = tuple(layer.bias.shape), (out_features,)
        check(found == expected, ".bias", f"shape {found}, expected {expected}")
    return layer


# ------------------------------------------------------------------------------------ whole models


def is_nf4(config) -> bool:
    """Was the model saved in bitsandbytes' NF4?"""
    found = getattr(config, "quantization_config", None) or {}
    found = found if isinstance(found, dict) else found.to_dict()
    return bool(found.get("load_in_4bit")) and found.get("bnb_4bit_quant_type") == "nf4"


def save_4bit(
    model: nn.Module, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write an NF4 model, without adapter, as transformers + bitsandbytes writes it."""
    directory = Path(directory)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    if not layers:
        raise InputError(f"{directory}: the model to save holds no 4-bit layers")
    tensors, written = {}, set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key.rpartition(".")[0] not in layers and id(tensor) not in written:  # tied ones once
            tensors[key] = tensor.detach()
            written.add(id(tensor))
    for name, layer in layers.items():
        tensors |= to_bitsandbytes(layer, name)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    first = next(iter(layers.values()))
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_use_double_quant": first.double_quant,
        "bnb_4bit_quant_storage": "uint8",
    }
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
