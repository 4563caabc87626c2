"""What the scripts share at their two ends: from flags to data, and from policy to disk."""

import io
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import transformers

import nanoalign
from nanoalign import InputError, world
from nanoalign.data import Example, Limits, describe
from nanoalign.formats.layouts import Layouts, read_examples
from nanoalign.model import Policy, load_policy, tokenizer_of
from nanoalign.run.advice import advice, afterthought
from nanoalign.run.card import write_card
from nanoalign.run.checkpoint import checkpoints_named, data_fingerprint, flag_differences
from nanoalign.run.curves import draw, read_run
from nanoalign.run.files import saving, write_text
from nanoalign.run.flags import Config, parse


@dataclass
class Run:
    policy: Policy
    examples: list[Example]
    held_out: list[Example]
    before: dict | None = None  # the built-in world's measurement before training


def main(kind: type[Config], run: Callable[[Config], Run], built_in: dict) -> None:
    """A script as a command: parse its flags, which are a `kind`, and run.

    `built_in` holds the settings of a run without a model of the user's; {} where there is none.
    """
    quiet()
    script = Path(sys.argv[0]).name
    try:
        with one_line_errors(script):
            run(parse(kind, sys.argv[1:], built_in))
    except KeyboardInterrupt:  # outside the loop, which has its own way to stop
        print(f"{script}: interrupted before a checkpoint was due", file=sys.stderr)
        sys.exit(130)


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """What the user can mend ends the command `name` with one line and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def quiet() -> None:
    """The libraries' chatter: loading bars, notes on configs, retries of the hub, warnings."""
    warnings.simplefilter("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook it is not
        sys.stdout.reconfigure(errors="backslashreplace")  # a name or reply that it can't show
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


def start(cfg: Config, layouts: Layouts) -> Run:
    """Check the output directory, read the data, load the model; say what there is."""
    built_in = in_the_built_in_world(cfg)
    # A built-in run may write over what an earlier one left in runs/METHOD, and nowhere else.
    own_directory = cfg.output_dir == str(world.HOME.parent / cfg.method)
    check_output_dir(cfg, built_in and own_directory)
    if built_in:
        build_world(cfg)
    opened = tokenizer_of(cfg)
    examples, held_out, cut = read_data(cfg, layouts, opened)
    for line in [] if built_in else advice(cfg, examples, cut):
        print(f"advice: {line}")
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    policy = load_policy(cfg, opened)  # after the data: what is wrong there shows at once
    return Run(policy, examples, held_out, world.measure(policy) if built_in else None)


def in_the_built_in_world(cfg: Config) -> bool:
    """Does the run learn from the built-in world's data, so that world.py can measure it?"""
    return Path(cfg.dataset_name[0]).parent == world.HOME


def build_world(cfg: Config) -> None:
    """Make the built-in model and its data anew, or see that an earlier run has trained it."""
    model = cfg.model_name_or_path
    if model == str(world.BASE):
        world.build()
    if model and not Path(model, "config.json").exists():
        raise InputError("the built-in model has to learn to answer first: run train_sft.py")


def read_data(cfg: Config, layouts: dict, opened: tuple) -> tuple[list, list, int]:
    """-> examples to train on, examples to evaluate on, and how many completions were cut."""
    tokenizer, template, _ = opened
    limits = Limits(cfg.max_length, cfg.max_prompt_length, cfg.truncation_mode)

    def read(sources, split):
        how = dict(split=split, input_as_system=cfg.input_as_system)
        examples, count = read_examples(sources, layouts, tokenizer, template, limits, **how)
        print(f"{', '.join(sources)}: {describe(count)}")
        return examples, count["completions cut"]

    (examples, cut), held_out = read(cfg.dataset_name, cfg.dataset_train_split), []
    if cfg.eval_dataset:
        held_out, _ = read(cfg.eval_dataset, cfg.dataset_test_split)
    elif cfg.eval_fraction:
        examples, held_out = hold_out(cfg, examples)
    return examples, held_out, cut


def hold_out(cfg: Config, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """-> those to train on and, a share of --eval_fraction at random, those to evaluate on."""
    size = max(1, round(len(examples) * cfg.eval_fraction))
    if size >= len(examples):
        raise InputError(f"--eval_fraction {cfg.eval_fraction}: leaves nothing to train on")
    chosen = set(random.Random(cfg.seed).sample(range(len(examples)), size))
    held_out = [e for e in examples if e.number in chosen]
    print(f"{len(held_out)} examples held out for evaluation")
    return [e for e in examples if e.number not in chosen], held_out


def check_output_dir(cfg: Config, may_overwrite: bool) -> None:
    """Before anything is loaded: can the run write there, and would it write over something?"""
    if not cfg.output_dir:
        raise InputError("--output_dir: say where everything is to go")
    directory, which = Path(cfg.output_dir), cfg.resume_from_checkpoint
    try:
        real = Path(os.path.realpath(directory))  # without links and ".."
        existing = next(path for path in (real, *real.parents) if path.exists())
        if not existing.is_dir():
            raise InputError(f"--output_dir {directory}: {existing} is a file, not a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"--output_dir {directory}: {existing} is not writable")
        filled = existing == real and any(real.iterdir())
    except OSError as error:  # a name that is too long, a directory that can't be listed
        raise InputError(f"--output_dir {directory}: {error.strerror}") from None
    for source in filter(None, (cfg.model_name_or_path, cfg.adapter_name_or_path)):
        if filled and os.path.exists(source) and os.path.samefile(source, real):
            raise InputError(f"--output_dir {directory}: would overwrite what training starts from")
    resumes = which == "last" or (which and checkpoints_named(which, directory))
    if filled and not (may_overwrite or cfg.overwrite_output_dir or resumes):
        raise InputError(
            f"--output_dir {directory}: not empty; --overwrite_output_dir or "
            "--resume_from_checkpoint uses it"
        )
    if which == "last" and (directory / "run.json").exists():
        end_if_finished(cfg, directory)


def end_if_finished(cfg: Config, directory: Path) -> None:
    """To resume a run that is finished is to do nothing, if it was this run."""
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        wrong = flag_differences(vars(cfg), record["flags"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{directory / 'run.json'}: damaged: {error!r}") from None
    if wrong:
        raise InputError(f"{directory}: a finished run with other flags: {'; '.join(wrong)}")
    print(f"{directory}: this run is finished; nothing to do")
    raise SystemExit(0)


def finish(cfg: Config, run: Run) -> Run:
    """Beside the weights: run.json, the curves, a model card; and what there is to say."""
    directory = Path(cfg.output_dir)
    lines = read_run(directory)
    with saving(directory):
        try:
            draw({directory.name: lines}, directory / "curves.png")
        except ImportError:
            print("no curves.png: pip install 'nanoalign[plot]' for that")
        if lines:
            write_card(cfg, run.policy.lora, directory, len(run.examples), lines[-1])
    record = {
        "method": cfg.method,
        "flags": vars(cfg),
        "examples": len(run.examples),
        "data_sha256": data_fingerprint(run.examples),  # of ids, masks and labels
        "versions": {m.__name__: m.__version__ for m in (nanoalign, torch, transformers)},
        "git_commit": git_commit(),
    }
    write_text(directory / "run.json", json.dumps(record, indent=2) + "\n")
    if line := afterthought(lines):
        print(line)
    if run.before:
        print(world.report(run.before, world.measure(run.policy)))
    print(f"saved in {cfg.output_dir}")
    return run


def git_commit() -> str | None:
    """The commit of the code that ran, where it is a git checkout."""
    where = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()
