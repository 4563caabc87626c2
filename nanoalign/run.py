"""What the three scripts share at their two ends: from flags to data, and from policy to disk."""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from nanoalign import InputError, world
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
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        run(parse(kind, sys.argv[1:], world.SETTINGS[method]))
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def start(cfg: Config, layouts: dict) -> Run:
    """Check the output directory, read the data, load the model; say what there is."""
    builtin = cfg.dataset_name[0].startswith(str(world.HOME))
    if builtin and cfg.model_name_or_path == str(world.BASE):
        world.build()
    if builtin and not Path(cfg.model_name_or_path, "config.json").exists():
        raise InputError("the built-in model has to learn to answer first: run train_sft.py")
    directory = Path(cfg.output_dir)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output_dir {directory}: is a file")
    ours = builtin and cfg.output_dir.startswith("runs/")
    if directory.exists() and any(directory.iterdir()) and not (cfg.overwrite_output_dir or ours):
        raise InputError(f"--output_dir {directory}: not empty; --overwrite_output_dir uses it")

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
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {directory}: {error.strerror}") from None
    return Run(policy, examples, held_out, world.measure(policy) if builtin else None)


def finish(cfg: Config, run: Run) -> None:
    """Say where everything is; for the built-in world, what changed."""
    if run.before:
        print(world.report(run.before, world.measure(run.policy)))
    print(f"saved in {cfg.output_dir}")
