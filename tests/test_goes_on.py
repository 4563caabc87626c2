"""A run goes on as people mean it: with more steps, and where what it reads has another path."""

import os
import shutil

import pytest
from scripts import call, metrics, tensors, tops

from nanoalign import InputError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.usefixtures("no_curves"),
]
LAST = {"resume_from_checkpoint": "last"}


@pytest.fixture(scope="module")
def flags(model_dir, data):
    """11 rows, 4 a step: 3 steps an epoch."""

    def make(directory, **changes):
        return dict(
            model_name_or_path=model_dir, dataset_name=data / "sft.jsonl", device="cpu", lora_r=4,
            output_dir=directory, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1,
            per_device_train_batch_size=4, max_steps=8, lora_dropout=0.1,
        ) | changes  # fmt: skip

    return make


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The run of eight steps that nothing interrupts."""
    directory = tmp_path_factory.mktemp("whole")
    call("sft", flags(directory))
    return metrics(directory), tensors(directory)


def result(directory):
    return metrics(directory), tensors(directory)


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    ],
    ids=["constant", "warm-up", "inverse_sqrt"],
)
def test_more_steps_of_a_finished_run(schedule, flags, whole, tmp_path, capsys):
    """It goes on from its newest checkpoint: as if they had been asked for at once."""
    given = flags(tmp_path / "run", save_steps=4, **schedule)
    call("sft", given | {"max_steps": 6})
    capsys.readouterr()
    call("sft", given | LAST)
    said = capsys.readouterr().out
    assert "--max_steps was 6, is 8: the steps that were done are the same" in said
    assert f"{tmp_path / 'run'}: was finished at step 6, goes on to step 8" in said
    assert f"going on from {tmp_path / 'run' / 'checkpoint-4'}" in said
    if schedule:
        call("sft", flags(tmp_path / "whole", **schedule))
        whole = result(tmp_path / "whole")
    assert result(tmp_path / "run") == whole and (tmp_path / "run" / "run.json").exists()
    call("sft", given | LAST)
    assert "this run is finished; nothing to do" in capsys.readouterr().out


def test_more_epochs_of_a_stopped_run(flags, whole, tmp_path):
    given = flags(tmp_path / "run", save_steps=3, max_steps=-1)
    call("sft", given | {"num_train_epochs": 2})
    os.remove(tmp_path / "run" / "run.json")
    call("sft", given | LAST | {"num_train_epochs": 8 / 3})
    assert result(tmp_path / "run") == whole


def test_fewer_steps_end_it_sooner(flags, tmp_path):
    given = flags(tmp_path / "run", save_steps=4)
    call("sft", given)
    os.remove(tmp_path / "run" / "run.json")
    call("sft", given | LAST | {"max_steps": 5})
    call("sft", flags(tmp_path / "five", max_steps=5))
    assert result(tmp_path / "run") == result(tmp_path / "five")


@pytest.mark.parametrize(
    "schedule, steps, why",
    [
        (
            {"lr_scheduler_type": "linear"},
            8,
            "a linear schedule over another number",
        ),
        ({"lr_scheduler_type": "cosine"}, 7, "a cosine schedule over another number"),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.5},
            8,
            "learning rates; a",
        ),
        ({}, 3, "step 6 is done"),
        ({}, 8, ""),  # but there is no checkpoint
    ],
    ids=lambda value: str(value)[:40],
)
def test_where_it_can_not(schedule, steps, why, flags, tmp_path):
    given = flags(tmp_path, **schedule, max_steps=6)
    call("sft", given)
    before = result(tmp_path)
    message = f"another run, which is finished: --max_steps was 6, is {steps}: .*{why}"
    if not why:
        message = "finished at step 6, and no checkpoint is left to go on from; --save_steps writes"
    with pytest.raises(InputError, match=message):
        call("sft", given | LAST | {"max_steps": steps})
    assert result(tmp_path) == before and (tmp_path / "run.json").exists()


def test_a_stopped_run_says_why_it_can_not(flags, tmp_path):
    given = flags(tmp_path, lr_scheduler_type="cosine", save_steps=3, max_steps=6)
    call("sft", given)
    os.remove(tmp_path / "run.json")
    message = "checkpoint-3: a checkpoint of another run: --max_steps was 6, is 8: a cosine"
    with pytest.raises(InputError, match=message):
        call("sft", given | LAST | {"max_steps": 8})


def test_another_path_to_the_same(flags, whole, data, model_dir, tmp_path, capsys):
    """Of data and base, and of the data to evaluate on: what they hold is what counts."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(model_dir, tmp_path / "base")
    evaluated = dict(eval_dataset=data / "sft.jsonl", eval_steps=100)
    call("sft", flags(tmp_path / "run", save_steps=4, max_steps=4 + 1, **evaluated))
    other = tmp_path / "data" / "sft.jsonl"
    moved = dict(dataset_name=other, model_name_or_path=tmp_path / "base", eval_dataset=other)
    capsys.readouterr()
    call("sft", flags(tmp_path / "run", **(evaluated | moved), **LAST))
    said = capsys.readouterr().out
    for flag, part in (
        ("dataset_name", "data"), ("model_name_or_path", "base"),
        ("eval_dataset", "evaluation data"),
    ):  # fmt: skip
        assert f"--{flag} was " in said and f": the same {part}\n" in said
    assert tensors(tmp_path / "run") == whole[1]

    os.remove(tmp_path / "run" / "run.json")
    text = other.read_text()
    other.write_text(text.replace("France", "Spain", 1))
    given = flags(tmp_path / "run", **(evaluated | moved), **LAST)
    with pytest.raises(InputError, match="other data; other evaluation data$"):
        call("sft", given)
    (tmp_path / "data" / "more.jsonl").write_text(text)
    given |= {"dataset_name": tmp_path / "data" / "more.jsonl"}
    with pytest.raises(InputError, match="--eval_dataset was .*; other evaluation data$"):
        call("sft", given)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_reference_may_be_an_adapter(method, flags, data, model_dir, tmp_path, capsys):
    """Training that goes on from it compares with it anyway: the same numbers; and from the base,
    the rewards begin where the two differ."""
    first = tmp_path / "first"
    call("sft", flags(first, max_steps=4))
    more = dict(dataset_name=data / f"{method}.jsonl", max_steps=3, lora_dropout=None)
    on = {**more, "adapter_name_or_path": first, "model_name_or_path": None, "lora_r": None}
    call(method, flags(tmp_path / "own", **on))
    call(method, flags(tmp_path / "named", **on, ref_model_name_or_path=first))
    assert result(tmp_path / "own") == result(tmp_path / "named")
    assert f"the reference is {model_dir} with the adapter {first}" in capsys.readouterr().out
    call(method, flags(tmp_path / "base", **more, ref_model_name_or_path=first))
    begun, other = (metrics(tmp_path / name)[0] for name in ("own", "base"))
    assert begun["rewards/chosen"] == 0 != other["rewards/chosen"] and tops(tmp_path / "base") == []
