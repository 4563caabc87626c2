"""The log of a run.

A line of metrics is a JSON object in OUTPUT_DIR/metrics.jsonl. The terminal shows a part of it. It
also goes to TensorBoard or Weights & Biases, if --report_to says so and the package is installed.
"""

import contextlib
import json
import os
import unicodedata
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from nanoalign.data import split
from nanoalign.logps import Scores
from nanoalign.model import Policy, sample
from nanoalign.packing import Example
from nanoalign.run import ranks
from nanoalign.run.files import saving, write_text
from nanoalign.run.flags import Config
from nanoalign.train import Step, Sums


def reward_sums(side: str, rewards: Tensor, scores: Scores) -> Sums:
    """The metrics of one side, "chosen" or "rejected", from its (n,) rewards and its scores."""
    sums = {
        f"rewards/{side}": (rewards.sum(), len(rewards)),
        f"logps/{side}": (scores.logps.detach().sum(), len(rewards)),
    }
    if scores.logits is not None:
        sums[f"logits/{side}"] = scores.logits.sum(), sum(scores.tokens)
    return sums


def keep_lines(path: Path, until: int) -> list[dict]:
    """Delete the lines of metrics.jsonl after step `until`: the run writes them again. -> the lines
    that stay."""
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() and until else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a crash cut off
            if json.loads(line)["step"] <= until:
                kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))
    return [json.loads(line) for line in kept]


def metric_of(cfg: Config) -> tuple[str, bool]:
    """The metric that decides which evaluation is the best: its name; is greater better?"""
    name = "eval_" + (cfg.metric_for_best_model or "loss").removeprefix("eval_")
    greater = cfg.greater_is_better
    return name, not name.endswith("loss") if greater is None else greater


def best_of(cfg: Config, lines: list[dict]) -> tuple[dict | None, int]:
    """The best evaluation in lines of metrics.jsonl, and how many evaluations came after it. The
    first of equal ones is the best. An evaluation before step 1 does not count."""
    name, greater = metric_of(cfg)
    best, since = None, 0
    for line in lines:
        if any(key.startswith("eval_") for key in line) and line["step"]:
            value = line.get(name)  # None: it was not finite
            change = 0 if value is None or best is None else value - best[name]
            first = best is None and value is not None
            better = first or (change > 0 if greater else change < 0)
            best, since = (line, 0) if better else (best, since + 1)
    return best, since


class Log:
    """The log of a run that has done `step` of `total` steps. Call `close` at the end. `run_id` is
    its id at Weights & Biases, which a resumed run keeps. Only rank 0 has a log."""

    def __init__(self, cfg: Config, total: int, step: int, run_id: str):
        directory, report_to = Path(cfg.output_dir), "none" if ranks.RANK else cfg.report_to
        self.total, path = total, Path(os.devnull) if ranks.RANK else directory / "metrics.jsonl"
        with saving(path):
            self.file = open(path, "a", encoding="utf-8")
        self.bar = tqdm(total=total, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self.report, self.end = (lambda metrics, step: None), (lambda: None)
        try:
            if report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                # purge_step: the events after a checkpoint are reported again by the resumed run.
                board = SummaryWriter(log_dir=str(directory), purge_step=step + 1)
                self.report = lambda metrics, step: [
                    board.add_scalar(name, value, step) for name, value in metrics.items()
                ]
                self.end = board.close
            elif report_to == "wandb":
                import wandb

                name = cfg.run_name or directory.name
                options = dict(id=run_id, name=name, resume="allow", config=vars(cfg))
                try:
                    run = wandb.init(dir=str(directory), **options)
                    self.report, self.end = run.log, run.finish
                except wandb.Error as error:  # there is no key, or no network
                    why = " ".join(str(error).split())
                    self.say(f"--report_to wandb: {why}; going on without")
        except ImportError:
            self.say(f"--report_to {report_to}: the package {report_to} is not installed; going on")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the disk is full; another error has said so
            self.file.close()
        self.bar.close()
        self.end()

    def advance(self, step: Step, speed: float) -> None:
        """Move the progress bar by one step, and show the loss and the tokens per second."""
        loss = f"loss {step.metrics['loss']:.4f}" if step.sums else "no loss"
        self.bar.set_postfix_str(f"{loss}, {speed:.0f} tok/s", refresh=False)
        self.bar.update()

    def say(self, text: str) -> None:
        """Print a text above the progress bar."""
        self.bar.clear()
        print(text, flush=True)

    def line(self, metrics: dict[str, float]) -> None:
        """Write a line of metrics everywhere. It has "step", "epoch", "time" and others."""
        with saving(Path(self.file.name)):
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
        others = {k: v for k, v in metrics.items() if k not in ("step", "epoch", "time")}
        self.report(others, metrics["step"])
        self.say(terminal_line(metrics, self.total))


COLUMNS = {  # the metrics that the terminal shows
    "loss": "loss {:7.4f}",
    "rewards/chosen": "chosen {:+6.3f}",
    "rewards/rejected": "rejected {:+6.3f}",
    "rewards/margins": "margin {:6.3f}",
    "rewards/accuracies": "accuracy {:4.2f}",
    "kl": "kl {:6.3f}",
    "aux_loss": "aux {:6.3f}",
    "reward": "reward {:6.3f}",
    "grad_norm": "grad {:6.3f}",
    "learning_rate": "lr {:7.1e}",
    "tokens_per_second": "tok/s {:6.0f}",
}


def terminal_line(metrics: dict[str, float], total: int) -> str:
    """-> "step 10/40  epoch 0.02  loss 0.5582  chosen +0.124 ..." """
    parts = [f"step {metrics['step']:>{len(str(total))}}/{total}  epoch {metrics['epoch']:4.2f}"]
    for head in ("", "eval_"):
        for name, form in COLUMNS.items():
            if head + name in metrics:
                parts.append(head.replace("_", " ") + form.format(metrics[head + name]))
    return "  ".join(parts)


def replies(policy: Policy, examples: list[Example]) -> str:
    """Greedy replies to held-out prompts, of the policy now and of the policy at the start."""
    prompts = [prompt for example in examples if (prompt := list(split(example)[0]))]
    if not prompts:
        return "--generate_during_eval: there is no prompt to reply to"
    columns = {"prompt": [prompt[-64:] for prompt in prompts]}
    columns["policy"] = sample(policy, prompts, max_new_tokens=64)
    if policy.reference is not None:
        with policy.reference():
            columns["start"] = sample(policy, prompts, max_new_tokens=64)
    lines = []
    for row in zip(*columns.values()):
        texts = policy.tokenizer.batch_decode(row, skip_special_tokens=True)
        lines += [f"  {name:<10} {text!r:.100}" for name, text in zip(columns, texts)]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Escape control and format characters: they could move the cursor, or show words in another
    order than a program reads. Newline and tab stay. So do the joiners and direction marks that
    Persian, Arabic and Hebrew need, which reorder nothing."""
    hidden, harmless = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}, "\n\t\u061c\u200c\u200d\u200e\u200f"
    others = {c for c in set(text) - {*harmless} if unicodedata.category(c) in hidden}
    return text.translate({ord(c): ascii(c)[1:-1] for c in others})
