"""What the papers claim, tried in minutes on a laptop, against the truth where it has a formula.

    python -m experiments                 # list them
    python -m experiments dpo_optimum     # run one
    python -m experiments all             # run them all, and write experiments/README.md

An experiment is a file in this directory with a function `run` (lab.py says what that is). Its
picture goes beside it, and with --write what it found into README.md. `all` runs two at a time with
one thread each: a model as small as the built-in one gains little from a second thread, and on one
thread its numbers come out the same each time. With --model_name_or_path nf4_error measures that
model too; real_pairs needs one, and an hour, so it is no part of `all`.
"""

import argparse
import ast
import multiprocessing
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path

import torch

from experiments import lab

HERE = Path(__file__).resolve().parent
ALONE = {"real_pairs"}  # not part of `all`
AT_ONCE = 2
BAR = 30  # columns
TITLE = """# What the papers claim, tried in the small

`python -m experiments all` writes this page; a section says which commit it is of. Where an
experiment does not hold, it says what did not come out, and why, as far as that is known.

| experiment | claim | verdict |
|---|---|---|
"""


def names() -> list[str]:
    """All experiments: the files of this directory that are neither this one nor lab.py."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem != "lab" and p.stem[0] != "_")


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8")))


def verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def carry_out(name: str, small: bool = False) -> tuple[str, str]:
    """Run an experiment and draw its picture. -> its section of README.md, and a line on it."""
    start = time.monotonic()
    report = import_module(f"experiments.{name}").run(small)
    line = f"{name}: {verdict(report.holds)} ({time.monotonic() - start:.0f} seconds)"
    found = [f"## {name}", "", docstring(name), "", report.table(), ""]
    found += [f"- {verdict(holds)}: {statement}" for statement, holds in report.held]
    found += [f"- note: {note}" for note in report.notes]
    if report.draw and draw(report.draw, HERE / f"{name}.png"):
        found += ["", f"![{name}]({name}.png)"]
    found += ["", f"**{line}, commit {commit()}, torch {torch.__version__}**", ""]
    return "\n".join(found), line


def commit() -> str:
    """That the code is of; "changed" if a file of it differs from that commit's."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)

    name = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = name and git("diff", "--quiet", "HEAD", "--", ":/*.py").returncode
    return f"{name or 'unknown'}{', changed' if changed else ''}"


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


def run_all(chosen: list[str]) -> dict[str, str]:
    """All that were chosen, under a progress bar. -> their sections. One that fails is named as
    such, keeps its old section, and the others go on."""
    lab.sft_model(small=False)  # trained here if it has to be, and not by two experiments at once
    sections = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(AT_ONCE, context, torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(carry_out, name): name for name in chosen}
        progress(0, len(chosen), "")
        for done, future in enumerate(as_completed(running), start=1):
            name, error = running[future], future.exception()
            if error:
                line = f"{name}: failed ({error!r})"
            else:
                sections[name], line = future.result()
            progress(done, len(chosen), line)
    return sections


def write(sections: dict[str, str]) -> None:
    """Put these sections into README.md, in the place of the old ones, and its table anew."""
    page = HERE / "README.md"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    kept = {text.split("\n")[0][3:]: text for text in re.split(r"\n(?=## )", old)[1:]}
    sections = dict(sorted((kept | sections).items()))
    rows = []
    for name, text in sections.items():
        statements = re.findall("^- (holds|does not hold): ", text, re.MULTILINE)
        number, claim = statements.count("holds"), text.split("\n")[2]
        said = verdict(number == len(statements))
        rows.append(f"| [{name}](#{name}) | {claim} | {said}, {number} of {len(statements)} |\n")
    page.write_text("\n".join([TITLE + "".join(rows), *sections.values()]), encoding="utf-8")


def progress(done: int, total: int, line: str) -> None:
    """What has just ended, and below it the bar, which the next one writes over."""
    filled = BAR * done // total
    bar = f"[{'#' * filled}{'.' * (BAR - filled)}] {done} of {total}"
    print(f"\r{line:<{BAR + 20}}\n{bar}" if line else bar, end="\n" if done == total else "")
    sys.stdout.flush()


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", choices=[*names(), "all"], help="none: list them")
    parser.add_argument("--write", action="store_true", help="into README.md, as `all` does")
    parser.add_argument("--model_name_or_path", help="a real model's directory")
    parser.add_argument("--dataset_name", help="real pairs, for real_pairs")
    args = parser.parse_args(words)
    for name, value in (("MODEL", args.model_name_or_path), ("PAIRS", args.dataset_name)):
        if value:  # in the environment, where the processes of `all` find it
            os.environ[f"NANOALIGN_{name}"] = value
    if args.name == "all":
        write(run_all([name for name in names() if name not in ALONE]))
    elif args.name:
        section, line = carry_out(args.name)
        print(section)
        if args.write:
            write({args.name: section})
    else:
        for name in names():
            print(f"{name:<16}{docstring(name).splitlines()[0]}")


if __name__ == "__main__":  # by its own name, under which the processes of `all` find carry_out
    import_module("experiments.__main__").main(sys.argv[1:])
