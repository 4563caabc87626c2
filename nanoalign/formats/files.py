"""The files of a model: which tensors are where, and reading them one at a time.

A fault of a directory, a file or a tensor is an InputError of one line that names it.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from nanoalign import InputError


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    key: str  # its name there

    def __str__(self) -> str:
        return f"{self.path}: {self.key}"


def is_path(name: str) -> bool:
    """Is a model's name a path? On the hub names are NAME or OWNER/NAME."""
    return name[0] in "./~" or name.count("/") > 1 or "\\" in name


def full_name(name: str) -> str:
    """A model's name for any working directory: an existing path becomes absolute."""
    return os.path.abspath(name) if os.path.exists(name) else str(name)


def base_path(name: str | None, adapter: str) -> str:
    """Where an adapter's base is now. A relative name may count from a directory above the adapter.
    A path that is gone may have moved with the adapter: its last part is looked for beside it. But
    no path is looked for on the hub, where a stranger's model may have that name."""
    advice = "give --model_name_or_path"
    if not name:
        raise InputError(f"{adapter}: names no base model; {advice}")
    if os.path.exists(name):
        return name
    here = Path(os.path.abspath(adapter))
    paths = [parent / name for parent in (here, *here.parents)]
    paths += [here.parent / Path(name).name] if is_path(name) else []
    for path in paths:
        if os.path.isfile(path) or os.path.exists(path / "config.json"):
            return str(path)
    if is_path(name):
        raise InputError(f"{adapter}: its base {name} is not there, nor beside it; {advice}")
    return name


def from_pretrained(kind, name: str, **more):
    """kind.from_pretrained of a directory, hub id or GGUF file, with errors of one line."""
    source = name
    if str(name).endswith(".gguf"):
        more["gguf_file"], source = Path(name).name, Path(name).parent
    if not os.path.exists(source) and is_path(str(name)):
        raise InputError(f"{name}: no such directory")
    try:
        return kind.from_pretrained(source, **more)
    except Exception as error:  # OSError, ValueError, SafetensorError, ImportError (gguf) ...
        why = " ".join(str(error).split()) or type(error).__name__
        if why.startswith("Weights only load failed"):  # torch goes on with how to run them
            why = "pickled weights that are more than tensors; expected safetensors"
        if "trust_remote_code" in why:
            why = "comes with code of its own, which runs only with --trust_remote_code"
        raise InputError(f"{name}: {why[:300]}") from None


def local_file(name: str, file: str) -> Path | None:
    """A file of a directory or a hub repository, fetched if need be; None if there is none."""
    try:
        return None if str(name).endswith(".gguf") else Path(cached_file(name, file))
    except OSError:
        return None


def stored_tensors(name: str) -> dict[str, Stored]:
    """Directory or hub id -> {name: tensor}; {} if there are no safetensors files."""
    single, index = local_file(name, "model.safetensors"), "model.safetensors.index.json"
    file_of, held = {} if single else read_index(name, index), set()
    for path in {single} if single else set(file_of.values()):
        try:
            with safe_open(path, framework="pt") as file:
                held |= {Stored(path, key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged: {error}") from None
    listed = {Stored(path, key) for key, path in file_of.items()}
    if missing := listed - held:
        raise InputError(f"{min(missing)} is missing; {index} says it is here")
    return {stored.key: stored for stored in listed or held}


def read_index(name: str, index_name: str) -> dict[str, Path]:
    """The index of a model in several files -> {tensor: its file}; {} if there is no index.

    Each file must exist and lie in the directory. transformers would open any path.
    """
    index, paths = local_file(name, index_name), {}
    if index is None:
        return {}
    try:
        shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        for shard in set(shard_of.values()):
            if re.search(r"^/|(^|/)\.\.(/|$)|[\\:]", shard):
                raise InputError(f"{index}: {shard} leads out of the directory")
            paths[shard] = local_file(name, shard)
            if paths[shard] is None:
                raise InputError(f"{index}: {shard} is not there")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: no index of shards: {error!r}") from None
    return {key: paths[shard] for key, shard in shard_of.items()}


def read_tensor(stored: Stored, device: torch.device, like: Tensor | None = None) -> Tensor:
    """A copy of one tensor on the device; with `like`, in its shape, its dtype and its kind.

    The file is opened anew for each tensor. What is read of a mapped file stays in memory until the
    file is closed, so a file of 5 GB would take 5 GB in the end.
    """
    with safe_open(stored.path, framework="pt") as file:
        tensor = file.get_tensor(stored.key)
    if like is None:
        return tensor.to(device, copy=True)
    if tensor.shape != like.shape:
        raise InputError(f"{stored}: shape {tuple(tensor.shape)}, not {tuple(like.shape)}")
    dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
    tensor = tensor.to(device, dtype, copy=True)
    return nn.Parameter(tensor, False) if isinstance(like, nn.Parameter) else tensor


def is_finite(tensor: Tensor) -> bool:
    """Are all numbers finite? Looks at minimum and maximum, which NaN reaches, too; a mask would be
    as large as the tensor."""
    return bool(torch.stack(tensor.detach().aminmax()).isfinite().all())
