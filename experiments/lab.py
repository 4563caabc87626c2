"""What the experiments share: the built-in world's model, a quiet run of a script, a report.

An experiment is a file with a function

    def run(small: bool) -> Report

which trains what its claim is about, and says what came out and whether the claim held, against a
tolerance that stands in the file. `small` asks for a setting of seconds, whose numbers mean
nothing: the tests run it, so that no experiment stops working unseen.
"""

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import train_dpo
import train_kto
import train_sft
from nanoalign import world
from nanoalign.data import Case, make_examples
from nanoalign.losses import sft_loss
from nanoalign.model import Policy, generate
from nanoalign.packing import Example
from nanoalign.run.flags import Config, DPOConfig, KTOConfig, SFTConfig, parse
from nanoalign.run.policy import load_policy
from nanoalign.run.report import read_run
from nanoalign.train import Batches, Method, evaluate

METHODS = {
    "sft": (SFTConfig, train_sft.run_sft, train_sft.BUILT_IN),
    "dpo": (DPOConfig, train_dpo.run_dpo, train_dpo.BUILT_IN),
    "kto": (KTOConfig, train_kto.run_kto, train_kto.BUILT_IN),
}
SMALL = {"max_steps": 2, "per_device_train_batch_size": 4}


@dataclass
class Report:
    """What an experiment found."""

    columns: list[str]  # of the table
    rows: list[list]  # words and numbers
    held: list[tuple[str, bool]]  # what was expected, in words, and whether it came out
    draw: Callable | None = None  # draws the picture on a matplotlib Figure
    notes: list[str] = field(default_factory=list)  # what did not come out in the small, and why

    def table(self) -> str:
        """In Markdown, its columns lined up."""
        cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in self.rows]
        width = [max(map(len, column)) for column in zip(self.columns, *cells)]
        lines = [self.columns, ["-" * n for n in width], *cells]
        lines = [[f"{cell:<{n}}" for cell, n in zip(line, width)] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    @property
    def holds(self) -> bool:
        """Has all come out that was expected?"""
        return all(holds for _, holds in self.held)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def train(method: str, rows: list[dict], small: bool, **flags) -> tuple[Policy, list[dict]]:
    """Train the world's SFT model (or --model_name_or_path) on rows, by the script itself with its
    built-in settings but for `flags`. -> the policy, and the run's lines of metrics."""
    kind, script, built_in = METHODS[method]
    start = {}
    if method != "sft" and "model_name_or_path" not in flags:
        start["model_name_or_path"] = sft_model(small)
    with tempfile.TemporaryDirectory() as work, quietly():
        flags = {**start, "logging_steps": 5, "output_dir": f"{work}/run", **flags}
        flags = {**built_in, **flags, **(SMALL if small else {})}
        data = Path(work, "data.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        flags |= {"dataset_name": str(data), "save_steps": 0}
        run = script(parse(kind, [f"--{name}={value}" for name, value in flags.items()], {}))
        return run.policy, read_run(Path(flags["output_dir"]))


def sft_model(small: bool) -> str:
    """The directory of the world's SFT model, which is trained if it is not there yet. `small`: the
    untrained one."""
    directory = "runs/sft"
    if small:
        directory = str(world.BASE)
    if not Path(directory, "model.safetensors").exists():
        if small:
            world.build()
        else:
            print("first the world's SFT model, once: about a minute")
            with quietly():
                train_sft.run_sft(parse(SFTConfig, [], train_sft.BUILT_IN))
    return directory


def load(directory: str) -> Policy:
    with quietly():
        how = dict(use_peft=False, device="cpu", chat_template="chatml")
        return load_policy(Config(model_name_or_path=directory, **how))


def pairs(part: str, small: bool = False) -> list[dict]:
    """The world's "validation" or "test" questions: {"question", "terse", "sentence"} each; of
    "dpo", "sft" and "kto" the training rows."""
    path = world.HOME / f"{part}.jsonl"
    if not path.exists():
        world.build()
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: 16 if small else None]]


def flip(rows: list[dict], probability: float, seed: int) -> list[dict]:
    """Pairs of which each has been turned round, chosen for rejected, with this probability."""
    rng = random.Random(seed)
    turned = [dict(row, chosen=row["rejected"], rejected=row["chosen"]) for row in rows]
    return [t if rng.random() < probability else row for row, t in zip(rows, turned)]


def log_odds(policy: Policy, small: bool = False) -> tuple[Tensor, float]:
    """The policy between the two right replies to the test questions. -> log pi(sentence) -
    log pi(terse) of each, (n,), and the mean probability that it gives the two together."""
    asked = pairs("test", small)
    prompts = [row["question"] for row in asked]
    sentence = logps(policy, prompts, [row["sentence"] for row in asked])
    terse = logps(policy, prompts, [row["terse"] for row in asked])
    return sentence - terse, (sentence.exp() + terse.exp()).mean().item()


def replies_of(policy: Policy, asked: list[dict], temperature: float) -> list[str]:
    """A reply to each of the world's test or validation questions. 0: the likeliest tokens."""
    torch.manual_seed(0)
    prompts = [[{"role": "user", "content": row["question"]}] for row in asked]
    return generate(policy, prompts, max_new_tokens=24, temperature=temperature)


@torch.no_grad()
def logps(policy: Policy, prompts: list[str], replies: list[str]) -> Tensor:
    """log pi(reply | prompt), with the marker that ends it, of each. (n,) in nats."""
    policy.lm.eval()
    batches = in_batches(examples_of(policy, prompts, replies))
    return torch.cat([policy(batch).logps for batch in batches])


def examples_of(policy: Policy, prompts: list[str], replies: list[str]) -> list[Example]:
    """Prompts and replies as the policy's template writes them."""
    cases = [
        Case([{"role": "user", "content": p}], [[{"role": "assistant", "content": r}]])
        for p, r in zip(prompts, replies)
    ]
    return make_examples(cases, policy.tokenizer, policy.template)[0]


def in_batches(examples: list[Example]) -> Batches:
    return [examples[i : i + 64] for i in range(0, len(examples), 64)]


def sft_method(policy: Policy) -> Method:
    """What train_sft.py trains, as the loop wants it."""

    def method(batches):
        for batch in batches:
            scores = policy(batch)
            yield {"loss": (sft_loss(scores.logps).sum(), sum(scores.tokens))}

    return method


def token_loss(policy: Policy, examples: list[Example]) -> float:
    """Nats a trained token."""
    return evaluate(policy.lm, sft_method(policy)(in_batches(examples)))["loss"]
