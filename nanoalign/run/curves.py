"""Pictures of runs, from what they wrote to metrics.jsonl.

The loss and, of DPO and KTO, the rewards, their margin, accuracies and kl, as far as they are
there. Several runs are laid over each other. Needs matplotlib (pip install 'nanoalign[plot]').
"""

import json
from contextlib import suppress
from pathlib import Path

from nanoalign import InputError
from nanoalign.run.files import write_file

PANELS = {  # title -> the metrics in it
    "loss": ["loss"],
    "rewards": ["rewards/chosen", "rewards/rejected"],
    "reward margin": ["rewards/margins"],
    "reward accuracy": ["rewards/accuracies"],
    "kl": ["kl"],
    "gradient norm": ["grad_norm"],
}


def read_run(directory: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    path = Path(directory) / "metrics.jsonl"
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a directory of a run") from None
    except ValueError as error:
        raise InputError(f"{path}: not a run's metrics: {error}") from None
    return [read_line(text, f"{path}, line {number}") for number, text in enumerate(texts, 1)]


def read_line(text: str, where: str) -> dict[str, float]:
    """A line of metrics.jsonl: numbers by name, a step among them."""
    line = None
    with suppress(ValueError, RecursionError):
        line = json.loads(text)
    if isinstance(line, dict) and "step" in line:
        if all(type(value) in (int, float) for value in line.values()):
            return line
    raise InputError(f"{where}: not a run's metrics; expected numbers by name, a step among them")


def points(lines: list[dict], name: str) -> tuple[list, list]:
    """Where a metric was measured, in steps, and its values there."""
    there = [line for line in lines if name in line]
    return [line["step"] for line in there], [line[name] for line in there]


def draw(runs: dict[str, list[dict]], out: Path) -> bool:
    """One panel for each group of metrics that some run has; evaluations are dots. Was there
    anything to draw?"""
    from matplotlib.figure import Figure  # no pyplot: a notebook keeps its own figures

    seen = {n.removeprefix("eval_") for lines in runs.values() for line in lines for n in line}
    panels = {title: names for title, names in PANELS.items() if seen.intersection(names)}
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    for place, (title, names) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, place)
        for run, lines in runs.items():
            for name in names:
                label = [run] * (len(runs) > 1) + [name.rpartition("/")[2]] * (len(names) > 1)
                (drawn,) = axis.plot(*points(lines, name), label=" ".join(label))
                dots = points(lines, f"eval_{name}")
                axis.plot(*dots, "o", color=drawn.get_color(), markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(runs) * len(names) > 1:
            axis.legend(fontsize=8, frameon=False)
    write_file(out, lambda beside: figure.savefig(beside, dpi=120, format=out.suffix[1:]))
    return True
