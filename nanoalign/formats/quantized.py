"""A directory -> a model whose linear layers are in four bits; and back to a directory.

All linear layers but the output head become NF4Linear; embeddings, norms and the head stay dense.
It is bitsandbytes' choice too, and `save_4bit` writes its layout: transformers + bitsandbytes opens
what is saved here, and what it saved is opened here without being quantized again.

Weights stream from their files (streaming.py) where the tensors in them are the model's, name by
name. Where transformers converts while it loads (some models' experts are merged; GGUF; .bin), it
loads the dense model and that is quantized; one printed line says so.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from nanoalign import InputError
from nanoalign.formats.bitsandbytes import DTYPES, to_bitsandbytes
from nanoalign.formats.streaming import local_file, mismatch, skeleton, stream, tensor_files
from nanoalign.nf4 import NF4Linear

NOTE = "base_quantization.json"  # in an adapter's directory: the 4-bit base it was trained on


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """What goes into 4 bits."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}


def nf4_layers(model: nn.Module) -> dict[str, NF4Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}


def packed_weights(model: nn.Module) -> int:
    """How many weights are in 4 bits: model.parameters() does not list them."""
    return sum(layer.in_features * layer.out_features for layer in nf4_layers(model).values())


def quantize(model: nn.Module, device: torch.device, double_quant: bool = False) -> None:
    """A dense model's linear layers, in place, one after the other."""
    for name, linear in linears(model).items():
        layer = NF4Linear.from_linear(linear.to(device), 64, double_quant, f"{name}.weight")
        model.set_submodule(name, layer)


def load_4bit(
    name: str,
    config,
    dtype: torch.dtype,
    device: torch.device,
    double_quant: bool,
    load_dense: Callable[[], nn.Module],
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of a directory or hub id, with its linear layers but the head in NF4.

    `dtype` is that of all other weights, and what NF4 weights are rounded to; `load_dense` is
    called where streaming can't be. An InputError names the file and the tensor that is wrong.
    """
    config, quantized = copy.deepcopy(config), is_nf4(config)
    if quantized:
        del config.quantization_config  # it would call for bitsandbytes' own layers
    elif quantization(config):
        raise InputError(f"{name}: quantized already, and not by bitsandbytes in NF4")
    files = tensor_files(name)
    reason = "has no safetensors files"
    if files is not None:
        model = skeleton(config, dtype, trust_remote_code)
        reason = mismatch(model, linears(model), files)
    if reason and quantized:
        raise InputError(f"{name}: can't be read in 4 bits: it {reason}")
    if reason:
        print(f"{name}: {reason}; so the dense model is loaded first and then quantized")
        model = load_dense()
        quantize(model, device, double_quant)
    else:
        stream(model, linears(model), files, device, double_quant)
        if local_file(name, "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(name)
    layers = nf4_layers(model).values()
    if not layers:
        raise InputError(f"{name}: has no linear layers to hold in 4 bits")
    bits = 8 * sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    bits /= packed_weights(model)
    print(f"{len(layers)} linear layers in NF4: {bits:.2f} bits per parameter")
    return model.requires_grad_(False).eval()


def quantization(config) -> dict:
    """What config.json says of it: {} for a dense model."""
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def is_nf4(config) -> bool:
    """Was the model saved in bitsandbytes' NF4?"""
    found = quantization(config)
    return bool(found.get("load_in_4bit")) and found.get("bnb_4bit_quant_type") == "nf4"


def save_4bit(
    model: nn.Module, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a 4-bit model, without adapter, as transformers + bitsandbytes writes it."""
    directory, layers = Path(directory), nf4_layers(model)
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


# ------------------------------------------------------------------- an adapter and its 4-bit base


def write_note(model: nn.Module, directory: Path) -> None:
    """Say beside an adapter that its base was in 4 bits, if it was.

    An adapter learns to live with the rounding of its base, so a merge has to know of it. PEFT's
    adapter_config.json has no place for that (it warns of each key it does not know), hence a file.
    """
    path, layers = Path(directory) / NOTE, list(nf4_layers(model).values())
    if not layers:
        path.unlink(missing_ok=True)  # of another adapter, which is overwritten
        return
    note = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": layers[0].double_quant,
        "dtype": str(layers[0].dtype).removeprefix("torch."),
    }
    path.write_text(json.dumps(note, indent=2) + "\n")


def read_note(directory: str | Path) -> dict | None:
    """{"double_quant": bool, "dtype": str} if write_note wrote them, else None."""
    path = Path(directory) / NOTE
    if not path.exists():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        DTYPES[note["dtype"]]
        return {"double_quant": bool(note["bnb_4bit_use_double_quant"]), "dtype": note["dtype"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not what was written here: {error!r}") from None
