"""Safetensors files -> a model in four bits, one tensor at a time.

The usual way to a 4-bit model is to load it and then quantize it, and the peak of memory is the
dense model that 4 bits were meant to avoid. Here the model is built with its parameters on the meta
device, where they have a shape and no memory; then each tensor is read, cast, packed, and forgotten
before the next one is read. At no time is there more than the 4-bit model and what one tensor needs
on its way.

Two details:

  - Buffers that a constructor computes (rotary frequencies, say) are in no file. So only parameters
    go to meta; torch has a hook for the moment in which a module registers one.
  - safetensors maps a file into memory, and what has been read through an open mapping stays
    resident until it is gone: kept open, a 5 GB file would be 5 GB of memory by the end. So the
    file is opened anew for each tensor.
"""

import json
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from nanoalign import InputError
from nanoalign.formats.bitsandbytes import BUFFERS, MAPS, STATE, from_bitsandbytes
from nanoalign.nf4 import NF4Linear

PACKED = [STATE, *BUFFERS.values(), *MAPS]  # what follows a linear layer's name in 4-bit files

# ------------------------------------------------------------------------------------------ files


def tensor_files(name: str) -> dict[str, Path] | None:
    """Directory or hub id -> {tensor: its file}, or None if there are no safetensors files."""
    if str(name).endswith(".gguf"):
        return None
    if path := local_file(name, "model.safetensors"):
        return dict.fromkeys(tensor_names(path), path)
    if not (index := local_file(name, "model.safetensors.index.json")):
        return None
    try:
        shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        shards = {shard: shard_path(name, index, shard) for shard in set(shard_of.values())}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: no index of safetensors files: {error!r}") from None
    held = {shard: set(tensor_names(path)) for shard, path in shards.items()}
    for key, shard in shard_of.items():
        if key not in held[shard]:
            raise InputError(f"{shards[shard]}: {key} is missing; {index.name} says it is here")
    return {key: shards[shard] for key, shard in shard_of.items()}


def shard_path(name: str, index: Path, shard: str) -> Path:
    """The file that an index names. It may not lead out of the directory."""
    place = PurePosixPath(shard)
    if place.is_absolute() or ".." in place.parts or "\\" in shard or ":" in shard:
        raise InputError(f"{index}: {shard} leads out of the directory")
    path = local_file(name, shard)
    if path is None:
        raise InputError(f"{index}: {shard} is not there")
    return path


def local_file(name: str, file: str) -> Path | None:
    """A file of a directory, or of a hub repository, from which it is fetched if need be."""
    try:
        return Path(cached_file(name, file))
    except OSError:
        return None


def tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged: {error}") from None


def read_tensor(path: Path, key: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A copy of one tensor on the device; if it is of floating point, in `dtype`."""
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(key)
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    return tensor.to(device, dtype, copy=True)


# ------------------------------------------------------------------------------------------ model


def skeleton(config, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model with its parameters on meta and its buffers computed."""

    def to_meta(module, name, parameter):
        return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"))

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        kind = AutoModelForCausalLM
        return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    finally:
        hook.remove()


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a file of the dense model holds; a tied tensor is here under both its names."""
    return model.state_dict(keep_vars=True)


def mismatch(model: nn.Module, linears: dict, files: dict[str, Path]) -> str | None:
    """Why the files can't be streamed into a skeleton, if transformers may know a conversion.

    Tensors that are only missing, or only too many, are an InputError. Computed buffers, which
    transformers used to save, are passed over.
    """
    ours = dense_tensors(model)
    there = {id(tensor) for key, tensor in ours.items() if key in files}
    missing = [key for key, tensor in ours.items() if id(tensor) not in there]
    known = ours.keys() | {name + suffix for name in linears for suffix in PACKED}
    computed = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    extra = sorted(k for k in files.keys() - known if k.rpartition(".")[2] not in computed)
    if missing and extra:
        return f"has {extra[0]} and not {missing[0]}"
    if missing:
        raise InputError(f"{next(iter(files.values())).parent}: no file holds {missing[0]}")
    if extra:
        raise InputError(f"{files[extra[0]]}: {extra[0]} is not in the model")
    return None


def stream(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    files: dict[str, Path],
    device: torch.device,
    double_quant: bool,
) -> None:
    """Fill a skeleton. `linears` become NF4Linear: all of them, or, if the files are in
    bitsandbytes' 4-bit layout, those that are quantized there."""
    quantized = {name for name in linears if name + STATE in files}
    ours, read = dense_tensors(model), {}
    for key, like in ours.items():
        name, _, leaf = key.rpartition(".")
        if key not in files:
            continue  # its twin is there
        if leaf == "weight" and name in (quantized or linears):
            if quantized:
                layer = read_layer(files, name, like.shape, device)
            else:
                out, inp = like.shape
                layer = NF4Linear(inp, out, False, like.dtype, 64, double_quant, "meta")
                weight = read_tensor(files[key], key, device, like.dtype)
                layer.pack(weight, f"{files[key]}: {key}")
            layer.bias = linears[name].bias
            model.set_submodule(name, layer)
            continue
        tensor = read_dense(files[key], key, like, device)
        if id(like) in read and not torch.equal(tensor, read[id(like)]):
            raise InputError(f"{files[key]}: {key} differs from what config.json ties it to")
        read[id(like)] = tensor
        for twin in [k for k, t in ours.items() if t is like]:  # itself, mostly
            name, _, leaf = twin.rpartition(".")
            setattr(model.get_submodule(name), leaf, tensor)


def read_dense(path: Path, key: str, like: Tensor, device: torch.device) -> Tensor:
    tensor = read_tensor(path, key, device, like.dtype)
    if tensor.shape != like.shape:
        raise InputError(f"{path}: {key}: shape {tuple(tensor.shape)}, not {tuple(like.shape)}")
    if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise InputError(f"{path}: {key} holds NaN or infinity")
    return nn.Parameter(tensor, False) if isinstance(like, nn.Parameter) else tensor


def read_layer(files: dict[str, Path], name: str, shape: torch.Size, device) -> NF4Linear:
    """What bitsandbytes quantized, as it is."""
    keys = [name + suffix for suffix in PACKED if name + suffix in files]
    try:
        tensors = {key: read_tensor(files[key], key, device, None) for key in keys}
        return from_bitsandbytes(tensors, name, shape)
    except InputError as error:
        raise InputError(f"{files[name + STATE]}: {error}") from None
