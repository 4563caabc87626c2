"""`pytest exercises`: one test a check; what is wrong stands in its one line."""

from pathlib import Path

import pytest

from exercises.checks import EXERCISES
from exercises.grade import fault_of, load

ALL = [(name, check) for name, checks in EXERCISES.items() for check in checks]


@pytest.mark.parametrize("name, check", ALL, ids=[f"{n}-{c.__name__}" for n, c in ALL])
def test_answer(name, check, request):
    option = request.config.getoption
    fault = fault_of(check, lambda: load(Path(option("--answers")), name), option("--student"))
    request.config.exercise_faults[name, check.__name__] = fault
    if fault:
        pytest.fail(f"{name}.py: {check.__doc__}: {fault}", pytrace=False)
