"""What a run says while it runs: metrics.jsonl, a line on the terminal, TensorBoard or W&B."""

import json
import math
import time
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from nanoalign.logps import Scores

Sums = dict[str, tuple[float | Tensor, int]]  # name -> (sum, number of things summed)


def add(total: Sums, more: Sums) -> None:
    for name, (value, count) in more.items():
        old = total.get(name, (0.0, 0))
        total[name] = old[0] + value, old[1] + count


def means(sums: Sums) -> dict[str, float]:
    """Each sum over its count. The margin is a difference of means, so that KTO has one too."""
    out = {name: value / count for name, (value, count) in sums.items() if count}
    if "rewards/chosen" in out and "rewards/rejected" in out:
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
    return out


def reward_sums(side: str, rewards: Tensor, scores: Scores) -> Sums:
    """The metrics of one side, "chosen" or "rejected": (n,) rewards and their scores."""
    sums = {
        f"rewards/{side}": (rewards.sum(), len(rewards)),
        f"logps/{side}": (scores.logps.detach().sum(), len(rewards)),
    }
    if scores.logits is not None:
        sums[f"logits/{side}"] = scores.logits.sum(), sum(scores.tokens)
    return sums


class Log:
    """The run's record; use it in a `with` statement.

    Every line goes to OUTPUT_DIR/metrics.jsonl as one JSON object, to the terminal in short, and to
    TensorBoard or Weights & Biases when `report_to` asks for it and the package is installed.
    """

    def __init__(self, directory: Path, total_steps: int, report_to: str = "none"):
        self.start = time.monotonic()
        self.file = open(directory / "metrics.jsonl", "w", encoding="utf-8")
        self.bar = tqdm(total=total_steps, unit="step", disable=None, dynamic_ncols=True)
        self.board = self.wandb = None
        try:
            if report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(log_dir=str(directory))
            elif report_to == "wandb":
                import wandb

                self.wandb = wandb.init(dir=str(directory), name=directory.name)
        except ImportError:
            self.say(f"--report_to {report_to}: the package {report_to} is not installed; going on")

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()
        self.bar.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()

    def say(self, text: str) -> None:
        self.bar.clear()
        print(text, flush=True)

    def line(self, metrics: dict[str, float]) -> None:
        """`metrics` holds "step" and whatever else is known there."""
        metrics = {**metrics, "time": round(time.monotonic() - self.start, 3)}
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        step = metrics["step"]
        numbers = {k: v for k, v in metrics.items() if k not in ("step", "epoch", "time")}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)
        hidden = ("num_tokens",)
        shown = "  ".join(f"{k} {_short(v)}" for k, v in numbers.items() if k not in hidden)
        self.say(f"step {step:>5}  epoch {metrics['epoch']:.2f}  {shown}")


def _short(value: float) -> str:
    if value == 0 or 0.001 <= abs(value) < 1e5:
        digits = max(0, 3 - int(math.floor(math.log10(abs(value))))) if value else 0
        return f"{value:.{min(4, digits)}f}"
    return f"{value:.2e}"
