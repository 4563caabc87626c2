"""Nothing is lost: runs that are killed, stopped, out of disk or out of numbers, and go on."""

import ast
import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from scripts import ROOT, argv, call, child, files, metrics, no_reader, tensors, tops, wait
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import nanoalign.formats.peft
import nanoalign.run.record
import nanoalign.train
import train_dpo
import train_kto
import train_sft
from nanoalign import InputError, Stopped
from nanoalign.chatml import ChatML
from nanoalign.fast import paged
from nanoalign.run import report
from nanoalign.run.checkpoint import weights_fingerprint
from nanoalign.run.files import write_whole
from nanoalign.run.flags import SFTConfig, parse
from nanoalign.run.log import Log
from nanoalign.tools import merge

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.usefixtures("no_curves"),
]
ALL = pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
LAST = {"resume_from_checkpoint": "last"}


@pytest.fixture(scope="module")
def flags(model_dir, data):
    """flags(method, directory, **changes): 8 steps of 2 x 2 of 11 examples, into the third epoch,
    with dropout, noise and evaluations; two metrics lines in three cover more than one step."""

    def make(method, directory, **changes):
        given = dict(
            model_name_or_path=model_dir, dataset_name=data / f"{method}.jsonl", device="cpu",
            output_dir=directory, learning_rate=1e-2, max_steps=8, logging_steps=3, lora_r=4,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_dropout="false",
            lora_dropout=0.2, eval_dataset=data / f"{method}.jsonl", eval_steps=3, weight_decay=0.1,
            warmup_steps=2, lr_scheduler_type="cosine",
        )  # fmt: skip
        if method == "sft":
            given["neftune_noise_alpha"] = 5
        if "use_peft" in changes:
            del given["lora_r"], given["lora_dropout"]
        return given | changes

    return make


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """whole(method, **changes) -> (metrics, tensors) of the run that nothing interrupts."""
    known = {}

    def result(method, **changes):
        key = method, *changes.items()
        if key not in known:
            directory = tmp_path_factory.mktemp("whole")
            call(method, flags(method, directory, **changes))
            assert tops(directory) == []
            known[key] = metrics(directory), tensors(directory)
        return known[key]

    return result


def at_step(monkeypatch, step, action):
    """action() in the midst of that step, counted from 1."""
    real = nanoalign.train.learning_rate

    def rate(cfg, now, total):
        if now + 1 == step:
            action()
        return real(cfg, now, total)

    monkeypatch.setattr(nanoalign.train, "learning_rate", rate)


def stopped(monkeypatch, step, method, given, number=signal.SIGTERM):
    """Run until a signal arrives in the midst of a step."""
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
        at_step(patch, step, lambda: os.kill(os.getpid(), number))
        call(method, given)
    assert stop.value.code == 128 + number


def change(path, **changes):
    """Fields of a JSON file; ... removes one."""
    text = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in text.items() if v is not ...}))


# ------------------------------------------------------------------------------ stop and go on


@ALL
@pytest.mark.parametrize("full", [{}, {"use_peft": "false"}], ids=["lora", "full"])
def test_a_resumed_run_is_the_uninterrupted_one(
    method, full, flags, whole, tmp_path, monkeypatch, capsys
):
    """Stopped twice in mid-epoch and between metrics lines: the same losses, evaluations and final
    weights, bit for bit, and each line of metrics.jsonl once."""
    expected = whole(method, **full)
    given = flags(method, tmp_path / "run", **full)
    stopped(monkeypatch, 2, method, given, signal.SIGINT)
    assert "stopped after step 2; --resume_from_checkpoint goes on" in capsys.readouterr().out
    assert tops(tmp_path / "run") == ["checkpoint-2"]
    stopped(monkeypatch, 7, method, given | LAST, signal.SIGTERM)
    assert f"going on from {tmp_path / 'run' / 'checkpoint-2'}" in capsys.readouterr().out
    call(method, given | LAST)
    assert metrics(tmp_path / "run") == expected[0]
    assert tensors(tmp_path / "run") == expected[1]
    steps = [line["step"] for line in expected[0] if "loss" in line]
    assert steps == [3, 6, 8] and len(expected[0]) == 3 + 3  # and evaluations there


def test_what_a_resumed_run_depends_on(flags, whole, tmp_path, monkeypatch):
    """The test above can fail: without the saved generators the losses differ."""
    given = flags("sft", tmp_path)
    stopped(monkeypatch, 2, "sft", given)
    path = tmp_path / "checkpoint-2" / "state.safetensors"
    state = load_file(path)
    torch.manual_seed(99)
    save_file(state | {"rng.cpu": torch.get_rng_state()}, path)
    call("sft", given | LAST)
    assert metrics(tmp_path) != whole("sft")[0]


def test_whatever_the_optimizer_keeps_is_restored(flags, tmp_path, monkeypatch):
    """SGD's momentum, say: other keys than AdamW's."""

    def momentum(cfg, lm):
        trained = [p for p in lm.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=cfg.learning_rate, momentum=0.9)

    monkeypatch.setattr(nanoalign.run.record, "make_optimizer", momentum)
    call("sft", flags("sft", tmp_path / "whole"))
    given = flags("sft", tmp_path / "run")
    stopped(monkeypatch, 4, "sft", given)
    assert any(
        key.startswith("momentum_buffer.")
        for key in load_file(tmp_path / "run" / "checkpoint-4" / "state.safetensors")
    )
    call("sft", given | LAST)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert tensors(tmp_path / "run") == tensors(tmp_path / "whole")
    monkeypatch.undo()  # and AdamW does not take its checkpoint for one of its own
    with pytest.raises(InputError, match="a checkpoint of another run: other optimizer"):
        call("sft", given | {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-4"})


def test_paged_adamw_goes_on_from_adamw_and_back(flags, whole, tmp_path, monkeypatch):
    """It is the same to the last bit, part by part, so neither notices."""
    monkeypatch.setattr(paged, "PART", 1000)
    expected = whole("sft", use_peft="false")
    given = flags("sft", tmp_path / "run", use_peft="false")
    stopped(monkeypatch, 2, "sft", given)
    stopped(monkeypatch, 6, "sft", given | LAST | {"optim": "paged_adamw_32bit"})
    call("sft", given | LAST)
    assert (metrics(tmp_path / "run"), tensors(tmp_path / "run")) == expected


def test_an_adapter_that_is_continued(flags, whole, tmp_path, monkeypatch, model_dir):
    """The reference stays what it was at step 0, not at the checkpoint."""
    call("sft", flags("sft", tmp_path / "sft"))
    more = dict(adapter_name_or_path=tmp_path / "sft", lora_r=None, lora_dropout=None)
    expected = whole("dpo", **more)
    given = flags("dpo", tmp_path / "dpo", **more)
    stopped(monkeypatch, 4, "dpo", given)
    call("dpo", given | LAST)
    assert (metrics(tmp_path / "dpo"), tensors(tmp_path / "dpo")) == expected


@ALL
@pytest.mark.parametrize("when", ["before it", "in it"])
def test_a_signal_does_not_wait_for_an_evaluation(
    method, when, flags, whole, tmp_path, monkeypatch
):
    """Of step 3: it is cut off before its second batch, and the run that goes on does it."""
    given = flags(method, tmp_path / "run", per_device_eval_batch_size=3)
    module, name = LOSSES[method]
    real, batches = getattr(module, name), []

    def counted(*args, **more):
        if not torch.is_grad_enabled():
            batches.append(1)
            if when == "in it":
                os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **more)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
        patch.setattr(module, name, counted)
        if when == "before it":
            at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        call(method, given)
    assert stop.value.code == 143 and len(batches) == (when == "in it")
    assert tops(tmp_path / "run") == ["checkpoint-3"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3]
    call(method, given | LAST)
    lines, (expected, weights) = metrics(tmp_path / "run"), whole(method)
    assert tensors(tmp_path / "run") == weights
    assert [line["step"] for line in lines] == [3, 3, 6, 6, 8, 8]
    for line, other in zip(lines, expected):  # whose evaluation batches are larger
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_the_last_weights_are_saved_before_the_last_evaluation(flags, whole, tmp_path, monkeypatch):
    def broken(*args):
        raise ArithmeticError

    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        at_step(patch, 8, lambda: patch.setattr(nanoalign.run.record, "evaluate", broken))
        call("sft", flags("sft", tmp_path))
    assert tensors(tmp_path) == whole("sft")[1]


def test_without_checkpoints(flags, tmp_path, monkeypatch):
    """--save_steps 0: only a run that is stopped leaves one."""
    call("sft", flags("sft", tmp_path / "run", save_steps=0))
    assert tops(tmp_path / "run") == []
    stopped(monkeypatch, 2, "sft", flags("sft", tmp_path / "stopped", save_steps=0))
    assert tops(tmp_path / "stopped") == ["checkpoint-2"]


def test_a_second_signal_stops_at_once(flags, whole, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    given = flags("sft", tmp_path, save_steps=3)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
        at_step(patch, 5, twice)
        call("sft", given)
    assert stop.value.code == 128 + signal.SIGINT and tops(tmp_path) == ["checkpoint-3"]
    call("sft", given | LAST)
    assert (metrics(tmp_path), tensors(tmp_path)) == whole("sft")


def test_a_signal_in_the_last_step_ends_the_run_as_usual(flags, tmp_path, monkeypatch):
    """If no evaluation is left."""
    before = signal.getsignal(signal.SIGTERM)
    given = flags("sft", tmp_path, eval_dataset=None, eval_steps=None)
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        call("sft", given)
    assert (tmp_path / "README.md").exists() and tops(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


@ALL
@pytest.mark.parametrize("full", [{}, {"use_peft": "false"}], ids=["lora", "full"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_whose_last_weights_are_saved_is_finished(
    number, full, method, flags, whole, tmp_path, monkeypatch, capsys
):
    """Whatever ends it in its last evaluation: the run that goes on does that and no step."""
    given, real = flags(method, tmp_path, **full), nanoalign.run.record.evaluate

    def signalled(lm, batches, *more):
        if (tmp_path / "run.json").exists():
            os.kill(os.getpid(), number)
        return real(lm, batches, *more)

    def action():
        nanoalign.run.record.evaluate = signalled
        call(method, given)

    assert wait(child(action)) == (-9 if number == signal.SIGKILL else 143)
    assert tensors(tmp_path) == whole(method, **full)[1] and "README.md" not in files(tmp_path)
    for left in ("its evaluation is left", "nothing to do"):
        with monkeypatch.context() as patch:
            patch.setattr(nanoalign.train, "optimizer_step", None)
            call(method, given | LAST)
        said = capsys.readouterr().out
        assert f"step 8: this run is finished; {left}" in said
        assert (metrics(tmp_path), tensors(tmp_path)) == whole(method, **full)
        assert tops(tmp_path) == [] and (tmp_path / "README.md").exists()


@pytest.mark.parametrize("owner, name, code", [(Log, "close", 0), (report, "draw", -15)])
def test_a_signal_after_the_last_step_leaves_a_finished_run(
    owner, name, code, flags, whole, tmp_path, monkeypatch, capsys
):
    """While the log is closed, which may wait for a server, or while the curves are drawn: the run
    is not trained again."""
    given, real, expected = flags("sft", tmp_path), getattr(owner, name), whole("sft")

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    def action():
        setattr(owner, name, signalled)
        call("sft", given)

    assert wait(child(action)) == code
    monkeypatch.setattr(nanoalign.train, "optimizer_step", None)
    call("sft", given | LAST)
    assert "this run is finished; nothing to do" in capsys.readouterr().out
    assert (metrics(tmp_path), tensors(tmp_path)) == expected
    assert (tmp_path / "README.md").exists()


def test_the_command_is_stopped_killed_and_goes_on(flags, whole, tmp_path):
    """Three real processes: SIGTERM, then kill -9, then to the end; bit for bit the run that this
    process did, so a seed is a run, whatever the process."""
    given = flags("kto", tmp_path / "run", logging_steps=1, save_steps=1)

    def run(until, number, **more):
        words = [sys.executable, ROOT / "train_kto.py", *argv(given | more)]
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        said = []
        for line in process.stdout:
            said.append(line)
            if until and line.startswith(until):
                process.send_signal(number)
                until = None
        errors = process.stderr.read()
        process.stderr.close()
        process.stdout.close()
        return process.wait(), "".join(said), errors

    code, said, errors = run("step 2/8", signal.SIGTERM)
    assert code == 143 and "--resume_from_checkpoint goes on from there" in said and not errors
    code, said, errors = run("step 5/8", signal.SIGKILL, **LAST)
    assert code == -9 and "going on from" in said
    code, said, errors = run(None, None, **LAST)
    assert code == 0 and "going on from" in said and "step 8/8" in said and not errors
    expected = whole("kto", logging_steps=1)
    assert (metrics(tmp_path / "run"), tensors(tmp_path / "run")) == expected


# --------------------------------------------------------------------------------------- kill -9


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def run_until(given, directory, moment):
    """In a child: kill -9 right before the moment-th change of the output directory (None: count).

    Python's audit hooks tell of every file that is opened, renamed and removed; os.fsync does of
    those that safetensors and tokenizers write.
    """
    reader, writer = os.pipe()

    def action():
        count, fsync = 0, os.fsync

        def tick():
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        def hook(event, args):
            changes = event in CHANGES
            if event == "open":
                changes = isinstance(args[2], int) and bool(args[2] & WRITES)
            if changes and str(directory) in str(args[0]):
                tick()

        def flush(handle):
            tick()
            fsync(handle)

        os.fsync = flush
        sys.addaudithook(hook)
        call("sft", given)
        os.write(writer, str(count).encode())

    code = wait(child(action))
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    assert code == (-9 if moment is not None else 0)
    return int(said) if said else None


@pytest.mark.parametrize("kind", [{}, {"use_peft": "false"}], ids=["lora", "full"])
def test_kill_at_any_moment(kind, flags, whole, tmp_path):
    """A run that saves every step: killed anywhere, its newest checkpoint loads, everything
    unfinished has tmp in its path, and the run goes on to the very same end."""
    more = dict(save_steps=1, save_total_limit=2, max_steps=4, **kind)
    expected = whole("sft", max_steps=4, **kind)
    given = flags("sft", tmp_path / "count", **more)
    moments = run_until(given, tmp_path / "count", None)
    assert moments > 80
    seen, rng = set(), random.Random(len(kind))
    for moment in sorted(rng.sample(range(moments), 20)):
        directory = tmp_path / f"at-{moment}"
        given = flags("sft", directory, **more)
        run_until(given, directory, moment)
        names = sorted(p.name for p in directory.glob("checkpoint-*")) if directory.exists() else []
        for name in names:  # whole
            assert load_file(directory / name / "state.safetensors")
            assert json.loads((directory / name / "state.json").read_text())
            assert tensors(directory / name)
            assert (directory / name / "tokenizer.json").exists()
        assert len(names) <= 3
        seen.update(names)
        if (directory / "run.json").exists():
            continue  # killed after the end
        call("sft", given | LAST)
        assert metrics(directory) == expected[0] and tensors(directory) == expected[1]
        assert tops(directory) == ["checkpoint-2", "checkpoint-3"]  # nothing unfinished is left
    assert {"checkpoint-1", "checkpoint-2", "checkpoint-3"} <= seen


def test_kill_at_any_time(flags, whole, tmp_path):
    """By the clock, which finds the moments inside safetensors' own writing too."""
    rng = random.Random(5)
    more = dict(save_steps=1, max_steps=8, dataset_name=flags("dpo", "")["dataset_name"])
    for i in range(6):
        given = flags("dpo", tmp_path / str(i), **more)
        for _ in range(2):  # and the continuation, too
            pid = child(lambda given=given: call("dpo", given | LAST))
            time.sleep(0.1 + rng.random() * 0.5)
            os.kill(pid, signal.SIGKILL)
            wait(pid)
        if not (tmp_path / str(i) / "run.json").exists():
            call("dpo", given | LAST)
        assert (metrics(tmp_path / str(i)), tensors(tmp_path / str(i))) == whole("dpo")


# ------------------------------------------------------------------------------------- resuming


def test_save_total_limit(flags, tmp_path, monkeypatch):
    call("sft", flags("sft", tmp_path / "run", save_steps=2, save_total_limit=2))
    assert tops(tmp_path / "run") == ["checkpoint-4", "checkpoint-6"]
    call("sft", flags("sft", tmp_path / "all", save_steps=2))
    assert tops(tmp_path / "all") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    call("sft", flags("sft", tmp_path / "many", save_steps=1, save_total_limit=5))
    assert tops(tmp_path / "many") == [f"checkpoint-{i}" for i in range(3, 8)]
    given = flags("sft", tmp_path / "stop", save_steps=1, save_total_limit=1)
    stopped(monkeypatch, 5, "sft", given | {"save_steps": 2})
    assert tops(tmp_path / "stop") == ["checkpoint-5"]


def test_the_limit_never_spares_a_damaged_checkpoint_for_a_good_one(
    flags, halfway, tmp_path, monkeypatch
):
    directory = shutil.copytree(halfway, tmp_path / "run")
    cut("state.json", 5)(directory / "checkpoint-4")
    given = flags("sft", directory, save_steps=1, save_total_limit=1, **LAST)
    for step in (3, 4):
        stopped(monkeypatch, step, "sft", given)
        assert json.loads((directory / f"checkpoint-{step}" / "state.json").read_text())
        assert tops(directory) == sorted({f"checkpoint-{step}", "checkpoint-4"})


@pytest.mark.parametrize("where", ["missing", "empty", "explicit", "explicit, empty"])
def test_no_checkpoint_yet(where, flags, whole, tmp_path, capsys):
    named = tmp_path / ("other" if "explicit" in where else "run")
    if "empty" in where:
        named.mkdir()
    which = named if "explicit" in where else "last"
    call("sft", flags("sft", tmp_path / "run", resume_from_checkpoint=which))
    assert f"{named}: no checkpoint yet; starting at step 0" in capsys.readouterr().out
    assert (metrics(tmp_path / "run"), tensors(tmp_path / "run")) == whole("sft")


def test_the_flag_without_a_value_means_the_newest(flags):
    cfg = parse(SFTConfig, [*argv(flags("sft", "o")), "--resume_from_checkpoint"], {})
    assert cfg.resume_from_checkpoint == "last"


def test_from_a_given_checkpoint(flags, whole, tmp_path, monkeypatch, capsys):
    """The one, or the newest of a directory, into another output directory or its own."""
    first = tmp_path / "first"
    stopped(monkeypatch, 7, "sft", flags("sft", first, save_steps=2))
    for number, (which, said) in enumerate(
        [(first / "checkpoint-4", "checkpoint-4"), (first, "checkpoint-7")]
    ):
        given = flags("sft", tmp_path / str(number), resume_from_checkpoint=which, save_steps=2)
        call("sft", given)
        assert f"going on from {first / said}" in capsys.readouterr().out
        assert tensors(tmp_path / str(number)) == whole("sft")[1]
    before = files(first / "checkpoint-2")
    given = flags("sft", first, resume_from_checkpoint=first / "checkpoint-2", save_steps=2)
    call("sft", given)
    assert (metrics(first), tensors(first)) == whole("sft") and tops(first)[1:] == [
        "checkpoint-4", "checkpoint-6", "checkpoint-7"
    ]  # fmt: skip
    assert files(first / "checkpoint-2") == before
    with pytest.raises(InputError, match="checkpoint-5: damaged: .*No such file"):
        call("sft", given | {"resume_from_checkpoint": first / "checkpoint-5"})
    with pytest.raises(InputError, match="not empty"):  # a slip of the pen starts nothing anew
        call("sft", given | {"resume_from_checkpoint": tmp_path / "frist"})
    assert (first / "run.json").exists()
    stopped(monkeypatch, 4, "sft", given)  # it goes on from its second step, and so is not finished
    assert not (first / "run.json").exists()


def test_a_finished_run(flags, data, model_dir, tmp_path, capsys):
    """It is known by its flags, its data and its base, like one that is not finished."""
    directory, rows, base = tmp_path / "run", tmp_path / "rows.jsonl", tmp_path / "base"
    shutil.copy(data / "sft.jsonl", rows)
    shutil.copytree(model_dir, base)
    given = flags("sft", directory, dataset_name=rows, model_name_or_path=base)
    call("sft", given)
    before = files(directory)
    for which in ("last", directory, directory / ".." / "run"):
        call("sft", given | {"resume_from_checkpoint": which})
        assert "this run is finished; nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="another run, which is finished: --max_steps was 8, is 9"):
        call("sft", given | LAST | {"max_steps": 9})
    rows.write_text(rows.read_text().replace("France", "Spain", 1))
    with pytest.raises(InputError, match="another run, which is finished: other data$"):
        call("sft", given | LAST)
    shutil.copy(data / "sft.jsonl", rows)
    shutil.rmtree(base)
    shutil.move(other_base(model_dir, tmp_path / "other"), base)
    with pytest.raises(InputError, match="another run, which is finished: other base$"):
        call("sft", given | LAST)
    shutil.rmtree(base)
    shutil.copytree(model_dir, base)
    assert files(directory) == before
    tmp_path = directory
    for broken in ("{", "[]", "{}", '{"flags": 3}'):
        (tmp_path / "run.json").write_text(broken)
        with pytest.raises(InputError, match="run.json: damaged"):
            call("sft", given | LAST)


def test_a_run_goes_on_at_weights_and_biases(flags, tmp_path, monkeypatch, capsys):
    """Under its name there, which a new run in the same directory does not take over. Without a key
    or a network it is one line, and the run goes on without."""
    begun, reported = [], []

    def init(**given):
        begun.append(given)
        return SimpleNamespace(log=lambda numbers, step: reported.append(step), finish=lambda: None)

    wandb = SimpleNamespace(init=init, Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    given = flags("sft", tmp_path, report_to="wandb", eval_steps=None)
    stopped(monkeypatch, 4, "sft", given)
    call("sft", given | LAST)
    call("sft", given | {"overwrite_output_dir": "true"})
    ids = [how["id"] for how in begun]
    assert ids[0] == ids[1] != ids[2] and {how["resume"] for how in begun} == {"allow"}
    assert begun[0]["config"]["learning_rate"] == 1e-2
    assert reported == [3, 6, 8, 8, 3, 6, 8, 8]

    def no_key(**given):
        raise wandb.Error("api_key not configured (no-tty).\ncall wandb.login(key=...)")

    wandb.init = no_key
    capsys.readouterr()
    call("sft", given | {"overwrite_output_dir": "true"})
    said = capsys.readouterr().out
    assert "--report_to wandb: api_key not configured (no-tty). call wandb.login(key" in said


@pytest.fixture(scope="module")
def halfway(flags, tmp_path_factory):
    """A run that has checkpoints 2 and 4, and was stopped."""
    directory = tmp_path_factory.mktemp("halfway")
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 4, "sft", flags("sft", directory, save_steps=2))
    assert tops(directory) == ["checkpoint-2", "checkpoint-4"]
    return directory


def other_base(model_dir, tmp_path):
    base = shutil.copytree(model_dir, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def test_another_run_is_refused(flags, halfway, data, model_dir, tmp_path):
    """Each difference is named, and the directory is as it was."""
    fewer = tmp_path / "sft.jsonl"
    fewer.write_text("".join((data / "sft.jsonl").read_text().splitlines(True)[:-1]))
    base = other_base(model_dir, tmp_path)
    given, before = flags("sft", halfway, **LAST), files(halfway)
    for changes, words in (
        ({"learning_rate": 2e-2}, ["--learning_rate was 0.01, is 0.02"]),
        ({"seed": 1, "lora_r": 5}, ["--lora_r was 4, is 5", "--seed was 42, is 1"]),
        ({"max_steps": 9}, ["--max_steps was 8, is 9"]),
        ({"dataset_name": fewer}, ["--dataset_name was", "other data"]),
        ({"model_name_or_path": base}, ["--model_name_or_path was", "other base"]),
        ({"neftune_noise_alpha": 6}, ["--neftune_noise_alpha was 5.0, is 6.0"]),
    ):
        with pytest.raises(InputError, match="checkpoint-4: a checkpoint of another run") as error:
            call("sft", given | changes)
        assert all(word in str(error.value) for word in words)
    assert files(halfway) == before


def test_data_and_base_are_known_by_what_they_hold(flags, halfway, data, model_dir, tmp_path):
    """The same names with other contents: a row changed, a weight changed."""
    directory = shutil.copytree(halfway, tmp_path / "run")
    rows = tmp_path / "rows.jsonl"
    rows.write_text((data / "sft.jsonl").read_text())
    base = shutil.copytree(model_dir, tmp_path / "model")
    given = flags("sft", directory, dataset_name=rows, model_name_or_path=base, **LAST)
    for path in directory.glob("checkpoint-*/state.json"):
        text = json.loads(path.read_text())
        text["fingerprint"]["flags"] |= {
            "dataset_name": [str(rows)], "model_name_or_path": str(base)
        }  # fmt: skip
        path.write_text(json.dumps(text))
    rows.write_text(rows.read_text().replace("France", "Spain", 1))
    with pytest.raises(InputError, match="another run: other data$"):
        call("sft", given)
    rows.write_text((data / "sft.jsonl").read_text())
    shutil.rmtree(base)
    shutil.move(other_base(model_dir, tmp_path), base)
    with pytest.raises(InputError, match="another run: other base$"):
        call("sft", given)
    shutil.rmtree(base)
    shutil.copytree(model_dir, base)
    call("sft", given)


def test_the_fingerprint_of_weights_is_exact_in_any_order():
    """Whatever the number of threads that sum, and in every dtype that a model may hold."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, 1000)
    model.weight.data = (5 * torch.randn(1000, 1000)).exp()  # sums of floats have to round
    for number, tensor in enumerate((
        torch.tensor(0.5), torch.zeros(0), torch.rand(5, 6).T, torch.rand(9) < 0.5,
        torch.rand(9).bfloat16(), torch.rand(9).to(torch.float8_e4m3fn), torch.arange(9).byte(),
        torch.rand(9).double(), torch.arange(9).to(torch.int8), torch.tensor(True),
    )):  # fmt: skip
        model.register_buffer(f"buffer{number}", tensor)
    seen, threads = [], torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        seen.append(weights_fingerprint(model))
    torch.set_num_threads(threads)
    assert seen[0] == seen[1] == seen[2]
    for tensor in list(model.state_dict().values()):
        if tensor.numel():
            first = tensor[(0,) * tensor.dim()].reshape(1)
            first.view(torch.uint8)[0] ^= 1  # its least bit
            seen.append(weights_fingerprint(model))
    assert len({str(values) for values in seen}) == 1 + 2 + 9


def test_data_are_hashed_once(flags, tmp_path, monkeypatch):
    real, calls = nanoalign.run.checkpoint.data_fingerprint, []

    def counted(examples):
        calls.append(len(examples))
        return real(examples)

    monkeypatch.setattr(nanoalign.run.checkpoint, "data_fingerprint", counted)
    call("sft", flags("sft", tmp_path))
    assert calls == [11, 11]  # what it trains on, and what it evaluates on
    sha = json.loads((tmp_path / "run.json").read_text())["data_sha256"]
    assert len(sha) == 64


def test_what_may_change(flags, halfway, whole, tmp_path):
    directory = shutil.copytree(halfway, tmp_path / "run")
    call("sft", flags("sft", directory, save_steps=3, logging_first_step="true", **LAST))
    assert tensors(directory) == whole("sft")[1]


def cut(name, length):
    def damage(path):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[: length if length >= 0 else len(whole) + length])

    return damage


def strange_key(path):
    tensors = load_file(path / "state.safetensors")
    name = next(name for name in tensors if name.startswith("exp_avg."))
    save_file(tensors | {f"{name}.more": tensors[name].clone()}, path / "state.safetensors")


DAMAGE = {
    "empty tensors": cut("state.safetensors", 0),
    "cut header": cut("state.safetensors", 100),
    "cut tensors": cut("state.safetensors", -1),
    "no tensors": lambda path: (path / "state.safetensors").unlink(),
    "noise": lambda path: (path / "state.safetensors").write_bytes(b"\x80" * 999),
    "tensor gone": lambda path: save_file({"a": torch.zeros(1)}, path / "state.safetensors"),
    "a moment of nothing": strange_key,
    "empty json": cut("state.json", 0),
    "cut json": cut("state.json", -20),
    "no json": lambda path: (path / "state.json").unlink(),
    "bytes": lambda path: (path / "state.json").write_bytes(b"\xff\xfe"),
    "a list": lambda path: (path / "state.json").write_text("[]"),
    "no step": lambda path: change(path / "state.json", step=...),
    "a word for a step": lambda path: change(path / "state.json", step="4"),
    "no fingerprint": lambda path: change(path / "state.json", fingerprint=...),
    "odd fingerprint": lambda path: change(path / "state.json", fingerprint={"flags": []}),
    "nothing": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint(damage, flags, halfway, whole, tmp_path, capsys):
    """It is named and the one before it taken; refused where there is none."""
    directory = shutil.copytree(halfway, tmp_path / "run")
    damage(directory / "checkpoint-4")
    given = flags("sft", directory, save_steps=2, **LAST)
    with pytest.raises(InputError, match="checkpoint-4: damaged: .") as error:  # asked for
        call("sft", given | {"resume_from_checkpoint": directory / "checkpoint-4"})
    assert "\n" not in str(error.value)
    alone = shutil.copytree(directory, tmp_path / "alone")
    shutil.rmtree(alone / "checkpoint-2")
    before = files(alone)
    with pytest.raises(InputError, match="checkpoint-4: damaged: ."):
        call("sft", given | {"output_dir": alone})
    assert files(alone) == before
    capsys.readouterr()
    call("sft", given)
    said = capsys.readouterr().out
    assert f"{directory / 'checkpoint-4'}: damaged: " in said
    assert "taking the checkpoint before it" in said
    assert f"going on from {directory / 'checkpoint-2'}" in said
    assert (metrics(directory), tensors(directory)) == whole("sft")


def test_no_pickle(flags, halfway, tmp_path, monkeypatch):
    """Not imported, not named, not called; nor is there one in a checkpoint."""
    for path in [*(ROOT / "nanoalign").rglob("*.py"), *ROOT.glob("train_*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
                assert ast.unparse(node) not in ("torch.load", "torch.save", "np.load"), path
    suffixes = {p.suffix for p in halfway.rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl", ".jinja"}

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    directory = shutil.copytree(halfway, tmp_path / "run")
    call("sft", flags("sft", directory, **LAST))


# ------------------------------------------------------------------------------------- full disks


@pytest.fixture
def room():
    """room(bytes): from now on no file of this process may grow beyond that."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    limit(hard)


@pytest.mark.parametrize(
    "size, step, more, words",
    [
        (1000, 4, {}, "checkpoint-4: not saved: .*File too large"),  # safetensors' own error
        (8000, 4, {"lora_r": 1}, "checkpoint-4: not saved: .*File too large.*its weights are in"),
        (10000, 4, {"lora_r": 1}, "checkpoint-4: not saved: .*File too large.*its weights are in"),
        (100, 3, {}, "metrics.jsonl: not saved: File too large"),
        (1000, 8, {}, "run: not saved: .*File too large"),  # the adapter at the end
        (1000, 4, {"use_peft": "false"}, "checkpoint-4: not saved: .*File too large"),
    ],
)
def test_a_full_disk(size, step, more, words, flags, whole, tmp_path, room, monkeypatch, capsys):
    """One clear error; older checkpoints are kept; with room again the run goes on."""
    directory = tmp_path / "run"
    given = flags("sft", directory, save_steps=2, **more)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: room(size))
        with pytest.raises(InputError, match=words) as error:
            call("sft", given)
    room(resource.RLIM_INFINITY)
    assert ("older checkpoints are kept" in str(error.value)) == ("metrics" not in words)
    assert "\n" not in str(error.value)
    last = (step - 1) // 2 * 2
    if "its weights are in" in words:  # tokenizers, or the state, failed when they were whole
        place = directory / "rescued-checkpoint-4"
        assert f"its weights are in {place}; older" in str(error.value)
        load_file(place / "adapter_model.safetensors")
    assert tops(directory) == [f"checkpoint-{i}" for i in range(2, last + 1, 2)]
    assert not (directory / "run.json").exists()
    capsys.readouterr()
    call("sft", given | LAST)
    assert f"going on from {directory / f'checkpoint-{last}'}" in capsys.readouterr().out
    assert (metrics(directory), tensors(directory)) == whole("sft", **more)


def test_what_can_not_be_written(flags, tmp_path, monkeypatch):
    """No permission to rename."""
    real = os.rename

    def denied(source, target):
        if str(target).endswith("checkpoint-4"):
            raise PermissionError(13, "Permission denied")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", denied)
        with pytest.raises(InputError, match="checkpoint-4: not saved: Permission denied"):
            call("sft", flags("sft", tmp_path / "a", save_steps=2))
    assert tops(tmp_path / "a") == ["checkpoint-2"]


def refused_sync(monkeypatch):
    """A file system that can flush no directory."""
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def with_templates(tokenizer):
    tokenizer.chat_template = {"default": ChatML.jinja, "tool_use": ChatML.jinja}


def with_temperature(directory):
    config = {"temperature": 0.9, "top_p": 0.6}
    (directory / "generation_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("full", [{}, {"use_peft": "false"}], ids=["lora", "full"])
def test_what_some_models_and_disks_have(full, flags, model_dir, tmp_path, monkeypatch):
    """Named templates, sampling without do_sample, directories that can't be flushed: all is saved,
    by checkpoints, at the end and by a merge."""
    base = shutil.copytree(model_dir, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    with_templates(tokenizer)
    tokenizer.save_pretrained(base)
    with_temperature(base)
    refused_sync(monkeypatch)
    given = flags("sft", tmp_path / "run", model_name_or_path=base, save_steps=4, **full)
    call("sft", given | {"chat_template": "native"})
    places = ["run", "run/checkpoint-4"]
    if not full:
        merge.main([str(tmp_path / "run"), str(tmp_path / "merged")])
        places.append("merged")
    for place in [tmp_path / place for place in places]:
        assert (place / "additional_chat_templates" / "tool_use.jinja").exists()
        assert AutoTokenizer.from_pretrained(place).chat_template.keys() == {"default", "tool_use"}
        if full or place.name == "merged":
            generation = GenerationConfig.from_pretrained(place)
            assert (generation.temperature, generation.top_p) == (0.9, 0.6)
            assert generation.do_sample and generation.eos_token_id


@pytest.mark.parametrize("full", [{}, {"use_peft": "false"}], ids=["lora", "full"])
def test_what_can_not_be_saved_is_known_before_step_1(full, flags, tmp_path, monkeypatch):
    """And nothing has been touched; a merge is refused in the same way."""
    call("sft", flags("sft", tmp_path / "run", **full))
    before = files(tmp_path)

    def broken(*given, **more):
        raise AttributeError("'dict' object has no\nattribute 'replace'")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", broken)
    monkeypatch.setattr(nanoalign.train, "optimizer_step", None)
    words = ": the result can't be saved there: 'dict' object has no attribute 'replace'$"
    for name in ("new", "run"):
        given = flags("sft", tmp_path / name, overwrite_output_dir="true", **full)
        with pytest.raises(InputError, match=name + words):
            call("sft", given)
    with pytest.raises(InputError, match="its path is not UTF-8"):
        call("sft", flags("sft", os.fsdecode(bytes(tmp_path) + b"/\xff\xfe"), **full))
    if not full:
        with pytest.raises(SystemExit):
            merge.main([str(tmp_path / "run"), str(tmp_path / "merged")])
    assert files(tmp_path) == before


@pytest.mark.parametrize("full", [{}, {"use_peft": "false"}], ids=["lora", "full"])
@pytest.mark.parametrize("what", ["tokenizer", "disk", "fault"])
def test_a_last_save_that_fails_leaves_the_weights(
    what, full, flags, whole, tmp_path, monkeypatch, capsys
):
    """In the directory if they got there, else among the temporary files; the run that goes on does
    not take them away."""
    given, spare = flags("sft", tmp_path / "run", save_steps=4, **full), tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    real = safetensors.torch.save_file

    def broken(tensors, path, **more):
        if "final" not in str(path):
            return real(tensors, path, **more)
        if what == "fault":
            raise RuntimeError("a fault of ours")
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    def no_room(tokenizer, place, real=PreTrainedTokenizerFast.save_pretrained):
        if "final" in str(place):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tokenizer, place)

    with monkeypatch.context() as patch:
        if what == "tokenizer":
            patch.setattr(PreTrainedTokenizerFast, "save_pretrained", no_room)
        else:
            patch.setattr(nanoalign.formats.peft, "save_file", broken)
            patch.setattr("transformers.modeling_utils.safe_save_file", broken)
        with pytest.raises(RuntimeError if what == "fault" else InputError) as error:
            call("sft", given)
    said = capsys.readouterr().out if what == "fault" else str(error.value)
    place = Path(re.search("its weights are in (.*?); older checkpoints are kept", said)[1])
    assert place.parent == (tmp_path / "run" if what == "tokenizer" else spare)
    expected = whole("sft", **full)
    assert tensors(place) == expected[1] and not (tmp_path / "run" / "run.json").exists()
    call("sft", given | LAST)
    assert (metrics(tmp_path / "run"), tensors(tmp_path / "run")) == expected
    assert tensors(place) == expected[1] and tops(tmp_path / "run") == ["checkpoint-4"]


def test_an_error_costs_no_step(flags, tmp_path, monkeypatch):
    """Of a method of one's own, say."""

    def fault():
        raise ZeroDivisionError

    at_step(monkeypatch, 4, fault)
    with pytest.raises(ZeroDivisionError):
        call("sft", flags("sft", tmp_path))
    assert tops(tmp_path) == ["checkpoint-3"]


def test_a_terminal_that_is_gone_costs_no_step(flags, tmp_path):
    given = flags("sft", tmp_path / "run", eval_steps=None)

    def action():
        at_step(pytest.MonkeyPatch(), 3, no_reader)
        with pytest.raises(BrokenPipeError):
            call("sft", given)
        sys.stdout = sys.stderr

    assert wait(child(action)) == 0 and tops(tmp_path / "run") == ["checkpoint-3"]


def test_a_line_of_metrics_that_can_not_be_written_costs_no_step(flags, tmp_path, monkeypatch):
    """The last weights too are saved, though the line comes before them."""
    for step in (3, 8):
        given = flags("sft", tmp_path / str(step), eval_steps=None)

        def broken(log, line, step=step):
            if line["step"] == step:
                raise InputError("metrics.jsonl: not saved: No space left on device")

        with monkeypatch.context() as patch, pytest.raises(InputError, match="metrics.jsonl"):
            patch.setattr(Log, "line", broken)
            call("sft", given)
        assert tops(tmp_path / str(step)) == (["checkpoint-3"] if step == 3 else [])
        assert (tmp_path / str(step) / "run.json").exists() == (step == 8)


# ------------------------------------------------------------------------ an earlier run's result


@pytest.mark.parametrize("before, after", [("lora", "full"), ("full", "lora")])
def test_an_earlier_result_stands_until_the_new_one_does(before, after, flags, whole, tmp_path):
    """Killed at any moment that is there, whole, or the new one is; at the end nothing of it is,
    and so nothing that another tool would open in the place of the new one."""
    kinds = {"lora": {}, "full": {"use_peft": "false"}}
    call("sft", flags("sft", tmp_path / "old", save_steps=4, **kinds[before]))
    more = dict(max_steps=2, eval_dataset=None, eval_steps=None)
    new = flags("sft", tmp_path / "run", overwrite_output_dir="true", **more, **kinds[after])

    def action(moment):
        def run():
            real, count = os.replace, 0

            def replace(source, target):
                nonlocal count
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                real(source, target)

            os.replace = replace
            call("sft", new)

        return run

    results, codes = [whole("sft", **kinds[before])[1]], []
    shutil.copytree(tmp_path / "old", tmp_path / "run")
    call("sft", new)
    results.append(tensors(tmp_path / "run"))
    for moment in range(0, 40, 5):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "old", tmp_path / "run")
        codes.append(wait(child(action(moment))))
        places = [path.parent for path in (tmp_path / "run").glob("**/*model.safetensors")]
        assert any(tensors(place) in results for place in places)
        call("sft", new)
        assert tensors(tmp_path / "run") == results[1] and tops(tmp_path / "run") == []
        left = {path.name for path in (tmp_path / "run").iterdir()}
        adapter, model = {"adapter_config.json", "adapter_model.safetensors"}, {"model.safetensors"}
        assert left & (adapter | model) == (adapter if after == "lora" else model)
        assert "previous-result" not in left
    assert codes.count(-9) > 3 and codes[-1] == 0


def test_a_link_to_its_own_checkpoint(flags, whole, tmp_path, monkeypatch):
    """It is one of this run, and not another's to be cleared away."""
    given = flags("sft", tmp_path / "run", save_steps=2)
    stopped(monkeypatch, 5, "sft", given)
    (tmp_path / "best").symlink_to(tmp_path / "run" / "checkpoint-4")
    for more in ({}, {"overwrite_output_dir": "true"}):
        directory = tmp_path / "best"
        call("sft", given | {"resume_from_checkpoint": directory} | more)
        assert tops(tmp_path / "run")[:2] == ["checkpoint-2", "checkpoint-4"]
        assert (metrics(tmp_path / "run"), tensors(tmp_path / "run")) == whole("sft")


# ------------------------------------------------------------------------------------- other runs


def test_two_runs_do_not_share_a_directory(flags, tmp_path):
    """And one that is killed blocks nobody."""
    given, reader = flags("sft", tmp_path / "run", save_steps=1), tmp_path / "said"

    def action():
        def stay():
            reader.write_text("here")
            time.sleep(600)

        real = nanoalign.train.learning_rate

        def rate(cfg, now, total):
            if now == 3:
                stay()
            return real(cfg, now, total)

        nanoalign.train.learning_rate = rate
        call("sft", given)

    pid = child(action)
    while not reader.exists():
        time.sleep(0.05)
    before = files(tmp_path / "run")
    for more in (LAST, {"overwrite_output_dir": "true"}):
        with pytest.raises(InputError, match="run: another run is at work there$"):
            call("sft", given | more)
    assert files(tmp_path / "run") == before
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    call("sft", given | LAST)
    assert tops(tmp_path / "run") == [f"checkpoint-{i}" for i in range(1, 8)]


def test_a_checkpoint_of_an_older_version(flags, halfway, whole, tmp_path):
    """A flag that it does not know had its default, and what it does not know of where a run stands
    is as it was at the start."""
    directory = shutil.copytree(halfway, tmp_path / "run")
    for path in directory.glob("checkpoint-*/state.json"):
        text = json.loads(path.read_text())
        del text["fingerprint"]["flags"]["neftune_noise_alpha"], text["skipped"]
        del text["fingerprint"]["flags"]["adam_beta1"], text["fingerprint"]["optimizer"]
        path.write_text(json.dumps(text))
    given = flags("sft", directory, save_steps=2, **LAST)
    with pytest.raises(InputError, match="another run: --neftune_noise_alpha was 0.0, is 5.0$"):
        call("sft", given)
    for path in directory.glob("checkpoint-*/state.json"):
        text = json.loads(path.read_text())
        text["fingerprint"]["flags"]["neftune_noise_alpha"] = 5.0
        path.write_text(json.dumps(text))
    call("sft", given)
    assert (metrics(directory), tensors(directory)) == whole("sft")


def test_all_ranks_wait_for_what_is_being_saved(flags, tmp_path, monkeypatch):
    """torchrun ends rank 0 half a minute after another has failed."""
    order, real = [], nanoalign.run.record.write_whole

    def noted(target, *given, **more):
        real(target, *given, **more)
        order.append(target.name)

    monkeypatch.setattr(nanoalign.run.record, "write_whole", noted)
    monkeypatch.setattr(nanoalign.run.record.ranks, "wait", lambda: order.append("wait"))
    call("sft", flags("sft", tmp_path / "run", save_steps=4))
    assert order == ["wait", "checkpoint-4", "wait", "run", "wait"]


def test_where_a_directory_can_not_be_opened(tmp_path, monkeypatch):
    """On Windows; nor can what is open for reading be flushed there."""

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    windows = vars(os) | {"name": "nt", "open": denied, "fsync": denied}
    monkeypatch.setattr(nanoalign.run.files, "os", SimpleNamespace(**windows))
    write_whole(tmp_path / "whole", lambda beside: (beside / "file").write_text("x"))
    assert files(tmp_path) == {"whole": None, "whole/file": b"x"}


def test_faults_of_ours_are_not_taken_for_a_full_disk(flags, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(nanoalign.run.record, "save_state", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        call("sft", flags("sft", tmp_path, save_steps=2))


# ---------------------------------------------------------------------------------------- numbers

LOSSES = {"sft": (train_sft, "sft_loss"), "dpo": (train_dpo, "dpo_loss")}
LOSSES["kto"] = train_kto, "kto_loss"


class BadGradient(torch.autograd.Function):
    """A number that is fine, and a gradient that is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


BAD = {
    "nan": lambda x: x * torch.nan,
    "inf": lambda x: x + torch.inf,
    "gradient": BadGradient.apply,
}


def poison(monkeypatch, method, calls, how="nan"):
    """The calls-th losses, counted from 1, go bad; there are two a step, but for evaluations."""
    module, name = LOSSES[method]
    real, count = getattr(module, name), 0

    def bad(*args, **more):
        nonlocal count
        out = real(*args, **more)
        count += torch.is_grad_enabled()
        if not torch.is_grad_enabled() or count not in calls:
            return out
        first, *rest = out if isinstance(out, tuple) else (out,)
        return (BAD[how](first), *rest) if rest else BAD[how](first)

    monkeypatch.setattr(module, name, bad)


@ALL
@pytest.mark.parametrize("how", BAD)
def test_what_is_not_finite_stops_the_run(method, how, flags, data, tmp_path, monkeypatch):
    """At that step, naming its rows; the good checkpoints are as they were."""
    given = flags(method, tmp_path / "run", save_steps=1, shuffle_dataset="false")
    poison(monkeypatch, method, {6}, how)  # the second micro-batch of step 3: rows 9 to 11
    seen = {}

    def look():
        seen.update(files(tmp_path / "run"))
        del seen["tmp-lock"]

    at_step(monkeypatch, 3, look)
    with pytest.raises(InputError) as error:
        call(method, given)
    rows = ", ".join(f"{data / method}.jsonl, line {i}" for i in (9, 10, 11))
    assert str(error.value) == f"step 3: loss or gradient is not finite; its rows: {rows}"
    assert tops(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]
    now = files(tmp_path / "run")
    assert all(now[name] == content for name, content in seen.items())
    assert now.keys() == seen.keys() and "adapter_model.safetensors" not in now


def test_the_steps_before_are_saved_and_the_cure_may_be_taken(flags, tmp_path, monkeypatch, capsys):
    """No checkpoint was due. What helps against numbers that are not finite, and against a lack of
    memory, may change when the run goes on; the bad step counts once."""
    given = flags("sft", tmp_path, save_steps=0)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="step 3: loss or"):
        poison(patch, "sft", {6})
        call("sft", given)
    assert tops(tmp_path) == ["checkpoint-2"]
    assert "saved in checkpoint-2; --resume_from_checkpoint goes on" in capsys.readouterr().out
    cure = dict(skip_nonfinite=1, max_row_tokens=40, gradient_checkpointing="true")
    poison(monkeypatch, "sft", {1})
    call("sft", given | LAST | cure)
    said = capsys.readouterr().out
    assert "going on from" in said and "step 3: loss" in said and "; skipped, 1 of 1" in said


def test_a_line_names_a_few_rows_and_says_how_many_more(flags, tmp_path, monkeypatch):
    poison(monkeypatch, "sft", {1})
    with pytest.raises(InputError, match="its rows: .*, and 3 more$") as error:
        call("sft", flags("sft", tmp_path, per_device_train_batch_size=11))
    assert str(error.value).count(", line ") == 8


@ALL
def test_an_evaluation_that_is_not_finite(method, flags, tmp_path, monkeypatch, capsys):
    """It is said, and metrics.jsonl stays JSON; the run goes on."""
    module, name = LOSSES[method]
    real = getattr(module, name)

    def bad(*args, **more):
        out = real(*args, **more)
        if torch.is_grad_enabled():
            return out
        return (out[0] * torch.nan, *out[1:]) if isinstance(out, tuple) else out * torch.nan

    monkeypatch.setattr(module, name, bad)
    call(method, flags(method, tmp_path))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 3, 6, 6, 8, 8]
    assert not any("eval_loss" in line for line in lines)
    assert "step 6: not finite: eval_loss\n" in capsys.readouterr().out


@ALL
def test_skip_nonfinite(method, flags, tmp_path, monkeypatch, capsys):
    """Two are tolerated, also when the run is resumed in between; each is reported. Nothing but
    the step is lost: no weight, no moment, no line of metrics."""
    given = flags(method, tmp_path / "run", save_steps=1, skip_nonfinite=2, logging_steps=1)
    with monkeypatch.context() as patch:
        poison(patch, method, {3})
        stopped(patch, 4, method, given)
    said = capsys.readouterr().out
    assert "step 2: loss or gradient is not finite; its rows: " in said
    assert "; skipped, 1 of 2" in said
    for name in ("weight", "exp_avg"):
        states = [
            load_file(tmp_path / "run" / f"checkpoint-{i}" / "state.safetensors") for i in (1, 2, 3)
        ]
        keys = [key for key in states[0] if key.startswith(name)]
        assert keys and all(torch.equal(states[0][key], states[1][key]) for key in keys)
        assert not all(torch.equal(states[1][key], states[2][key]) for key in keys)
    with monkeypatch.context() as patch:
        poison(patch, method, {1})
        stopped(patch, 6, method, given | LAST)
        assert "; skipped, 2 of 2" in capsys.readouterr().out
    lines = {line["step"]: line for line in metrics(tmp_path / "run") if "learning_rate" in line}
    assert list(lines) == [1, 2, 3, 4, 5, 6] and "loss" in lines[1]
    assert all("loss" not in lines[i] and "grad_norm" not in lines[i] for i in (2, 5))
    poison(monkeypatch, method, {1})
    with pytest.raises(InputError, match="step 7: loss or gradient is not finite; its rows: "):
        call(method, given | LAST)
    assert tops(tmp_path / "run")[-1] == "checkpoint-6"


def test_a_run_of_skipped_steps_changes_nothing(flags, tmp_path, monkeypatch):
    poison(monkeypatch, "sft", set(range(99)))
    call("sft", flags("sft", tmp_path, skip_nonfinite=8))
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert not any(t.any() for name, t in adapter.items() if "lora_B" in name)
