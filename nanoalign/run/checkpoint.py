"""Checkpoints. A run that is resumed from one gives the same weights as a run without a break.

OUTPUT_DIR/checkpoint-N holds an adapter or a model and the tokenizer, as OUTPUT_DIR does at the
end. Two more files hold the state of training:

    state.safetensors   the trained weights, the optimizer's states, the random generators
    state.json          the step, the number of tokens so far, the fingerprint of the run

A crash leaves a checkpoint complete or leaves none (files.py). No pickle is written or read. The
big libraries' optimizer.pt and rng_state.pth are pickles, which can run code when they are opened.

The order of the data depends on the seed and the epoch alone, so the step tells the place in the
data. The fingerprint tells one run from another. A checkpoint of a run with other data, other flags
or other weights is refused.

run.json is written right after the last weights and marks the run as finished. It holds what
state.json holds. When a finished run is resumed, only its last evaluation and its report are made.
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

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes
# Flags that may change when a run is resumed.
FREE = {f.name for f in dataclasses.fields(Config) if f.metadata.get("free")}
PART = {  # flag with a path -> the part of the fingerprint that tells what is there
    "dataset_name": "data", "dataset_train_split": "data", "eval_dataset": "evaluation data",
    "dataset_test_split": "evaluation data", "model_name_or_path": "base",
    "adapter_name_or_path": "starting weights",
}  # fmt: skip
LENGTH = "max_steps", "num_train_epochs"
UNREADABLE = OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError
HEADS = "heads.safetensors"  # modules that a script has added to `policy.lm`, such as a reward head
RESULT = (  # files of a finished run, and files that a reader would take for them
    "run.json", "metrics.jsonl", "README.md", "curves.png", NOTE, "config.json",
    "generation_config.json", "adapter_config.json", "adapter_model.*", "model*.safetensors",
    "model.safetensors.index.json", "pytorch_model*", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "additional_chat_templates", HEADS,
)  # fmt: skip
PREVIOUS = "previous-result"  # holds an earlier run's RESULT until this run has one


def data_fingerprint(examples: Examples) -> str:
    """SHA-256 of the ids, masks and labels of all examples, in their order."""
    data = hashlib.sha256()
    for e in examples:
        texts = [([*ids], [bool(trains) for trains in mask]) for ids, mask in e.texts]
        more = [] if e.completions is None else [e.completions]
        more += [e.pairs] if e.count > 2 else []
        data.update(json.dumps([[*e.prompt], texts, e.label, *more]).encode())
    return data.hexdigest()


def sum_of_bits(tensor: Tensor) -> int:
    """The sum of a tensor's numbers, with their bits read as integers. It is the same in any order.
    A sum of floats is not: it depends on the device and on the number of threads. The tensor is
    summed in parts, because torch makes an int64 copy of what it sums."""
    if ranks.is_part(tensor):
        return sum(ranks.gather(sum_of_bits(tensor.to_local())))
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).flatten()
    return sum(part.sum(dtype=torch.int64).item() for part in bits.split(2**24))


def weights_fingerprint(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the frozen weights, "base", and of those that train, "starting weights"."""
    weights = {True: hashlib.sha256(), False: hashlib.sha256()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        line = f"{name} {tuple(tensor.shape)} {sum_of_bits(tensor)}\n"
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
    """What makes this another run than the saved one: "--beta was 0.1, is 0.5; other data". "" if
    it is the same run.

    ours, theirs: the fingerprints of this run and of the saved one, which has made `done` steps.
    A flag that the saved run did not know yet counts as its default. Two changes are harmless, and
    a line is printed for them: another path to the same thing, and another number of steps if the
    `done` steps would have been the same.
    """
    now, then = ours["flags"], vars(type(cfg)()) | theirs["flags"]
    flags = sorted((now.keys() | then.keys()) - FREE)
    changed = [name for name in flags if now.get(name) != then.get(name)]
    parts = ours.keys() - {"flags", "examples"}
    parts = sorted(part for part in parts if ours[part] != theirs.get(part, ours[part]))
    harmful, harmless = [], []
    for name in changed:
        change, part = f"--{name} was {then.get(name)}, is {now.get(name)}", PART.get(name)
        if part in theirs and part not in parts:
            harmless.append(f"{change}: the same {part}")
        elif name not in LENGTH:
            harmful.append(change)
        elif why := other_steps(cfg, then, ours["examples"], done):
            harmful.append(f"{change}: {why}")
        else:
            harmless.append(f"{change}: the steps that were done are the same")
    harmful += [f"other {part}" for part in parts]
    for line in [] if harmful else harmless:
        print(one_line(line))
    return "; ".join(harmful)


def with_old_length(cfg: Config, then: dict, examples: int) -> tuple[Config, int, int]:
    """`cfg` with the saved run's flags for its length; how many steps that is, and how many now."""
    old = dataclasses.replace(cfg, **{name: then[name] for name in LENGTH})
    return old, plan(old, examples)[1], plan(cfg, examples)[1]


def other_steps(cfg: Config, then: dict, examples: int, done: int) -> str:
    """Why a run of the new length would not have made the same `done` steps. "" if it would."""
    old, old_total, total = with_old_length(cfg, then, examples)
    if total < done:
        return f"step {done} is done"
    if any(learning_rate(old, i, old_total) != learning_rate(cfg, i, total) for i in range(done)):
        kind = f"a {cfg.lr_scheduler_type} schedule over another number of steps"
        return f"{kind} would have had other learning rates; a constant one goes on"
    return ""


def state_tensors(trained: dict[str, nn.Parameter], optimizer) -> dict[str, Tensor]:
    """The content of state.safetensors, by name:

        weight.PARAMETER   a trained weight
        KEY.PARAMETER      a state that the optimizer has for it (AdamW: exp_avg, exp_avg_sq, step)
        rng.DEVICE         the state of rank 0's random generator
        rng.DEVICE.RANK    that of another rank's

    All ranks must call it together. Rank 0, which writes the file, gets the content; the others get
    an empty dict.
    """
    mine = {_of_rank(f"rng.{name}"): m.get_rng_state() for name, m in _generators().items()}
    tensors = {name: t for states in ranks.gather(mine) for name, t in states.items()}
    for name, parameter in trained.items():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{key}.{name}"] = torch.as_tensor(value)
    gathered = {name: ranks.to_rank_0(t) for name, t in tensors.items()}
    return {name: t.contiguous() for name, t in gathered.items() if t is not None}


def save_state(directory: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write state.safetensors and state.json."""
    save_file(tensors, directory / "state.safetensors")
    (directory / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_state(
    directory: Path, cfg: Config, trained: dict[str, nn.Parameter], optimizer, state: dict
) -> None:
    """Load weights, optimizer, random generators and `state` from a checkpoint.

    A key of `state` that an older checkpoint does not have keeps its value; only the step must be
    there. Raises InputError if the checkpoint belongs to another run, and one of UNREADABLE if it
    is damaged.
    """
    then = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    if wrong := differences(cfg, state["fingerprint"], then["fingerprint"], then["step"]):
        raise InputError(f"{directory}: a checkpoint of another run: {wrong}")
    then["fingerprint"] = state["fingerprint"]  # with the new values of the free flags
    then = state | {"step": None} | then
    for key, value in state.items():
        if type(then[key]) is not type(value):
            raise ValueError(f"{key} is {then[key]!r}")
    saved = load_file(directory / "state.safetensors")
    generators = {name: saved.pop(name) for name in list(saved) if name.startswith("rng.")}
    for name, parameter in trained.items():
        parameter.detach().copy_(ranks.part_of(saved.pop(f"weight.{name}"), parameter))
    optimizer.state.clear()
    for name, tensor in saved.items():
        key, _, owner = name.partition(".")
        if owner not in trained:
            raise ValueError(f"{name} belongs to nothing that trains")
        if not isinstance(optimizer, paged.AdamW):  # its states stay in the CPU's memory
            tensor = ranks.part_of(tensor, trained[owner])
        optimizer.state[trained[owner]][key] = tensor
    for device, module in _generators().items():
        name = _of_rank(f"rng.{device}")
        if name == "rng.cpu" or name in generators:  # a new rank has none in the checkpoint
            module.set_rng_state(generators[name])
    state |= then


def load_weights(directory: Path, trained: dict[str, nn.Parameter]) -> None:
    """Load the trained weights of a checkpoint, and nothing else."""
    path = directory / "state.safetensors"
    try:
        with safe_open(path, "pt") as file:
            for name, parameter in trained.items():
                saved = file.get_tensor(f"weight.{name}")
                parameter.detach().copy_(ranks.part_of(saved, parameter))
    except UNREADABLE as error:
        raise InputError(f"{path}: damaged: {error}") from None


def resume(cfg: Config, trained: dict, optimizer, state: dict) -> Path | None:
    """Load the checkpoint that --resume_from_checkpoint names. -> its path, or None if there is no
    checkpoint yet. If it is damaged, say so and load the one before it."""
    which, directory = cfg.resume_from_checkpoint, Path(cfg.output_dir)
    found = checkpoints_named(which, directory)
    for path in reversed(found):
        try:
            load_state(path, cfg, trained, optimizer, state)
            print(f"going on from {path}")
            return path
        except UNREADABLE as error:
            why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            if path is found[0]:
                raise InputError(f"{path}: damaged: {why}") from None
            print(f"{path}: damaged: {why}; taking the checkpoint before it")
    print(f"{directory if which == 'last' else which}: no checkpoint yet; starting at step 0")


def is_finished(cfg: Config, state: dict) -> bool:
    """Is the run that is to be resumed finished? If so, `state` is updated to its end. A run that
    now gets more steps is not finished. InputError if run.json belongs to another run."""
    path = Path(cfg.output_dir, "run.json")
    if not (is_own_directory(cfg.resume_from_checkpoint, path.parent) and path.exists()):
        return False
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        theirs, done = then | {"data": then["data_sha256"]}, then.get("state", {}).get("step", 0)
        wrong = differences(cfg, state["fingerprint"], theirs, done)
        flags = vars(type(cfg)()) | then["flags"]
        _, old_total, total = with_old_length(cfg, flags, state["fingerprint"]["examples"])
    except UNREADABLE as error:
        raise InputError(f"{path}: damaged: {error!r}") from None
    if wrong:
        raise InputError(f"{path.parent}: another run, which is finished: {wrong}")
    if total > old_total:
        if not checkpoints(path.parent):
            left = "no checkpoint is left to go on from; --save_steps writes some"
            raise InputError(f"{path.parent}: finished at step {done}, and {left}")
        print(f"{path.parent}: was finished at step {done}, goes on to step {total}")
        return False
    state |= then.get("state", {})
    return True


def is_own_directory(which: str | None, directory: Path) -> bool:
    """Does --resume_from_checkpoint name the run's own directory? Paths may be links."""
    return which == "last" or bool(which) and os.path.realpath(which) == os.path.realpath(directory)


def _generators() -> dict:
    """Device -> the module of torch with its random generator."""
    cuda = {"cuda": torch.cuda} if torch.cuda.is_available() else {}
    mps = {"mps": torch.mps} if torch.backends.mps.is_available() else {}
    return {"cpu": torch, **cuda, **mps}


def _of_rank(name: str) -> str:
    return f"{name}.{ranks.RANK}" if ranks.RANK else name


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of an output directory, oldest first."""
    found = [p for p in Path(directory).glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def checkpoints_named(which: str, directory: Path) -> list[Path]:
    """The checkpoints that --resume_from_checkpoint names, oldest first. `which` is "last" for the
    run's directory, or another directory of checkpoints, or one checkpoint."""
    path = directory if is_own_directory(which, directory) else Path(which)
    one = path.name.startswith("checkpoint-") or (path / "state.json").exists()
    return [path] if one and path != directory else checkpoints(path)


def kept_in(cfg: Config, name: str) -> dict:
    """The content of a JSON file in the checkpoint that the run is resumed from; {} without one."""
    which = cfg.resume_from_checkpoint
    for path in reversed(checkpoints_named(which, Path(cfg.output_dir)) if which else []):
        with contextlib.suppress(OSError, ValueError):  # `resume` will report the damage
            content = json.loads((path / name).read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


def lies_in(checkpoint: Path, directory: Path) -> bool:
    """Is the checkpoint in the directory? Either path may be a link."""
    parents = checkpoint.parent, Path(os.path.realpath(checkpoint)).parent
    return os.path.realpath(directory) in map(os.path.realpath, parents)


def continues(which: str, directory: Path) -> bool:
    """Does --resume_from_checkpoint name a run in this directory? A run that was killed before its
    first checkpoint has left only its metrics."""
    files = directory / "run.json", directory / "metrics.jsonl"
    if is_own_directory(which, directory) and any(path.exists() for path in files):
        return True
    return any(lies_in(path, directory) for path in checkpoints_named(which, directory))


def prune(directory: Path, keep: int | None, step: float = math.inf, best: int = 0) -> None:
    """Delete old checkpoints. The newest `keep` stay, and so does the one of step `best`.
    Checkpoints after `step` do not count: they may be damaged, and the run writes them again."""
    found = [path for path in checkpoints(directory) if best != int(path.name[11:]) <= step]
    for path in [] if keep is None else found[: max(0, len(found) - keep)]:
        with contextlib.suppress(OSError):  # a checkpoint too many must not end a run
            replace(path)


def take_over(directory: Path, fresh: bool) -> None:
    """Prepare the output directory for a run that is not finished.

    A `fresh` run must not be mixed up with an earlier one there. So the earlier checkpoints and
    TensorBoard's events are deleted. An earlier result moves to PREVIOUS until there is a new one.
    Its weights move last: if this is killed, the next start still finds them and moves the rest.
    """
    with saving(directory):
        if fresh:
            result = [path for name in RESULT for path in directory.glob(name)]
            weights = [path for path in result if path.suffix in (".safetensors", ".bin")]
            if weights:
                (directory / PREVIOUS).mkdir(exist_ok=True)
                for path in sorted(result, key=weights.__contains__):
                    os.replace(path, directory / PREVIOUS / path.name)
            for path in directory.glob("events.out.tfevents.*"):
                path.unlink()
            prune(directory, keep=0)
        (directory / "run.json").unlink(missing_ok=True)


def clean_up(directory: Path) -> None:
    """Repair a directory after a crash. Incomplete files are deleted and complete ones installed.
    An earlier run's result is deleted once this run has one."""
    with saving(directory):
        for name in ("tmp-checkpoint-*", "tmp-final", "tmp-*rehearsal", "tmp-old-*"):
            for path in directory.glob(name):
                shutil.rmtree(path, ignore_errors=True)
        install(directory)
        if (directory / "run.json").exists():
            replace(directory / PREVIOUS)


def writes_over(directory: Path, path: str) -> bool:
    """Would a run in `directory` delete or overwrite this file, or one in this folder?"""
    paths = [Path(os.path.abspath(path)), Path(os.path.realpath(path))]
    inside = [p.relative_to(directory).parts for p in paths if p.is_relative_to(directory)]
    names = *RESULT, "checkpoint-*", "tmp-*", PREVIOUS
    return any(not parts or fnmatch(parts[0], name) for parts in inside for name in names)
