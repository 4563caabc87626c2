"""The start of a run: check its directory, read its data, load its policy."""

import contextlib
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import nanoalign
from nanoalign import InputError, one_line, world
from nanoalign.data import Examples, Limits
from nanoalign.formats.layouts import Layouts, describe, read_examples
from nanoalign.model import Policy
from nanoalign.run import checkpoint, ranks
from nanoalign.run.advice import advice, length_advice
from nanoalign.run.device import choose_row_length, effective_settings, use_threads
from nanoalign.run.files import is_free
from nanoalign.run.flags import Config
from nanoalign.run.log import printable
from nanoalign.run.policy import Base, Reader, base_of, load_policy, reader_of


@dataclass
class Run:
    policy: Policy
    examples: Examples
    held_out: Examples
    before: dict | None = None  # what the built-in world measured before training


def start(cfg: Config, layouts: Layouts) -> Run:
    """Check the output directory, read the data and load the model. Print what was found."""
    if cfg.plain:
        nanoalign.plain()
        print("computes with the lesson's definitions; no twin in fast/ is called")

    base = base_of(cfg)
    ranks.once(lambda: check_output_dir(cfg, base))
    ranks.once(lambda: world.prepare(cfg))
    reader = reader_of(cfg, base)
    examples, count, held_out = ranks.once(lambda: read_all(cfg, layouts, reader))
    if not world.at_home(cfg):
        lost = count["completions cut"], count["no trained token left"]
        for line in (*length_advice(cfg, base.name), *advice(cfg, examples, *lost)):
            print(one_line(f"advice: {line}"))

    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    threads = use_threads(cfg)
    policy = load_policy(cfg, base, reader)  # the data come first: their errors are quick

    if policy.lm.device.type == "cpu":
        print(threads)
    choose_row_length(cfg, policy.lm, examples)
    if ranks.WORLD > 1:
        print(f"{ranks.WORLD} processes share each step of {cfg.per_step} examples")
    can_measure = ranks.RANK == 0 and not cfg.sharded  # a sharded model can't generate
    before = world.measure(policy) if can_measure and world.at_home(cfg) else None
    return Run(policy, examples, held_out, before)


def check_output_dir(cfg: Config, base: Base) -> None:
    """InputError if the run can't write to its directory, or would destroy what is there."""
    if not cfg.output_dir:
        raise InputError("--output_dir: give a directory for what the run writes")
    directory, resumed, wrong = Path(cfg.output_dir), cfg.resume_from_checkpoint, None
    try:
        real = Path(os.path.realpath(directory))  # without links and ".."
        existing = next(path for path in (real, *real.parents) if path.exists())
        if not existing.is_dir():
            wrong = f"{existing} is a file, not a directory"
        elif not os.access(existing, os.W_OK | os.X_OK):
            wrong = f"{existing} is not writable"
        elif existing == real and not is_free(real):
            permitted = world.owns(cfg) or cfg.overwrite_output_dir
            models = base.name, cfg.adapter_name_or_path, vars(cfg).get("ref_model_name_or_path")
            lost = [name for name in models if name and holds(real, name)]
            data = [*cfg.dataset_name, *cfg.eval_dataset]
            lost += [name for name in data if checkpoint.writes_over(real, name)]
            if lost:
                wrong = f"would overwrite what training starts from: {lost[0]}"
            elif resumed and not (permitted or checkpoint.continues(resumed, real)):
                wrong = "not empty, and not the run to resume; --overwrite_output_dir uses it"
            elif not (permitted or resumed):
                wrong = "not empty; --overwrite_output_dir or --resume_from_checkpoint uses it"
        os.fspath(real).encode()
    except OSError as error:  # a name that is too long, a directory that can't be listed
        wrong = error.strerror
    except UnicodeEncodeError:
        wrong = "its path is not UTF-8; weights can't be saved there"
    if wrong:
        raise InputError(f"--output_dir {directory}: {wrong}")


def holds(directory: Path, name: str) -> bool:
    """Is the model `name` this directory, or inside it?"""
    path = Path(os.path.realpath(name))
    return path.exists() and any(directory.samefile(p) for p in (path, *path.parents))


def read_all(cfg: Config, layouts: Layouts, reader: Reader):
    """-> examples to train on; counts of what became of the rows; examples to evaluate on."""
    examples, count = read(cfg, layouts, reader, cfg.dataset_name, cfg.dataset_train_split)
    held_out = []
    if cfg.eval_dataset:
        held_out, _ = read(cfg, layouts, reader, cfg.eval_dataset, cfg.dataset_test_split)
    elif cfg.eval_fraction:
        examples, held_out = hold_out(cfg, examples)
    return examples, count, held_out


def read(
    cfg: Config, layouts: Layouts, reader: Reader | Policy, sources: list[str], split: str = "train"
):
    """-> the examples in `sources`; counts of what became of the rows. Prints notes on files."""
    limits, notes = Limits(cfg.max_length, cfg.max_prompt_length, cfg.truncation_mode), []
    names = "input_as_system", "skip_bad_rows", "train_on"
    options = {name: value for name, value in vars(cfg).items() if name in names}
    options |= {"split": split, "notes": notes}
    try:
        examples, count = read_examples(
            sources, layouts, reader.tokenizer, reader.template, limits, **options
        )
    finally:
        for note in notes:
            print(printable(note))
    print(f"{', '.join(sources)}: {describe(count)}")
    return examples, count


def hold_out(cfg: Config, examples: Examples) -> tuple[Examples, Examples]:
    """-> examples to train on, examples to evaluate on. All examples of a line of data go to the
    same side: KTO makes two of a pair, which have one prompt."""
    lines = list(dict.fromkeys(e.where for e in examples))
    size = max(1, round(len(lines) * cfg.eval_fraction))
    if size >= len(lines):
        raise InputError(f"--eval_fraction {cfg.eval_fraction}: leaves nothing to train on")
    chosen = set(random.Random(cfg.seed).sample(lines, size))
    held_out = [e for e in examples if e.where in chosen]
    print(f"{len(held_out)} examples held out for evaluation")
    return [e for e in examples if e.where not in chosen], held_out


def facts(cfg: Config, run: Run, data_sha256: str) -> dict:
    """What run.json says about a run, beside its state and its fingerprint."""
    return {
        "method": cfg.method,
        "flags": vars(cfg),
        "settled": effective_settings(cfg, run.policy.lm),
        "examples": len(run.examples),
        "data_sha256": data_sha256,
        "versions": {m.__name__: m.__version__ for m in (nanoalign, torch, transformers)},
        "git_commit": git_commit(Path(__file__)),  # of the code that ran
    }


def git_commit(file: Path) -> str | None:
    """The commit of the repository that tracks this file. None if no repository does: an installed
    package may lie inside somebody else's."""
    ask = ["git", "-C", file.parent, "rev-parse", "HEAD", f"HEAD:./{file.name}"]
    with contextlib.suppress(OSError):  # there is no git
        done = subprocess.run(ask, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.split()[0]
    return None
