"""Answers -> faults and points. No pytest in here: test_answers.py and `run` both ask it."""

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from exercises.checks import EXERCISES, Numbers, Wrong

HERE = Path(__file__).parent


def load(directory: Path, name: str) -> ModuleType:
    """The student's file of one exercise, as a module."""
    path = directory / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"answer_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fault_of(check: Callable, answer: Callable[[], ModuleType], student: str) -> str | None:
    """What is wrong, in one line; None: nothing. `answer` gives the module: its file may be broken,
    and what an answer raises is a fault like any other."""
    try:
        check(answer(), Numbers(student, check.__name__))
    except Wrong as wrong:
        return str(wrong)
    except NotImplementedError:
        return "not written yet"
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).stem in EXERCISES]
        where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        what = (str(error).splitlines() or [""])[0]
        return f"it raises {type(error).__name__}: {what}{where}"
    return None


def passed(directory: Path, student: str = "") -> dict[str, ModuleType]:
    """The answers without a fault, by exercise."""
    found = {}
    for name, checks in EXERCISES.items():
        faults = [fault_of(check, lambda: load(directory, name), student) for check in checks]
        if not any(faults):
            found[name] = load(directory, name)
    return found
