"""The flags of `pytest exercises`, and the points at its end."""

import json
from pathlib import Path

import pytest
import torch

from exercises.checks import EXERCISES
from exercises.grade import HERE


def pytest_addoption(parser):
    group = parser.getgroup("exercises")
    group.addoption("--answers", default=str(HERE), help="the directory that holds the answers")
    group.addoption("--student", default="", help="a name: it decides the numbers")
    group.addoption("--report", help="a JSON file to write, for a grader")


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def pytest_configure(config):
    config.exercise_faults = {}  # (exercise, check) -> fault or None
    config.option.reportchars = "N"  # the faults stand in the points; pytest need not list them


def pytest_terminal_summary(terminalreporter, config):
    if not config.exercise_faults:
        return
    lines, report = [], []
    for name, checks in EXERCISES.items():
        faults = {c: config.exercise_faults.get((name, c.__name__), "not graded") for c in checks}
        points = sum(n for c, n in checks.items() if faults[c] is None)
        said = list(dict.fromkeys(f for f in faults.values() if f))
        report.append(dict(exercise=name, points=points, of=sum(checks.values()), faults=said))
        lines.append(
            f"{name:<14} {points:>2} of {sum(checks.values())}   {'; '.join(said)}".rstrip()
        )
    points, of = (sum(row[key] for row in report) for key in ("points", "of"))
    terminalreporter.section("points")
    for line in [*lines, f"{'':<14} {points:>2} of {of}"]:
        terminalreporter.write_line(line)
    if path := config.getoption("--report"):
        grade = dict(student=config.getoption("--student"), points=points, of=of, exercises=report)
        Path(path).write_text(json.dumps(grade, indent=1) + "\n", encoding="utf-8")
