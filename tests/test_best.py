"""The best step is kept, not the last; and an end that comes early."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file
from scripts import call, child, metrics, tensors, tops, wait

import nanoalign.run.record
from nanoalign import InputError
from nanoalign.run.flags import SFTConfig, parse
from nanoalign.run.log import best_of

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.usefixtures("no_curves"),
]
LAST = {"resume_from_checkpoint": "last"}
BEST = {"load_best_model_at_end": "true"}
KINDS = {"lora": {"lora_r": 4}, "full": {"use_peft": "false"}}


@pytest.fixture(scope="module")
def flags(model_dir, data):
    """8 steps, an evaluation after each second."""

    def make(directory, **changes):
        return dict(
            model_name_or_path=model_dir, dataset_name=data / "sft.jsonl", device="cpu",
            output_dir=directory, learning_rate=1e-2, max_steps=8, logging_steps=8, eval_steps=2,
            per_device_train_batch_size=4, eval_dataset=data / "sft.jsonl",
        ) | changes  # fmt: skip

    return make


@pytest.fixture
def losses(monkeypatch):
    """losses(3.0, 2.0, ...): what the evaluations of steps 2, 4, ... measure, from now on."""
    real = nanoalign.run.record.evaluate

    def plan(*values):
        def evaluate(lm, batches, total):
            record = plan.record
            measured = real(lm, batches, total)
            return measured | {"loss": values[(record.step - 1) // 2] if record.step else 9.0}

        class Record(nanoalign.run.record.Record):
            def __init__(self, *given):
                plan.record = self
                super().__init__(*given)

        monkeypatch.setattr(nanoalign.run.record, "evaluate", evaluate)
        monkeypatch.setattr(nanoalign.run.record, "Record", Record)

    return plan


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The run that keeps its last step: its metrics, and the weights after each second one."""
    known = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp(kind)
        call("sft", flags(directory, save_steps=2, **KINDS[kind]))
        steps = {n: tensors(directory / f"checkpoint-{n}") for n in (2, 4, 6)}
        known[kind] = metrics(directory), steps | {8: tensors(directory)}
    return known


def evaluated(directory):
    return [line["step"] for line in metrics(directory) if "eval_loss" in line]


# ------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("best", [2, 4, 8])
def test_the_best_step_is_kept(best, kind, flags, losses, whole, tmp_path, capsys):
    values = [3.0 - (step == best) for step in (2, 4, 6, 8)]
    losses(*values)
    call("sft", flags(tmp_path, **BEST, **KINDS[kind]))
    assert tensors(tmp_path) == whole[kind][1][best]
    said = capsys.readouterr().out
    assert f"step {best} is kept: eval_loss 2 is the lowest of 4" in said
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["best_step"], run["state"]["step"]) == (best, 8)
    assert tops(tmp_path) == [f"checkpoint-{best}"]  # saved for that alone, and it alone
    assert "eval_loss 2" in (tmp_path / "README.md").read_text()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    call("sft", flags(tmp_path, **BEST, **KINDS[kind], **LAST))  # it is finished
    assert tensors(tmp_path) == whole[kind][1][best]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_without_the_flag_it_is_the_last(flags, losses, whole, tmp_path):
    losses(1.0, 2.0, 3.0, 4.0)
    call("sft", flags(tmp_path, **KINDS["lora"]))
    assert tensors(tmp_path) == whole["lora"][1][8] and tops(tmp_path) == []


def test_only_a_strictly_better_one_counts():
    def best(values, name="eval_loss", **flags):
        lines = [{"step": i, name: value} for i, value in enumerate(values, 1)]
        line, since = best_of(SFTConfig(**flags), lines)
        return line and line["step"], since

    assert best([2.0, 1.0, 1.0, 3.0]) == (2, 2)
    for name in ("rewards/margins", "eval_rewards/margins"):
        assert best([1.0, 3.0, 3.0], "eval_rewards/margins", metric_for_best_model=name) == (2, 1)
    for name in ("loss", "eval_loss", "aux_loss"):
        own = "eval_" + name.removeprefix("eval_")
        assert best([1.0, 3.0, 0.5], own, metric_for_best_model=name) == (3, 0)
    assert best([1.0, 3.0], greater_is_better=True) == (2, 0)
    low = dict(metric_for_best_model="kl", greater_is_better=False)
    assert best([1.0, 3.0], "eval_kl", **low) == (1, 1)
    assert best([]) == (None, 0)
    lines = [{"step": 0, "eval_loss": 0.1}, {"step": 1, "loss": 0.1}, {"step": 2, "eval_kl": 1.0}]
    assert best_of(SFTConfig(), lines) == (None, 1)  # of step 0; of training; not finite


def test_beside_save_total_limit_and_save_steps(flags, losses, tmp_path):
    losses(5.0, 1.0, 4.0, 3.0)
    call("sft", flags(tmp_path, save_steps=3, save_total_limit=1, **BEST, lora_r=4))
    assert tops(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    losses(5.0, 4.0, 3.0, 2.0)  # each is the best for a while
    call("sft", flags(tmp_path, save_strategy="no", overwrite_output_dir="true", **BEST, lora_r=4))
    assert tops(tmp_path) == ["checkpoint-8"]
    more = dict(save_steps=4, overwrite_output_dir="true", lora_r=4)
    call("sft", flags(tmp_path, **more, **BEST))
    assert tops(tmp_path) == ["checkpoint-4", "checkpoint-8"]  # that of step 4 is wanted anyway


def test_a_metric_that_is_never_finite(flags, losses, whole, tmp_path, capsys):
    losses(*[float("nan")] * 4)
    call("sft", flags(tmp_path, **BEST, **KINDS["lora"]))
    assert tensors(tmp_path) == whole["lora"][1][8] and "is kept" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------- an early stop


@pytest.mark.parametrize("best", [{}, BEST], ids=["last", "best"])
def test_an_early_stop_ends_the_run_as_finished(best, flags, losses, whole, tmp_path, capsys):
    losses(3.0, 2.0, 2.5, 2.5)
    more = dict(early_stopping_patience=1, **best, **KINDS["lora"])
    call("sft", flags(tmp_path, **more))
    assert evaluated(tmp_path) == [2, 4, 6] and (tmp_path / "run.json").exists()
    assert tensors(tmp_path) == whole["lora"][1][4 if best else 6]
    assert "no evaluation was better in the last 1" in capsys.readouterr().out
    before = (tmp_path / "metrics.jsonl").read_bytes()
    call("sft", flags(tmp_path, **more, **LAST))
    assert "this run is finished; nothing to do" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert tensors(tmp_path) == whole["lora"][1][4 if best else 6]


def test_patience_is_for_evaluations_in_a_row(flags, losses, tmp_path):
    losses(3.0, 4.0, 2.0, 4.0)
    call("sft", flags(tmp_path, early_stopping_patience=2, lora_r=4))
    assert evaluated(tmp_path) == [2, 4, 6, 8]


def test_an_evaluation_at_the_start_does_not_compete(flags, whole, tmp_path, capsys):
    call("sft", flags(tmp_path, eval_on_start="true", **BEST, **KINDS["lora"]))
    assert evaluated(tmp_path) == [0, 2, 4, 6, 8]
    expected = whole["lora"][0]
    assert [m for m in metrics(tmp_path) if m["step"]] == expected  # and changes nothing
    assert metrics(tmp_path)[0]["eval_loss"] > expected[0]["eval_loss"]


# ------------------------------------------------------------------------------- killed, and on


def killed_at(monkeypatch, place, given):
    """Run until `place` of Record would be called for the last time, and kill the process there."""

    def action():
        real = getattr(nanoalign.run.record.Record, place)

        def last(self, *more, **how):
            if self.step == 8 or self.ended:
                os.kill(os.getpid(), 9)
            return real(self, *more, **how)

        setattr(nanoalign.run.record.Record, place, last)
        call("sft", given)

    assert wait(child(action)) == -9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["evaluate", "end", "save", "write"])
def test_killed_at_the_end(place, kind, flags, losses, whole, tmp_path, monkeypatch):
    """The run that goes on trains no step: it evaluates, if that is left, chooses, saves."""
    losses(3.0, 1.0, 2.0, 2.0)
    given = flags(tmp_path, **BEST, **KINDS[kind])
    killed_at(monkeypatch, place, given)
    assert not (tmp_path / "run.json").exists()
    assert evaluated(tmp_path) == ([2, 4, 6] if place == "evaluate" else [2, 4, 6, 8])
    monkeypatch.setattr(nanoalign.train, "optimizer_step", None)  # no step can be made
    call("sft", given | LAST)
    assert tensors(tmp_path) == whole[kind][1][4]
    assert evaluated(tmp_path) == [2, 4, 6, 8] and tops(tmp_path) == ["checkpoint-4"]


def test_killed_after_an_early_stop(flags, losses, whole, tmp_path, monkeypatch):
    losses(3.0, 1.0, 2.0, 0.5)
    given = flags(tmp_path, early_stopping_patience=1, **BEST, **KINDS["lora"])
    killed_at(monkeypatch, "save", given)
    monkeypatch.setattr(nanoalign.train, "optimizer_step", None)
    call("sft", given | LAST)
    assert tensors(tmp_path) == whole["lora"][1][4] and evaluated(tmp_path) == [2, 4, 6]


def test_killed_anywhere_it_comes_to_the_same_end(flags, whole, losses, tmp_path, monkeypatch):
    """In the midst of any step, and before any save."""
    values = 3.0, 1.0, 2.0, 1.0
    losses(*values)
    for place, step in (("advance", 3), ("save_checkpoint", 4), ("advance", 5), ("evaluate", 6)):
        directory = tmp_path / f"{place}-{step}"
        given = flags(directory, save_steps=2, **BEST, **KINDS["lora"])

        def action(place=place, step=step, given=given):
            real = getattr(nanoalign.run.record.Record, place)

            def last(self, *more):
                now = more[0].number if place == "advance" else self.step
                if now == step:
                    os.kill(os.getpid(), 9)
                return real(self, *more)

            setattr(nanoalign.run.record.Record, place, last)
            call("sft", given)

        assert wait(child(action)) == -9
        call("sft", given | LAST)
        assert tensors(directory) == whole["lora"][1][4] and evaluated(directory) == [2, 4, 6, 8]


def test_a_best_checkpoint_that_is_gone(flags, losses, tmp_path, monkeypatch):
    losses(3.0, 1.0, 2.0, 2.0)
    given = flags(tmp_path, **BEST, lora_r=4)
    killed_at(monkeypatch, "end", given)
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(InputError, match="checkpoint-4/state.safetensors: damaged: No such file"):
        call("sft", given | LAST)
    assert load_file(tmp_path / "checkpoint-8" / "state.safetensors")


# ------------------------------------------------------------------------------------------ flags


def parsed(*words):
    return parse(SFTConfig, ["--model_name_or_path=m", "--dataset_name=d", *words], {})


@pytest.mark.parametrize(
    "flag", ["--load_best_model_at_end", "--early_stopping_patience=2", "--eval_on_start"]
)
def test_without_evaluation_it_is_refused(flag):
    name = flag.split("=")[0]
    for more in ([], ["--eval_fraction=0.5", "--eval_strategy=no"]):
        with pytest.raises(InputError, match=f"^{name}: needs --eval_dataset or --eval_fraction$"):
            parsed(flag, *more)
    parsed(flag, "--eval_fraction=0.5")


def test_what_has_nothing_to_do(capsys):
    parsed("--metric_for_best_model=loss", "--greater_is_better=false", "--eval_fraction=0.5")
    names = "greater_is_better", "metric_for_best_model"
    said = [f"--{name} has nothing to do in this run" for name in names]
    assert capsys.readouterr().out.splitlines() == said


KNOWN = {"sft": "loss", "dpo": "rewards/margins", "kto": "kl"}


@pytest.mark.parametrize("method", KNOWN)
def test_a_metric_that_is_not_measured_is_refused_before_step_1(method, flags, data, tmp_path):
    file, more = data / f"{method}.jsonl", dict(max_steps=2, lora_r=4, **BEST)
    given = flags(tmp_path, dataset_name=file, eval_dataset=file, **more)
    message = "^--metric_for_best_model accuracy: expected one of .*loss"
    with pytest.raises(InputError, match=message):
        call(method, given | {"metric_for_best_model": "accuracy"})
    assert evaluated(tmp_path) == []
    known = {"metric_for_best_model": KNOWN[method], "overwrite_output_dir": "true"}
    call(method, given | known)
