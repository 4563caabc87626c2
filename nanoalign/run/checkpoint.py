"""Checkpoints: whole or not at all, and the run goes on from one as if nothing had happened.

OUTPUT_DIR/checkpoint-N holds what OUTPUT_DIR holds at the end (an adapter or a model, and the
tokenizer), and the state of training beside it:

    state.safetensors   what trains, what the optimizer keeps of it, the random generators
    state.json          step, tokens so far, and the fingerprint of the run

files.py writes it, so that a crash at any moment leaves either all of it or nothing. No pickle is
written or read: Trainer's optimizer.pt and rng_state.pth are pickles, which can run code when they
are opened.

The order of the data is a function of (seed, epoch), so the step alone says where in the data a
run was. The fingerprint says which run it was: other data, flags or weights would not continue it.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanoalign import InputError
from nanoalign.data import Examples
from nanoalign.formats.note import NOTE
from nanoalign.run import paged, ranks, shards
from nanoalign.run.files import remove, saving
from nanoalign.run.flags import Config

WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
FREE = {f.name for f in fields(Config) if f.metadata.get("free")}  # may change on the way
UNREADABLE = OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError


def data_fingerprint(examples: Examples) -> str:
    """SHA-256 of what is trained on: ids, masks and labels, in order."""
    data = hashlib.sha256()
    for e in examples:
        texts = [([*ids], [bool(trains) for trains in mask]) for ids, mask in e.texts]
        more = [] if e.completions is None else [e.completions]
        more += [e.pairs] if e.count > 2 else []
        data.update(json.dumps([[*e.prompt], texts, e.label, *more]).encode())
    return data.hexdigest()


def sum_of_bits(tensor: Tensor) -> int:
    """The sum of a tensor's numbers, their bits read as whole numbers. A sum of floats depends on
    its order, and so on the number of threads and the device; this one is exact in any order.

    It is summed in parts because torch makes an int64 copy of what it sums as int64.
    """
    bits = tensor.detach().contiguous().view(WHOLE[tensor.element_size()]).flatten()
    return sum(part.sum(dtype=torch.int64).item() for part in bits.split(2**24))


def fingerprint(flags: dict, data: str, model: nn.Module) -> dict:
    """What makes a run this run: its flags, data (data_fingerprint) and weights, before step 1."""
    weights = {True: hashlib.sha256(), False: hashlib.sha256()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        line = f"{name} {tuple(tensor.shape)} {shards.over_parts(sum_of_bits, tensor)}\n"
        weights[tensor.requires_grad].update(line.encode())
    return {
        "flags": flags,
        "data": data,
        "base": weights[False].hexdigest(),
        "starting weights": weights[True].hexdigest(),
    }


def differences(ours: dict, theirs: dict) -> str:
    """What of our fingerprint was another then: "--beta was 0.1, is 0.5; other data"."""
    now, then = ours["flags"], theirs["flags"]
    flags = sorted((now.keys() | then.keys()) - FREE)
    changed = [name for name in flags if now.get(name) != then.get(name)]
    words = [f"--{name} was {then.get(name)}, is {now.get(name)}" for name in changed]
    parts = [
        part for part in ours if part != "flags" and ours[part] != theirs.get(part, ours[part])
    ]
    return "; ".join(words + [f"other {part}" for part in sorted(parts)])


def state_tensors(named: dict[str, nn.Parameter], optimizer) -> dict[str, Tensor]:
    """What a checkpoint keeps of the trained parameters, by name, and of all ranks' generators: on
    rank 0, which writes it. All ranks call it; on the others it is empty.

    Tensors are called rng.DEVICE (of rank 1, 2, ... rng.DEVICE.RANK), weight.PARAMETER and, for
    whatever the optimizer keeps of a parameter, KEY.PARAMETER (AdamW: exp_avg, exp_avg_sq and step;
    SGD: momentum_buffer).
    """
    own = {_of_rank(f"rng.{name}"): m.get_rng_state() for name, m in _generators().items()}
    tensors = {name: t for states in ranks.gather(own) for name, t in states.items()}
    for name, parameter in named.items():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{key}.{name}"] = torch.as_tensor(value)
    gathered = {name: shards.to_rank_0(t) for name, t in tensors.items()}
    return {name: t.contiguous() for name, t in gathered.items() if t is not None}


def save_state(directory: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """state.safetensors and state.json."""
    save_file(tensors, directory / "state.safetensors")
    (directory / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_state(directory: Path, named: dict[str, nn.Parameter], optimizer, state: dict) -> None:
    """Put weights, optimizer, random generators and `state` back as they were saved.

    Raises InputError when the checkpoint is one of another run, and one of UNREADABLE when it is
    damaged.
    """
    then = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    if wrong := differences(state["fingerprint"], then["fingerprint"]):
        raise InputError(f"{directory}: a checkpoint of another run: {wrong}")
    then["fingerprint"] = state["fingerprint"]  # free flags are those of now
    for key, value in state.items():
        if type(then[key]) is not type(value):
            raise ValueError(f"{key} is {then[key]!r}")
    saved = load_file(directory / "state.safetensors")
    generators = {name: saved.pop(name) for name in list(saved) if name.startswith("rng.")}
    for name, parameter in named.items():
        parameter.detach().copy_(shards.part_of(saved.pop(f"weight.{name}"), parameter))
    optimizer.state.clear()
    for name, tensor in saved.items():
        key, _, owner = name.partition(".")
        if owner not in named:
            raise ValueError(f"{name} belongs to nothing that trains")
        hosted = isinstance(optimizer, paged.AdamW)  # its states stay in the host's memory
        state_of = optimizer.state[named[owner]]
        state_of[key] = tensor if hosted else shards.part_of(tensor, named[owner])
    for device, module in _generators().items():
        name = _of_rank(f"rng.{device}")
        if name == "rng.cpu" or name in generators:  # there may be more ranks than there were
            module.set_rng_state(generators[name])
    state |= then


def resume(which: str, directory: Path, named: dict, optimizer, state: dict) -> Path | None:
    """Go on from the newest checkpoint of `directory` ("last") or from a given one, if there is one
    yet. A damaged checkpoint is named and the one before it taken. -> the one that was taken."""
    found = checkpoints_named(which, directory)
    for path in reversed(found):
        try:
            load_state(path, named, optimizer, state)
            print(f"going on from {path}")
            return path
        except UNREADABLE as error:
            why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            if path is found[0]:
                raise InputError(f"{path}: damaged: {why}") from None
            print(f"{path}: damaged: {why}; taking the checkpoint before it")
    print(f"{directory if which == 'last' else which}: no checkpoint yet; starting at step 0")


def _generators() -> dict:
    """Device -> the module that holds its random generator, for the devices that are here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return {"cpu": torch} | {name: getattr(torch, name) for name in here if here[name]}


def _of_rank(name: str) -> str:
    return f"{name}.{ranks.RANK}" if ranks.RANK else name


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of an output directory, oldest first."""
    found = [p for p in Path(directory).glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def checkpoints_named(which: str, directory: Path) -> list[Path]:
    """The checkpoints that --resume_from_checkpoint names, oldest first: those of the run's
    directory ("last"), those of another, or just the one."""
    path = directory if which == "last" else Path(which)
    one = path.name.startswith("checkpoint-") or (path / "state.json").exists()
    return [path] if one and which != "last" else checkpoints(path)


def lies_in(checkpoint: Path, directory: Path) -> bool:
    return os.path.realpath(checkpoint.parent) == os.path.realpath(directory)


def continues(which: str | None, directory: Path) -> bool:
    """Is what --resume_from_checkpoint names a run in this directory? One that was killed before
    its first checkpoint has left its metrics only."""
    if which == "last":
        left = "run.json", "metrics.jsonl", "tmp-metrics.jsonl"
        return bool(checkpoints(directory)) or any((directory / name).exists() for name in left)
    found = checkpoints_named(which, directory) if which else []
    return any(lies_in(path, directory) for path in found)


def prune(directory: Path, keep: int | None, step: float = math.inf) -> None:
    """Delete all but the newest `keep` checkpoints of the steps up to `step`.

    Those beyond it may be damaged; they don't count, and the run will write them again.
    """
    found = [path for path in checkpoints(directory) if int(path.name[11:]) <= step]
    for path in [] if keep is None else found[: max(0, len(found) - keep)]:
        with contextlib.suppress(OSError):  # a checkpoint too many must not end a run
            remove(path)


def take_over(directory: Path, fresh: bool) -> None:
    """Make `directory` the run's own.

    What a crash left unfinished goes, and run.json, which says that a run is finished. At a `fresh`
    start so does what an earlier run left and this one may not write over: its checkpoints would be
    taken for this run's by --resume_from_checkpoint, its note on a 4-bit base by merge, and its
    events by TensorBoard.
    """
    with saving(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for path in [*directory.glob("tmp-*checkpoint-*"), directory / "tmp-final"]:
            shutil.rmtree(path, ignore_errors=True)
        (directory / "run.json").unlink(missing_ok=True)
        if fresh:
            names = "adapter_config.json", "adapter_model.safetensors", NOTE
            events = directory.glob("events.out.tfevents.*")
            for path in [*(directory / name for name in names), *events]:
                path.unlink(missing_ok=True)
            prune(directory, keep=0)
