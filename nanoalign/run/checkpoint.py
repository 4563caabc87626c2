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

A run is finished when its last weights are saved. run.json, which comes right after them, says so;
it holds what state.json holds, and a finished run that is resumed does only what comes after it.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanoalign import InputError, one_line
from nanoalign.data import Examples
from nanoalign.fast import paged
from nanoalign.formats.weights import NOTE
from nanoalign.run import ranks
from nanoalign.run.files import install, replace, saving
from nanoalign.run.flags import Config
from nanoalign.train import learning_rate, plan

WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
FREE = {
    f.name for f in dataclasses.fields(Config) if f.metadata.get("free")
}  # may change on the way
HOLDS = {  # flag -> the part of the fingerprint that knows what it names, wherever that lies
    "dataset_name": "data", "dataset_train_split": "data", "eval_dataset": "evaluation data",
    "dataset_test_split": "evaluation data", "model_name_or_path": "base",
    "adapter_name_or_path": "starting weights",
}  # fmt: skip
LENGTH = "max_steps", "num_train_epochs"
UNREADABLE = OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError
HEADS = "heads.safetensors"  # what a script has added to `policy.lm`, a reward head, say
RESULT = (  # what a finished run leaves, and what else would be taken for it
    "run.json", "metrics.jsonl", "README.md", "curves.png", NOTE, "config.json",
    "generation_config.json", "adapter_config.json", "adapter_model.*", "model*.safetensors",
    "model.safetensors.index.json", "pytorch_model*", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "additional_chat_templates", HEADS,
)  # fmt: skip
PREVIOUS = "previous-result"  # a directory: an earlier run's result, until this one's is whole


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


def weights_fingerprint(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the frozen weights, "base", and of those that train, "starting weights"."""
    weights = {True: hashlib.sha256(), False: hashlib.sha256()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        line = f"{name} {tuple(tensor.shape)} {ranks.over_parts(sum_of_bits, tensor)}\n"
        weights[tensor.requires_grad].update(line.encode())
    return {"base": weights[False].hexdigest(), "starting weights": weights[True].hexdigest()}


def fingerprint(
    cfg: Config, examples: Examples, held_out: Examples, model: nn.Module, optimizer
) -> dict:
    """What makes a run this run: its flags, data, weights and optimizer, before step 1."""
    return {
        "flags": vars(cfg),
        "data": data_fingerprint(examples),
        **weights_fingerprint(model),
        "evaluation data": data_fingerprint(held_out),
        "examples": len(examples),
        "optimizer": type(optimizer).__name__,
        "number of examples a step": cfg.per_step,
    }


def differences(cfg: Config, ours: dict, theirs: dict, done: int) -> str:
    """What of our fingerprint was another then: "--beta was 0.1, is 0.5; other data". A flag that
    was not known then had its default.

    Another path is no difference where what it names is the same, nor is another number of steps
    where it leaves the `done` ones as they were; that is only said.
    """
    now, then = ours["flags"], vars(type(cfg)()) | theirs["flags"]
    flags = sorted((now.keys() | then.keys()) - FREE)
    changed = [name for name in flags if now.get(name) != then.get(name)]
    parts = ours.keys() - {"flags", "examples"}
    parts = sorted(part for part in parts if ours[part] != theirs.get(part, ours[part]))
    words, harmless = [], []
    for name in changed:
        said, part = f"--{name} was {then.get(name)}, is {now.get(name)}", HOLDS.get(name)
        if part in theirs and part not in parts:
            harmless.append(f"{said}: the same {part}")
        elif name not in LENGTH:
            words.append(said)
        elif why := other_steps(cfg, then, ours["examples"], done):
            words.append(f"{said}: {why}")
        else:
            harmless.append(f"{said}: the steps that were done are the same")
    words += [f"other {part}" for part in parts]
    for line in [] if words else harmless:
        print(one_line(line))
    return "; ".join(words)


def totals(cfg: Config, then: dict, examples: int) -> tuple[Config, int, int]:
    """The flags with the number of steps that they asked for then; that number, and the new one."""
    old = dataclasses.replace(cfg, **{name: then[name] for name in LENGTH})
    return old, plan(old, examples)[1], plan(cfg, examples)[1]


def other_steps(cfg: Config, then: dict, examples: int, done: int) -> str:
    """Why the `done` steps would not have been the same, if not so many had been asked for."""
    old, before, total = totals(cfg, then, examples)
    if total < done:
        return f"step {done} is done"
    if any(learning_rate(old, i, before) != learning_rate(cfg, i, total) for i in range(done)):
        kind = f"a {cfg.lr_scheduler_type} schedule over another number of steps"
        return f"{kind} would have had other learning rates; a constant one goes on"
    return ""


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
    gathered = {name: ranks.to_rank_0(t) for name, t in tensors.items()}
    return {name: t.contiguous() for name, t in gathered.items() if t is not None}


def save_state(directory: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """state.safetensors and state.json."""
    save_file(tensors, directory / "state.safetensors")
    (directory / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_state(
    directory: Path, cfg: Config, named: dict[str, nn.Parameter], optimizer, state: dict
) -> None:
    """Put weights, optimizer, random generators and `state` back as they were saved. What the
    checkpoint does not know of `state`, but the step, stays as it is at the start of a run.

    Raises InputError when the checkpoint is one of another run, and one of UNREADABLE when it is
    damaged.
    """
    then = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    if wrong := differences(cfg, state["fingerprint"], then["fingerprint"], then["step"]):
        raise InputError(f"{directory}: a checkpoint of another run: {wrong}")
    then["fingerprint"] = state["fingerprint"]  # free flags are those of now
    then = state | {"step": None} | then
    for key, value in state.items():
        if type(then[key]) is not type(value):
            raise ValueError(f"{key} is {then[key]!r}")
    saved = load_file(directory / "state.safetensors")
    generators = {name: saved.pop(name) for name in list(saved) if name.startswith("rng.")}
    for name, parameter in named.items():
        parameter.detach().copy_(ranks.part_of(saved.pop(f"weight.{name}"), parameter))
    optimizer.state.clear()
    for name, tensor in saved.items():
        key, _, owner = name.partition(".")
        if owner not in named:
            raise ValueError(f"{name} belongs to nothing that trains")
        hosted = isinstance(optimizer, paged.AdamW)  # its states stay in the host's memory
        state_of = optimizer.state[named[owner]]
        state_of[key] = tensor if hosted else ranks.part_of(tensor, named[owner])
    for device, module in _generators().items():
        name = _of_rank(f"rng.{device}")
        if name == "rng.cpu" or name in generators:  # there may be more ranks than there were
            module.set_rng_state(generators[name])
    state |= then


def load_weights(directory: Path, named: dict[str, nn.Parameter]) -> None:
    """Put back what trains, and nothing else."""
    path = directory / "state.safetensors"
    try:
        with safe_open(path, "pt") as file:
            for name, parameter in named.items():
                saved = file.get_tensor(f"weight.{name}")
                parameter.detach().copy_(ranks.part_of(saved, parameter))
    except UNREADABLE as error:
        raise InputError(f"{path}: damaged: {error}") from None


def resume(cfg: Config, named: dict, optimizer, state: dict) -> Path | None:
    """Go on from the newest checkpoint of the run's directory ("last") or from a given one, if
    there is one yet. A damaged checkpoint is named and the one before it taken. -> the one that was
    taken."""
    which, directory = cfg.resume_from_checkpoint, Path(cfg.output_dir)
    found = checkpoints_named(which, directory)
    for path in reversed(found):
        try:
            load_state(path, cfg, named, optimizer, state)
            print(f"going on from {path}")
            return path
        except UNREADABLE as error:
            why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            if path is found[0]:
                raise InputError(f"{path}: damaged: {why}") from None
            print(f"{path}: damaged: {why}; taking the checkpoint before it")
    print(f"{directory if which == 'last' else which}: no checkpoint yet; starting at step 0")


def finished(cfg: Config, state: dict) -> bool:
    """Is the run that is to be resumed finished? Then `state` is that of its end. It is not if more
    steps are asked for."""
    path = Path(cfg.output_dir, "run.json")
    if not (names_own(cfg.resume_from_checkpoint, path.parent) and path.exists()):
        return False
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        theirs, done = then | {"data": then["data_sha256"]}, then.get("state", {}).get("step", 0)
        wrong = differences(cfg, state["fingerprint"], theirs, done)
        flags = vars(type(cfg)()) | then["flags"]
        _, before, total = totals(cfg, flags, state["fingerprint"]["examples"])
    except UNREADABLE as error:
        raise InputError(f"{path}: damaged: {error!r}") from None
    if wrong:
        raise InputError(f"{path.parent}: another run, which is finished: {wrong}")
    if total > before:
        if not checkpoints(path.parent):
            left = "no checkpoint is left to go on from; --save_steps writes some"
            raise InputError(f"{path.parent}: finished at step {done}, and {left}")
        print(f"{path.parent}: was finished at step {done}, goes on to step {total}")
        return False
    state |= then.get("state", {})
    return True


def names_own(which: str | None, directory: Path) -> bool:
    """Does --resume_from_checkpoint name the run's own directory?"""
    return which == "last" or bool(which) and same(which, directory)


def same(path: str | Path, other: str | Path) -> bool:
    """Links and ".." followed."""
    return os.path.realpath(path) == os.path.realpath(other)


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
    path = directory if names_own(which, directory) else Path(which)
    one = path.name.startswith("checkpoint-") or (path / "state.json").exists()
    return [path] if one and path != directory else checkpoints(path)


def kept_in(cfg: Config, name: str) -> dict:
    """What a file of JSON says in the checkpoint that the run goes on from; {} if nothing."""
    which = cfg.resume_from_checkpoint
    for path in reversed(checkpoints_named(which, Path(cfg.output_dir)) if which else []):
        with contextlib.suppress(OSError, ValueError):  # damaged, as `resume` will say
            said = json.loads((path / name).read_text(encoding="utf-8"))
            return said if isinstance(said, dict) else {}
    return {}


def lies_in(checkpoint: Path, directory: Path) -> bool:
    """Also if one of the two is named by a link."""
    real = Path(os.path.realpath(checkpoint))
    return same(checkpoint.parent, directory) or same(real.parent, directory)


def continues(which: str | None, directory: Path) -> bool:
    """Is what --resume_from_checkpoint names a run in this directory? One that was killed before
    its first checkpoint has left its metrics only."""
    if names_own(which, directory):
        left = "run.json", "metrics.jsonl"
        return bool(checkpoints(directory)) or any((directory / name).exists() for name in left)
    found = checkpoints_named(which, directory) if which else []
    return any(lies_in(path, directory) for path in found)


def prune(directory: Path, keep: int | None, step: float = math.inf, best: int = 0) -> None:
    """Delete all but the newest `keep` checkpoints of the steps up to `step`, and but the best.

    Those beyond it may be damaged; they don't count, and the run will write them again.
    """
    found = [path for path in checkpoints(directory) if best != int(path.name[11:]) <= step]
    for path in [] if keep is None else found[: max(0, len(found) - keep)]:
        with contextlib.suppress(OSError):  # a checkpoint too many must not end a run
            replace(path)


def take_over(directory: Path, fresh: bool) -> None:
    """Make `directory` a new run's own, or that of one that is resumed and not finished.

    At a `fresh` start what an earlier run left would be taken for this one's: its checkpoints by
    --resume_from_checkpoint, its weights by whoever opens the directory, its events by TensorBoard.
    Its result waits in PREVIOUS until there is a newer one.
    """
    with saving(directory):
        if fresh:
            set_aside(directory)
            for path in directory.glob("events.out.tfevents.*"):
                path.unlink()
            prune(directory, keep=0)
        (directory / "run.json").unlink(missing_ok=True)


def set_aside(directory: Path) -> None:
    """Move a result, which has weights, to PREVIOUS. They come last: a start that is killed in the
    midst finds them here, and goes on."""
    left = [path for name in RESULT for path in directory.glob(name)]
    weights = [path for path in left if path.suffix in (".safetensors", ".bin")]
    if weights:
        (directory / PREVIOUS).mkdir(exist_ok=True)
        for path in sorted(left, key=weights.__contains__):
            os.replace(path, directory / PREVIOUS / path.name)


def clean_up(directory: Path) -> None:
    """After a crash: what was complete gets to its place, what was not goes, and so does an older
    result if a newer one is there."""
    with saving(directory):
        for name in ("tmp-checkpoint-*", "tmp-final", "tmp-*rehearsal", "tmp-old-*"):
            for path in directory.glob(name):
                shutil.rmtree(path, ignore_errors=True)
        install(directory)
        if (directory / "run.json").exists():
            replace(directory / PREVIOUS)


def writes_over(directory: Path, path: str) -> bool:
    """Would a run in `directory` delete or overwrite this file, or one in this folder?"""
    places = [Path(os.path.abspath(path)), Path(os.path.realpath(path))]
    inner = [p.relative_to(directory).parts for p in places if p.is_relative_to(directory)]
    names = *RESULT, "checkpoint-*", "tmp-*", PREVIOUS
    return any(not parts or fnmatch(parts[0], name) for parts in inner for name in names)
