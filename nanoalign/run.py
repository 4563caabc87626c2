"""What the three scripts share at their two ends: from flags to data, and from policy to disk."""

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import transformers

import nanoalign
from nanoalign import InputError, world
from nanoalign.checkpoint import prune
from nanoalign.config import Config, parse
from nanoalign.data import Example, Limits, describe, read_examples
from nanoalign.model import Policy, load_policy


@dataclass
class Run:
    policy: Policy
    examples: list[Example]
    held_out: list[Example]
    before: dict | None = None  # the built-in world's measurement before training


def main(method: str, kind: type[Config], run: Callable[[Config], None]) -> None:
    """Parse the flags and run; what the user can mend is one line and exit code 2."""
    quiet()
    try:
        run(parse(kind, sys.argv[1:], world.SETTINGS[method]))
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def quiet() -> None:
    """The libraries' chatter: loading bars, notes on configs, retries of the hub."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


def start(cfg: Config, layouts: dict) -> Run:
    """Check the output directory, read the data, load the model; say what there is."""
    builtin = cfg.dataset_name[0].startswith(str(world.HOME))
    if builtin and cfg.model_name_or_path == str(world.BASE):
        world.build()
    if builtin and not Path(cfg.model_name_or_path, "config.json").exists():
        raise InputError("the built-in model has to learn to answer first: run train_sft.py")
    directory = check_output_dir(cfg, builtin and cfg.output_dir.startswith("runs/"))

    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    policy = load_policy(cfg)

    def read(sources, split):
        limits = Limits(cfg.max_length, cfg.max_prompt_length, cfg.truncation_mode)
        examples, count = read_examples(
            sources, layouts, policy.tokenizer, policy.template, limits, split, cfg.input_as_system
        )
        print(f"{', '.join(sources)}: {describe(count)}")
        return examples

    examples, held_out = read(cfg.dataset_name, cfg.dataset_train_split), []
    if cfg.eval_dataset:
        held_out = read(cfg.eval_dataset, cfg.dataset_test_split)
    elif cfg.eval_fraction:
        size = max(1, round(len(examples) * cfg.eval_fraction))
        if size >= len(examples):
            raise InputError(f"--eval_fraction {cfg.eval_fraction}: leaves nothing to train on")
        chosen = set(random.Random(cfg.seed).sample(range(len(examples)), size))
        held_out = [e for e in examples if e.number in chosen]
        examples = [e for e in examples if e.number not in chosen]
        print(f"{len(held_out)} examples held out for evaluation")
    directory.mkdir(parents=True, exist_ok=True)
    if cfg.resume_from_checkpoint is None:  # an earlier run's must not be taken for this one's
        prune(directory, keep=0)
        (directory / "run.json").unlink(missing_ok=True)
    return Run(policy, examples, held_out, world.measure(policy) if builtin else None)


def check_output_dir(cfg: Config, may_overwrite: bool) -> Path:
    """Before anything is loaded: can the run write there, and would it write over something?"""
    directory = Path(cfg.output_dir)
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"--output_dir {directory}: {existing} is a file; expected a directory")
    if not os.access(existing, os.W_OK):
        raise InputError(f"--output_dir {directory}: {existing} is not writable")
    may_overwrite = may_overwrite or cfg.overwrite_output_dir or cfg.resume_from_checkpoint
    if existing == directory and any(directory.iterdir()) and not may_overwrite:
        raise InputError(
            f"--output_dir {directory}: not empty; --overwrite_output_dir or "
            "--resume_from_checkpoint uses it"
        )
    finished = directory / "run.json"
    if cfg.resume_from_checkpoint == "last" and finished.exists():
        print(f"{directory}: this run is finished; nothing to do")
        raise SystemExit(0)
    return directory


def finish(cfg: Config, run: Run) -> None:
    """Write run.json and say where everything is; for the built-in world, what changed."""
    record = {
        "flags": vars(cfg),
        "examples": len(run.examples),
        "versions": {m.__name__: m.__version__ for m in (nanoalign, torch, transformers)},
    }
    path = Path(cfg.output_dir) / "run.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if run.before:
        print(world.report(run.before, world.measure(run.policy)))
    print(f"saved in {cfg.output_dir}")
