"""Checkpoints: whole or not at all, and the run goes on from one as if nothing had happened.

OUTPUT_DIR/checkpoint-N holds what OUTPUT_DIR holds at the end (an adapter or a model, and the
tokenizer), and the state of training beside it:

    state.safetensors   what trains, AdamW's two moments of it, the random generators
    state.json          step, tokens so far, and the fingerprint of the run

It is written under another name (with "tmp" in it), flushed to disk and then renamed, so that a
crash at any moment leaves either all of it or nothing. No pickle is written or read: Trainer's
optimizer.pt and rng_state.pth are pickles, which can run code when they are opened.

The order of the data is a function of (seed, epoch), so the step alone says where in the data a
run was. The fingerprint says which run it was: other data, flags or weights would not continue it.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nanoalign import InputError
from nanoalign.data import Example

# flags that may change between a run and its continuation: they do not change what is computed
FREE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_steps",
    "logging_first_step", "eval_steps", "save_steps", "save_total_limit", "report_to",
    "per_device_eval_batch_size", "generate_during_eval",
}  # fmt: skip


def data_fingerprint(examples: list[Example]) -> str:
    """SHA-256 of what is trained on: ids, masks and labels, in order."""
    data = hashlib.sha256()
    for e in examples:
        data.update(json.dumps([e.prompt, e.completions, e.label]).encode())
    return data.hexdigest()


def fingerprint(flags: dict, examples: list[Example], model: nn.Module) -> dict:
    """What makes a run this run: its flags, data and weights. Taken before the first step."""
    weights = {True: hashlib.sha256(), False: hashlib.sha256()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        total = tensor.detach().sum(dtype=torch.float64).item()
        weights[tensor.requires_grad].update(f"{name} {tuple(tensor.shape)} {total!r}\n".encode())
    return {
        "flags": {name: value for name, value in flags.items() if name not in FREE},
        "data": data_fingerprint(examples),
        "base": weights[False].hexdigest(),
        "starting weights": weights[True].hexdigest(),
    }


def flag_differences(ours: dict, theirs: dict) -> list[str]:
    """--beta was 0.1, is 0.5"""
    return [
        f"--{name} was {theirs.get(name)}, is {ours.get(name)}"
        for name in sorted((ours.keys() | theirs.keys()) - FREE)
        if ours.get(name) != theirs.get(name)
    ]


def differences(ours: dict, theirs: dict) -> list[str]:
    """What a checkpoint's fingerprint and this run's disagree in, in words."""
    words = flag_differences(ours["flags"], theirs["flags"])
    for part in ("data", "base", "starting weights"):
        if ours[part] != theirs[part]:
            words.append(f"other {part}")
    return words


STATE = {"step": int, "num_tokens": int, "skipped": int, "window": dict, "time": float}


class Damaged(InputError):
    """A checkpoint that can't be read."""


# ------------------------------------------------------------------------------------- to the disk


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """A disk that is full, or that may not be written to, is one line: InputError."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers raise errors of their own for it
        if not isinstance(error, (OSError, SafetensorError)) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target}: not saved: {reason}; older checkpoints stand") from None


def write_text(target: Path, text: str) -> None:
    """A small file, whole or not at all."""
    beside = target.with_name(f"tmp-{target.name}")
    with saving(target):
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)


def write_whole(target: Path, write: Callable[[Path], None], replace: bool = False) -> None:
    """`write` fills a directory; it appears as `target` when it is complete, or not at all.

    With `replace` its files move one by one into a `target` that exists, adapter or model last.
    Raises InputError when the disk is full or not writable; what was there before stands.
    """
    beside = target.parent / f"tmp-{target.name}" if not replace else target / "tmp-final"
    try:
        with saving(target):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            write(beside)
            files = [path for path in beside.rglob("*") if path.is_file()]
            for path in [*files, beside]:
                _flush(path)
            if not replace:
                _remove(target)
                os.rename(beside, target)
                _flush(target.parent)
                return
            for path in sorted(files, key=lambda path: path.suffix == ".safetensors"):
                os.replace(path, target / path.relative_to(beside))
            _flush(target)
            shutil.rmtree(beside)
    except InputError:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """Wait until the disk has it (a directory: its list of names)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(directory: Path) -> None:
    """Under its own name a checkpoint is whole to the last moment."""
    doomed = directory.with_name(f"tmp-old-{directory.name}")
    if directory.exists():
        os.rename(directory, doomed)
        shutil.rmtree(doomed)


def save_state(directory: Path, named: dict[str, nn.Parameter], optimizer, state: dict) -> None:
    """state.safetensors and state.json of the trained parameters, by name."""
    tensors = {f"rng.{name}": module.get_rng_state() for name, module in _generators().items()}
    for name, parameter in named.items():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, directory / "state.safetensors")
    (directory / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_state(directory: Path, named: dict[str, nn.Parameter], optimizer, ours: dict) -> dict:
    """Put everything back in place as it was saved. -> state.json.

    Raises Damaged, or InputError when the checkpoint is one of another run.
    """
    try:
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        wrong = differences(ours, state["fingerprint"])
        if wrong:
            raise InputError(f"{directory}: a checkpoint of another run: {'; '.join(wrong)}")
        for key, kind in STATE.items():
            if not isinstance(state[key], kind):
                raise ValueError(f"{key} is {state[key]!r}")
        with safe_open(directory / "state.safetensors", framework="pt") as file:
            names = set(file.keys())
            saved = {name: file.get_tensor(name) for name in names}
        moments = {}
        for name, parameter in named.items():
            parameter.data.copy_(saved[f"weight.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {k: saved[f"{k}.{name}"] for k in keys if f"{k}.{name}" in names}
            moments[parameter] = {
                k: v if k == "step" and not parameter.is_cuda else v.to(parameter.device)
                for k, v in found.items()
            }
        optimizer.state.update({p: m for p, m in moments.items() if m})
        for device, module in _generators().items():
            if device == "cpu" or f"rng.{device}" in names:
                module.set_rng_state(saved[f"rng.{device}"])
        return state
    except KeyError as error:
        raise Damaged(f"{directory}: damaged: no {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise Damaged(f"{directory}: damaged: {' '.join(str(error).split())}") from None


def resume(
    which: str | None, directory: Path, named: dict[str, nn.Parameter], optimizer, ours: dict
) -> dict:
    """Go on from the newest checkpoint of `directory` ("last") or from a given one. -> its state.

    {} when `which` is None or there is none yet. A damaged checkpoint is named and the one before
    it taken.
    """
    if which is None:
        return {}
    found = meant(which, directory)
    if not found:
        where = directory if which == "last" else which
        print(f"{where}: no checkpoint yet; starting at step 0")
        return {}
    for path in reversed(found):
        try:
            state = load_state(path, named, optimizer, ours)
        except Damaged as error:
            if path is found[0]:
                raise
            print(f"{error}; taking the checkpoint before it")
            continue
        print(f"going on from {path}")
        return state


def _generators() -> dict:
    """Device -> the module that holds its random generator, for the devices that are here."""
    modules = {"cpu": torch}
    if torch.cuda.is_available():
        modules["cuda"] = torch.cuda
    if torch.backends.mps.is_available():
        modules["mps"] = torch.mps
    return modules


# ------------------------------------------------------------------------------------- directories


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of an output directory, oldest first."""
    found = [p for p in Path(directory).glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def meant(which: str, directory: Path) -> list[Path]:
    """The checkpoints that --resume_from_checkpoint means, oldest first: those of the run's
    directory ("last"), those of another, or just the one."""
    path = directory if which == "last" else Path(which)
    one = path.name.startswith("checkpoint-") or (path / "state.json").exists()
    return [path] if one and which != "last" else checkpoints(path)


def prune(directory: Path, keep: int | None, step: float = math.inf) -> None:
    """Delete all but the newest `keep` checkpoints of the steps up to `step`: what lies beyond it
    may be damaged, and the run will write it again."""
    found = [path for path in checkpoints(directory) if int(path.name[11:]) <= step]
    for path in [] if keep is None else found[: len(found) - keep]:
        with contextlib.suppress(OSError):  # a leftover must not end a run
            _remove(path)


def claim(directory: Path, fresh: bool) -> None:
    """Make `directory` the run's own: without what a crash left unfinished and, at a `fresh` start,
    without an earlier run's checkpoints, which must not be taken for this one's."""
    with saving(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for path in [*directory.glob("tmp-*checkpoint-*"), directory / "tmp-final"]:
            shutil.rmtree(path, ignore_errors=True)
        if fresh:
            for name in ("run.json", "adapter_config.json"):  # would say what this run is not
                (directory / name).unlink(missing_ok=True)
            prune(directory, keep=0)
