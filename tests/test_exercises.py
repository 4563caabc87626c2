"""The exercises: their solutions pass, and what is usually got wrong is told by its name."""

import doctest
import functools
import json
import re
import subprocess
import sys
from types import ModuleType

import pytest
from scripts import call, metrics

import nanoalign
import train_dpo
import train_kto
from exercises.__main__ import PLACES, TABLE, take_places
from exercises.checks import EXERCISES
from exercises.grade import HERE, fault_of, load, passed

SOLUTIONS = HERE / "solutions"
MISTAKES = [  # exercise, a piece of its solution, what stands there instead, what is said
    ("e01_mask", '"assistant\\n", False', '"assistant\\n", True', "trains on the header"),
    ("e01_mask", "content']}\", False", "content']}\", True", "trains on the context"),
    ("e01_mask", "template.end, True", "template.end, False", "the model would never stop"),
    ("e01_mask", 'yield reply["content"]', 'yield " " + reply["content"]', "reads .*expected"),
    ("e01_mask", "add_special_tokens=False", "add_special_tokens=True", r"\(BOS\) trains"),
    ("e01_mask", "split_special_tokens=True", "split_special_tokens=False", "the real marker"),
    ("e01_mask", "[trains] * len(new)", "[trains]", "ids have .* entries in the mask"),
    ("e02_until", "query < geometry", "query <= geometry", "another branch that ends just before"),
    ("e02_until", "(key <= query) &", "(key >= 0) &", "what comes after it"),
    ("e02_until", " & (query < geometry.until[key])", "", "on another branch"),
    ("e02_until", "key <= query", "key < query", "does not see itself"),
    ("e02_until", "[key] < window", "[key] <= window", r"lets \d tokens be seen"),
    ("e02_until", "geometry.position[query] - geometry.position[key]", "query - key", "in the row"),
    ("e03_lora", "y + self.scaling *", "y +", "the scaling is missing"),
    ("e03_lora", "if not self.enabled", "if False", "not enabled still adds"),
    ("e03_lora", "delta = self.base_layer, self.scaling *", "delta = self.base_layer,", "missing"),
    ("e04_reference", "@torch.no_grad()\n", "", "carry a gradient"),
    ("e04_reference", "layer.enabled = False", "pass", "the adapter is on"),
    ("e04_reference", "layer.enabled = True", "pass", "the adapter stays off"),
    ("e04_reference", "lm.eval()", "pass", "drops out"),
    ("e04_reference", "lm.train(training)", "lm.train()", "training mode is not as it was"),
    ("e05_nf4", "blocks.abs().amax(1)", "blocks.amax(1)", "not the largest magnitude"),
    ("e05_nf4", "(LEVELS[1:] + LEVELS[:-1]) / 2", "LEVELS[1:]", "rounded to one side"),
    ("e05_nf4", "codes[0::2] << 4 | codes[1::2]", "codes[1::2] << 4 | codes[0::2]", "other's"),
    ("e05_nf4", ".clamp(min=1e-38)", "", "a block of zeros"),
    ("e06_logps", "head.logits(h).log_softmax(-1)", "head.logits(h)", "nothing has normalized"),
    ("e06_logps", "log_softmax(-1).gather(1, targets", "softmax(-1).log().gather(1, targets",
     "is not finite"),
    ("e06_logps", "logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]",
     "logits[1:].log_softmax(-1).gather(1, ids[1:, None])[:, 0]", "has seen it already"),
    ("e06_logps", "].sum()", "].mean()", "a mean over tokens"),
    ("e06_logps", "logps[mask[1:]]", "logps[mask[:-1]]", "the mask is off by one"),
    ("e07_dpo", "(chosen - rejected)", "(rejected - chosen)", "the sign is wrong"),
    ("e07_dpo", "(chosen - rejected),", "(chosen - rejected).mean(),", "averaged or summed"),
    ("e07_dpo", "-F.logsigmoid(", "-F.sigmoid(", "the loss is"),
    ("e07_dpo", "F.logsigmoid(chosen - rejected)", "(chosen - rejected).sigmoid().log()", "-4000"),
    ("e07_dpo", "chosen.detach(), rejected.detach()", "chosen, rejected", "carries a gradient"),
    ("e08_kto", ".mean()", ".sum()", "a sum, where the mean"),
    ("e08_kto", ".mean().clamp(min=0)", ".clamp(min=0).mean()", "each log-ratio is bounded"),
    ("e08_kto", ".clamp(min=0).detach()", ".clamp(min=0)", "its own yardstick"),
    ("e08_kto", "1.0, -1.0", "1.0, 1.0", "treated like a thumb up"),
    ("e08_kto", "sign * beta * (ratio - z0)", "beta * (sign * ratio - z0)", "z0 is not turned"),
    ("e09_step", "[0].back", "[0].div(batch['loss'][1] * 3 / 8).back", "a short batch weighs too"),
    ("e09_step", "p.grad /= count", "pass", "the gradient of the sum"),
    ("e09_step", "    optimizer.zero_grad()\n", "", "left behind"),
    ("e09_step", "if finite:", "if True:", "changes the weights"),
    ("e09_step", "in batches:", "in list(batches):", "asked for before"),
    ("e10_ranked", "ranks[i] < ranks[j]", "ranks[i] <= ranks[j]", "of one rank"),
    ("e10_ranked", "ranks[i] < ranks[j]", "ranks[i] > ranks[j]", "stands first"),
    ("e10_ranked", "start += example.count", "start += 2", "have two completions"),
    ("e10_ranked", "start += example.count", "start += 0", "within an example"),
]  # fmt: skip


def functions_of(module: ModuleType) -> list[str]:
    """The names of its own functions, not of those that it imports."""
    own = {n: getattr(f, "__module__", None) for n, f in vars(module).items() if callable(f)}
    return [name for name, home in own.items() if home == module.__name__]


def faults(name: str, module: ModuleType, student: str = "") -> list[str | None]:
    return [fault_of(check, lambda: module, student) for check in EXERCISES[name]]


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_passes_whatever_the_students_name(name):
    module = load(SOLUTIONS, name)
    for student in ["", "Ada", *map(str, range(20))]:
        assert not any(faults(name, module, student)), student


@pytest.mark.parametrize("name, old, new, said", MISTAKES)
def test_a_mistake_is_called_by_its_name(name, old, new, said):
    source = (SOLUTIONS / f"{name}.py").read_text(encoding="utf-8")
    assert old in source
    module = ModuleType(name)
    exec(source.replace(old, new), vars(module))
    for student in ("", "Ada"):
        found = [fault for fault in faults(name, module, student) if fault]
        assert found, "a mistake passed"
        assert any(re.search(said, fault) for fault in found), found


@pytest.mark.parametrize("name", EXERCISES)
def test_worked_examples_are_right_and_nothing_is_given_away(name):
    """The examples in the exercise's docstrings, computed by its solution."""
    exercise, solution = load(HERE, name), load(SOLUTIONS, name)
    functions = functions_of(solution)
    assert functions and set(functions) <= vars(exercise).keys()
    for function in functions:
        text = vars(exercise)[function].__doc__
        examples = doctest.DocTestParser().get_doctest(text, dict(vars(solution)), name, None, 0)
        assert doctest.DocTestRunner().run(examples).failed == 0
    assert [f for f in faults(name, exercise) if f != "not written yet"] == []


def test_points_and_report(tmp_path):
    """Two answers, one of them wrong; a file that is no Python, one that ends the program."""
    for name in EXERCISES:
        (tmp_path / f"{name}.py").write_text((HERE / f"{name}.py").read_text())
    dpo, kto = ((SOLUTIONS / f"{name}.py").read_text() for name in ("e07_dpo", "e08_kto"))
    (tmp_path / "e07_dpo.py").write_text(dpo)
    (tmp_path / "e08_kto.py").write_text(kto.replace(".mean()", ".sum()"))
    (tmp_path / "e09_step.py").write_text("def optimizer_step(:\n")
    (tmp_path / "e10_ranked.py").write_text("raise SystemExit\n")
    command = [sys.executable, "-m", "pytest", "-q", "exercises", "-p", "no:cacheprovider"]
    command += ["--answers", str(tmp_path), "--report", str(tmp_path / "grade.json")]
    done = subprocess.run(
        [*command, "--student", "Ada"], cwd=HERE.parent, capture_output=True, text=True
    )
    assert done.returncode == 1 and " 16 of 100" in done.stdout, done.stdout[-2000:]
    assert "e08_kto.py: z0: a sum, where the mean is wanted" in done.stdout
    grade = json.loads((tmp_path / "grade.json").read_text())
    assert (grade["student"], grade["points"], grade["of"]) == ("Ada", 16, 100)
    rows = {row["exercise"]: row for row in grade["exercises"]}
    assert rows["e07_dpo"] == dict(exercise="e07_dpo", points=10, of=10, faults=[])
    assert rows["e01_mask"]["faults"] == ["not written yet"]
    assert "SyntaxError" in rows["e09_step"]["faults"][0]
    assert "SystemExit" in rows["e10_ranked"]["faults"][0]
    assert list(passed(tmp_path, "Ada")) == ["e07_dpo"]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_answers_take_the_lessons_place(method, model_dir, data, tmp_path, no_curves, monkeypatch):
    """Every one of them is called, and the run has the numbers of the lesson's own."""
    given = dict(model_name_or_path=model_dir, dataset_name=data / f"{method}.jsonl", device="cpu")
    given |= dict(load_in_4bit=True, max_steps=2, logging_steps=1, learning_rate=1e-3)
    call(method, {**given, "output_dir": tmp_path / "lesson"})

    called = set()

    def counted(function):
        def wrapper(*given, **more):
            called.add(function.__name__)
            return function(*given, **more)

        return functools.wraps(function)(wrapper)

    answers = passed(SOLUTIONS)
    for answer in answers.values():
        for function in functions_of(answer):
            setattr(answer, function, counted(vars(answer)[function]))
    for script in (train_dpo, train_kto):
        monkeypatch.setattr(script, "reference_of", script.reference_of)
    for place, function in [pair for pairs in PLACES.values() for pair in pairs]:
        if place is not TABLE:
            monkeypatch.setattr(place, function, vars(place)[function])  # is put back at the end
    try:
        take_places(answers)
        call(method, {**given, "output_dir": tmp_path / "answers"})
    finally:
        nanoalign.plain(False)
    own = {"dpo": {"dpo_loss", "pairs_of"}, "kto": {"kto_loss", "kl_baseline"}}[method]
    both = {"pieces", "ids_and_mask", "allowed", "forward", "quantize", "token_logps"}
    assert called == own | both | {"optimizer_step", "reference_logps"}
    lines = zip(metrics(tmp_path / "lesson"), metrics(tmp_path / "answers"), strict=True)
    for expected, found in lines:
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
