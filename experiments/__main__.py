"""What the papers claim, tried in minutes on a laptop, against the truth where it has a formula.

    python -m experiments                 # list them
    python -m experiments dpo_optimum     # run one
    python -m experiments all             # run them all, and write experiments/README.md

An experiment is a file in this directory with a function `run` (lab.py says what that is). Its
picture goes beside it. `all` runs two at a time with one thread each: a model as small as the
built-in one gains little from a second thread, and on one thread its numbers come out the same
each time.
"""

import ast
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path

import torch

from experiments import lab

HERE = Path(__file__).resolve().parent
AT_ONCE = 2
BAR = 30  # columns


def names() -> list[str]:
    """All experiments: the files of this directory that are neither this one nor lab.py."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem != "lab" and p.stem[0] != "_")


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8")))


def verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def carry_out(name: str, small: bool = False) -> tuple[str, str]:
    """Run an experiment and draw its picture. -> what it found, in Markdown, and a line on it."""
    start = time.monotonic()
    report = import_module(f"experiments.{name}").run(small)
    seconds = time.monotonic() - start
    found = [report.table(), ""]
    found += [f"- {verdict(holds)}: {statement}" for statement, holds in report.held]
    found += [f"- note: {note}" for note in report.notes]
    if report.draw and draw(report.draw, HERE / f"{name}.png"):
        found += ["", f"![{name}]({name}.png)"]
    return "\n".join(found), f"{name}: {verdict(report.holds)} ({seconds:.0f} seconds)"


def draw(on_figure, path: Path) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: pip install -e ".[plot]"', file=sys.stderr)
        return False
    figure = Figure(figsize=(9, 5), layout="constrained")
    on_figure(figure)
    figure.savefig(path, dpi=100)
    return True


def run_all(chosen: list[str]) -> str:
    """All that were chosen, under a progress bar. -> README.md's text. One that fails is named as
    such, and the others go on."""
    lab.sft_model(small=False)  # trained here if it has to be, and not by two experiments at once
    start, found = time.monotonic(), {}
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=HERE,
                            capture_output=True, text=True).stdout.strip()  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(AT_ONCE, context, torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(carry_out, name): name for name in chosen}
        progress(0, len(chosen), "")
        for future in as_completed(running):
            name, error = running[future], future.exception()
            text, line = ("", f"{name}: failed ({error!r})") if error else future.result()
            found[name] = f"## {name}\n\n{docstring(name)}\n\n{text}\n\n**{line}**\n"
            progress(len(found), len(chosen), line)
    minutes = (time.monotonic() - start) / 60
    how = (
        "`python -m experiments all` has written this page: "
        f"commit {commit or 'unknown'}, torch {torch.__version__}, {minutes:.0f} minutes "
        f"({AT_ONCE} experiments at a time, one thread each)."
    )
    title = "# What the papers claim, tried in the small"
    return "\n".join([title, "", how, "", *(found[name] for name in chosen)])


def progress(done: int, total: int, line: str) -> None:
    """What has just ended, and below it the bar, which the next one writes over."""
    filled = BAR * done // total
    bar = f"[{'#' * filled}{'.' * (BAR - filled)}] {done} of {total}"
    print(f"\r{line:<{BAR + 20}}\n{bar}" if line else bar, end="\n" if done == total else "")
    sys.stdout.flush()


def main(words: list[str]) -> None:
    if not words:
        for name in names():
            print(f"{name:<16}{docstring(name).splitlines()[0]}")
    elif words == ["all"]:
        (HERE / "README.md").write_text(run_all(names()), encoding="utf-8")
    elif len(words) == 1 and words[0] in names():
        print("\n".join(carry_out(words[0])))
    else:
        sys.exit(f"error: {' '.join(words)}: one of {', '.join([*names(), 'all'])}")


if __name__ == "__main__":  # by its own name, under which the processes of `all` find carry_out
    import_module("experiments.__main__").main(sys.argv[1:])
