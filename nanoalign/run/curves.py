"""Pictures of runs, from what they wrote to metrics.jsonl.

The loss and, of DPO and KTO, the rewards, their margin, accuracies and kl, as far as they are
there. Several runs are laid over each other. Needs matplotlib (pip install 'nanoalign[plot]').
"""

import json
from pathlib import Path

from nanoalign import InputError

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
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a directory of a run") from None
    except ValueError as error:
        raise InputError(f"{path}: not a run's metrics: {error}") from None


def draw(runs: dict[str, list[dict]], out: Path) -> None:
    """One panel for each group of metrics that some run has; evaluations are dots."""
    from matplotlib.figure import Figure  # no pyplot: a notebook keeps its own figures

    seen = {n.removeprefix("eval_") for lines in runs.values() for line in lines for n in line}
    panels = {t: [n for n in names if n in seen] for t, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = 4.2 * columns, 2.9 * rows
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for run, lines in runs.items():
            for name in names:
                points = [(line["step"], line[name]) for line in lines if name in line]
                label = name.rpartition("/")[2] if len(names) > 1 else ""
                label = " ".join(part for part in (run if len(runs) > 1 else "", label) if part)
                (drawn,) = axis.plot(*zip(*points) if points else ([], []), label=label or None)
                dots = [(ln["step"], ln[f"eval_{name}"]) for ln in lines if f"eval_{name}" in ln]
                if dots:
                    axis.plot(*zip(*dots), "o", color=drawn.get_color(), markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.savefig(out, dpi=120)
