"""What a run says while it runs: metrics.jsonl, a line on the terminal, TensorBoard or W&B."""

import contextlib
import json
import time
import unicodedata
from pathlib import Path

from tqdm import tqdm

from nanoalign.run.files import saving, write_text
from nanoalign.train import Sums, means


def keep_lines(path: Path, until: int) -> None:
    """Drop the lines of metrics.jsonl after step `until`: the run will write them again."""
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() and until else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a crash cut off
            if json.loads(line)["step"] <= until:
                kept.append(line + "\n")
    write_text(path, "".join(kept))


class Log:
    """What a run says; `close` it at its end.

    Every line goes to OUTPUT_DIR/metrics.jsonl as one JSON object, to the terminal in short, and to
    TensorBoard or Weights & Biases when `report_to` asks for it and the package is installed.
    """

    def __init__(self, directory: Path, total: int, state: dict, report_to: str = "none"):
        """`state` is where the run stands: its "step", and the seconds ("time") it took so far."""
        self.last = time.monotonic()
        self.start = self.last - state["time"]
        path = directory / "metrics.jsonl"
        keep_lines(path, state["step"])
        with saving(path):
            self.file = open(path, "a", encoding="utf-8")
        self.total = total
        self.bar = tqdm(
            total=total, initial=state["step"], unit="step", disable=None, dynamic_ncols=True
        )
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

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: it was said already
            self.file.close()
        self.bar.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()

    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 3)

    def advance(self, sums: Sums | None, tokens: int) -> None:
        """The bar: one step done, with its loss and speed. `sums` is None if it was left out."""
        now = time.monotonic()
        loss = f"loss {means(sums)['loss']:.4f}" if sums else "no loss"
        self.bar.set_postfix_str(f"{loss}, {tokens / (now - self.last):.0f} tok/s", refresh=False)
        self.bar.update()
        self.last = now

    def say(self, text: str) -> None:
        self.bar.clear()
        print(text, flush=True)

    def line(self, metrics: dict[str, float]) -> None:
        """`metrics` holds "step" and whatever else is known there."""
        metrics = {**metrics, "time": self.seconds()}
        with saving(Path(self.file.name)):
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
        step = metrics["step"]
        numbers = {k: v for k, v in metrics.items() if k not in ("step", "epoch", "time")}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)
        self.say(terminal_line(metrics, self.total))


COLUMNS = {  # metric -> its name and format on the terminal; the others are in metrics.jsonl
    "loss": ("loss", "7.4f"),
    "rewards/chosen": ("chosen", "+6.3f"),
    "rewards/rejected": ("rejected", "+6.3f"),
    "rewards/margins": ("margin", "6.3f"),
    "rewards/accuracies": ("accuracy", "4.2f"),
    "kl": ("kl", "6.3f"),
    "grad_norm": ("grad", "6.3f"),
    "learning_rate": ("lr", "7.1e"),
    "tokens_per_second": ("tok/s", "6.0f"),
}


def terminal_line(metrics: dict[str, float], total: int) -> str:
    """step 10/40  epoch 0.02  loss 0.5582  chosen +0.124  ...: one aligned line."""
    parts = [f"step {metrics['step']:>{len(str(total))}}/{total}  epoch {metrics['epoch']:4.2f}"]
    for prefix, head in (("", ""), ("eval_", "eval ")):
        for name, (short, form) in COLUMNS.items():
            if prefix + name in metrics:
                parts.append(f"{head}{short} {metrics[prefix + name]:{form}}")
    return "  ".join(parts)


def printable(text: str) -> str:
    """Text with its control and format characters escaped, but for newline, tab and joiner."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    others = {c for c in set(text) - {*"\n\t\u200d"} if unicodedata.category(c) in hidden}
    return text.translate({ord(c): ascii(c)[1:-1] for c in others})
