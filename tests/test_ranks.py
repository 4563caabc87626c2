"""Two processes against one: the same steps, the same lines, the same weights."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, tiny
from safetensors.torch import load_file
from scripts import ROOT, argv, call, metrics, tensors
from transformers import LlamaConfig, LlamaForCausalLM

from nanoalign.run import ranks

PATIENCE = 400  # seconds, for a machine that is busy
METHODS = ["sft", "dpo", "kto"]
LORA = {"lora_r": 4}
FULL = {"use_peft": "false"}
SHARDED = {  # with --fsdp
    "fsdp": {"save_steps": 2, "learning_rate": 2e-4, **FULL},
    "lora-fsdp": {"gradient_checkpointing": "true", **LORA},
    "adapter": {},  # that goes on: its reference is a copy of what trains
    "nf4": {"load_in_4bit": "true", "use_bnb_nested_quant": "true", **LORA},
    "markers": LORA,  # of a base that lacks them: rows of its tables train too
}


def torchrun(home, script, *words, **more):
    """Two processes on this machine, one thread each. What they say goes to the file home/said,
    and their errors to home/errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(ROOT / script), *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    with open(home / "said", "w") as said, open(home / "errors", "w") as errors:
        return subprocess.Popen(command, env=env, stdout=said, stderr=errors, **more)


@pytest.fixture(scope="module")
def flags(model_dir, data):
    """flags(method, directory, **more): steps of 10 of 11 examples, so that each epoch's second
    step has a single one, and one of two ranks none; evaluations in the middle and at the end."""

    def make(method, directory, **more):
        return dict(
            model_name_or_path=model_dir, dataset_name=str(data / f"{method}.jsonl"), device="cpu",
            output_dir=str(directory), learning_rate=1e-3, max_steps=4, logging_steps=1,
            per_device_train_batch_size=5, disable_dropout="true", weight_decay=0.1,
            eval_dataset=str(data / f"{method}.jsonl"), eval_steps=2, warmup_ratio=0.5,
        ) | more  # fmt: skip

    return make


def done(runs, home):
    """Two ranks do the runs."""
    (home / "runs.json").write_text(json.dumps(runs))
    code = torchrun(home, "tests/ranks_worker.py", home / "runs.json").wait(PATIENCE)
    assert code == 0, (home / "errors").read_text()
    return home


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory, no_curves):
    """The directory in which two ranks did all the runs of this file, and one process some."""
    home, runs = tmp_path_factory.mktemp("ranks"), []
    for method in METHODS:
        runs.append((method, flags(method, home / f"{method}-lora", save_steps=2, **LORA)))
        # 8 and then 3 examples, in rows that are cut; and weights of both kinds
        cut = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_row_tokens=40)
        runs.append((method, flags(method, home / f"{method}-full", **cut, **FULL)))
    # With dropout: a run, and the same from its checkpoint on.
    noisy = {"lora_dropout": 0.2, "disable_dropout": "false", "save_steps": 2, **LORA}
    runs.append(("sft", flags("sft", home / "whole", **noisy)))
    again = flags("sft", home / "again", resume_from_checkpoint=str(home / "whole/checkpoint-2"))
    runs.append(("sft", again | noisy))
    # One process begins, two go on.
    alone = flags("dpo", home / "alone", gradient_accumulation_steps=2, save_steps=2, **LORA)
    call("dpo", alone)
    resumed = flags("dpo", home / "more", resume_from_checkpoint=str(home / "alone/checkpoint-2"))
    runs.append(("dpo", resumed | LORA))
    # The first evaluation is the best, if a greater loss is the better one.
    best = dict(load_best_model_at_end="true", greater_is_better="true", save_strategy="no")
    best |= {"per_device_eval_batch_size": 2}
    runs.append(("dpo", flags("dpo", home / "best", **best, **LORA)))
    if ranks.CAN_SHARD:
        runs.append(("sft", flags("sft", home / "best-fsdp", fsdp="true", **best, **FULL)))
    return done(runs, home)


def close(directory, other):
    """The same lines of metrics.jsonl, from where the first of the two began; -> the largest
    difference of their weights."""
    lines, others = metrics(directory), metrics(other)
    assert len(lines) > 2
    # The rows are cut otherwise, so sums are made in another order, and that order is the
    # processor's. A reply's log-prob adds up some ten numbers, each rounded to 2**-24 of what there
    # is so far. kl is a difference of log-probs; rewards, and losses through them, are beta times
    # such differences; and the gradient's norm goes by the loss's slope.
    nats = max([abs(x) for line in others for name, x in line.items() if "logps" in name] + [0])
    error, beta = 16 * nats * 2**-24, 0.1
    for line, theirs in zip(lines, others[-len(lines) :], strict=True):
        assert line.keys() == theirs.keys()
        for name in line:
            bound = 1e-6 + (error if "kl" in name else beta * error)
            assert line[name] == pytest.approx(theirs[name], rel=max(1e-6, bound), abs=bound), name
    file = "adapter_model" if (directory / "adapter_model.safetensors").exists() else "model"
    weights, theirs = (load_file(d / f"{file}.safetensors") for d in (directory, other))
    assert weights.keys() == theirs.keys()
    return max((weights[name] - theirs[name]).abs().max().item() for name in weights)


@pytest.mark.parametrize("method, kind", product(METHODS, ["lora", "full"]))
def test_two_ranks_take_the_steps_of_one_process(method, kind, two, flags, tmp_path, no_curves):
    """Losses, gradient norms, every other metric, the evaluations, and the weights at the end."""
    size = {"lora": (10, 1), "full": (4, 2)}[kind]
    more = dict(per_device_train_batch_size=size[0], gradient_accumulation_steps=size[1])
    more |= LORA if kind == "lora" else FULL | {"max_row_tokens": 40}
    call(method, flags(method, tmp_path, **more))
    assert close(two / f"{method}-{kind}", tmp_path) < 1e-6


def test_a_run_goes_on_bit_for_bit_with_the_dropout_of_each_rank(two):
    assert tensors(two / "again") == tensors(two / "whole")
    assert metrics(two / "again") == metrics(two / "whole")[-3:]  # two steps and an evaluation


@pytest.mark.parametrize("name", ["best", "best-fsdp"])
def test_ranks_decide_together_which_step_is_kept(name, two):
    if name == "best-fsdp" and not ranks.CAN_SHARD:
        pytest.skip("needs torch 2.13")
    losses = [line["eval_loss"] for line in metrics(two / name) if "eval_loss" in line]
    assert losses[0] > losses[1]
    assert json.loads((two / name / "run.json").read_text())["best_step"] == 2
    assert tensors(two / name) == tensors(two / name / "checkpoint-2")


def test_another_number_of_ranks_goes_on_with_a_checkpoint(two, flags, tmp_path, no_curves):
    assert close(two / "more", two / "alone") < 1e-6
    more = dict(per_device_train_batch_size=10, **LORA)
    which = str(two / "dpo-lora/checkpoint-2")
    call("dpo", flags("dpo", tmp_path, resume_from_checkpoint=which, **more))
    assert close(tmp_path, two / "dpo-lora") < 1e-6


def at_step_2(home, method, **given):
    """A run without an end, that has done two steps."""
    process = torchrun(home, f"train_{method}.py", *argv(given | {"max_steps": 10**6}))
    until = time.monotonic() + PATIENCE
    while "\nstep       2/" not in (home / "said").read_text():
        assert process.poll() is None and time.monotonic() < until, (home / "errors").read_text()
        time.sleep(0.1)
    return process


def error_line(home):
    """The only one beside torchrun's own report."""
    text = (home / "errors").read_text()
    (line,) = [line for line in text.splitlines() if "error:" in line]
    return line


def test_a_rank_that_is_killed_ends_the_job(flags, tmp_path):
    process = at_step_2(tmp_path, "dpo", **flags("dpo", tmp_path / "run"))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    assert process.wait(60) != 0
    assert "another process of the job has died" in error_line(tmp_path)


def test_sigterm_to_torchrun_saves_a_checkpoint(flags, tmp_path):
    process = at_step_2(tmp_path, "sft", **flags("sft", tmp_path / "run"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    (checkpoint,) = tmp_path.glob("run/checkpoint-*")
    state = json.loads((checkpoint / "state.json").read_text())
    assert f"stopped after step {state['step']};" in (tmp_path / "said").read_text()
    assert metrics(tmp_path / "run")[-1]["step"] == state["step"] > 1


@pytest.mark.parametrize("fault", ["row", "disk"])
def test_what_ends_a_run_ends_it_with_one_line(fault, flags, data, tmp_path):
    """A bad row is rank 0's to find, and so is a full disk: no file may outgrow 100,000 bytes."""
    given, limit = flags("kto", tmp_path / "run", save_steps=2), None
    if fault == "row":
        given["dataset_name"] = str(tmp_path / "bad.jsonl")
        rows = (data / "kto.jsonl").read_text().splitlines()
        Path(given["dataset_name"]).write_text("\n".join([*rows[:4], '{"prompt": 5}', *rows[4:]]))
    else:

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    process = torchrun(tmp_path, "train_kto.py", *argv(given), preexec_fn=limit)
    assert process.wait(PATIENCE) != 0
    words = {"row": "bad.jsonl, line 5", "disk": "checkpoint-2: not saved: .*File too large"}
    assert re.search(words[fault], error_line(tmp_path))
    assert "exitcode  : 2" in (tmp_path / "errors").read_text()
    assert not list(tmp_path.glob("run/checkpoint-*"))


# ------------------------------------------------------------------------------------------ --fsdp


@pytest.fixture(scope="module")
def parts(flags, tmp_path_factory, no_curves):
    """The directory of the runs of two ranks that have the model together."""
    if not ranks.CAN_SHARD:
        pytest.skip("--fsdp needs a newer torch")
    home, runs = tmp_path_factory.mktemp("parts"), []
    call("dpo", flags("dpo", home / "alone", per_device_train_batch_size=10, **LORA))
    tokenizer = make_tokenizer(special=("<|endoftext|>",))
    size = dict(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.1)
    config = tiny(LlamaConfig, **size)
    torch.manual_seed(0)
    for part in (tokenizer, LlamaForCausalLM(config)):
        part.save_pretrained(home / "unmarked")
    for kind, more in SHARDED.items():
        for method in METHODS:
            given = flags(method, home / f"{method}-{kind}", fsdp="true", **more)
            if kind == "adapter":
                given |= {"adapter_name_or_path": str(home / "alone"), "learning_rate": 5e-4}
            if kind == "markers":
                given |= {"model_name_or_path": str(home / "unmarked")}
            runs.append((method, given))
    full = flags("dpo", home / "whole-again", fsdp="true", **SHARDED["fsdp"])
    runs.append(("dpo", full | {"resume_from_checkpoint": str(home / "dpo-fsdp/checkpoint-2")}))
    half = flags("sft", home / "half", fsdp="true", dtype="bfloat16", **FULL)
    runs.append(("sft", half))
    runs.append(("parts", flags("sft", home / "none", fsdp="true", load_in_4bit="true", lora_r=1)))
    return done(runs, home)


@pytest.mark.parametrize("method, kind", product(METHODS, SHARDED))
def test_a_sharded_model_takes_the_steps_of_a_whole_one(method, kind, parts, flags, tmp_path):
    """Also with a rank that has no example of a step; and the reference of an adapter that goes on
    is the policy at the start: the rewards are those of one process."""
    more = SHARDED[kind] | {"per_device_train_batch_size": 10}
    if kind == "adapter":
        more |= {"adapter_name_or_path": str(parts / "alone"), "learning_rate": 5e-4}
    if kind == "markers":
        more |= {"model_name_or_path": str(parts / "unmarked")}
    call(method, flags(method, tmp_path, **more))
    assert close(parts / f"{method}-{kind}", tmp_path) < 1e-6
    if method != "sft":
        assert abs(metrics(tmp_path)[-1]["eval_rewards/margins"]) > 1e-3


def test_a_checkpoint_of_parts_is_whole(parts, flags, tmp_path):
    """Parts go on from it, and one process does."""
    assert tensors(parts / "whole-again") == tensors(parts / "dpo-fsdp")
    which = str(parts / "dpo-fsdp/checkpoint-2")
    more = SHARDED["fsdp"] | {"per_device_train_batch_size": 10, "resume_from_checkpoint": which}
    call("dpo", flags("dpo", tmp_path, **more))
    assert close(tmp_path, parts / "dpo-fsdp") < 1e-6


def test_parts_compute_in_bfloat16(parts, flags, tmp_path):
    """And train in float32. Only the norms' weights are rounded where autocast would not."""
    more = dict(per_device_train_batch_size=10, dtype="bfloat16", **FULL)
    call("sft", flags("sft", tmp_path, **more))
    for line, theirs in zip(metrics(parts / "half"), metrics(tmp_path), strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            assert line.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=0.02)
    saved = load_file(parts / "half/model.safetensors").values()
    assert {t.dtype for t in saved} == {torch.float32}


def test_each_rank_has_its_part(parts):
    """Of 4-bit codes too; each has all of the adapter, whose bytes are a few here."""
    (share,) = re.findall(r"^has (.*)$", (parts / "said").read_text(), flags=re.M)
    assert float(share) < 0.53
