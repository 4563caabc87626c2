"""Nothing bad is let in: flags, directories, data, models and adapters that are wrong end a script
with exit code 2 and one line on standard error, and nothing is written or overwritten."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import fields

import pytest
import torch
from conftest import make_tokenizer, tiny
from safetensors.torch import load_file, save_file
from scripts import METHODS, ROOT, argv, command, files, metrics, no_reader, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import dynamic_module_utils as remote

import train_dpo
import train_sft
from nanoalign import InputError, world
from nanoalign.chatml import ChatML
from nanoalign.formats.templates import NativeTemplate
from nanoalign.formats.weights import NOTE
from nanoalign.losses import sigmoid
from nanoalign.model import generate
from nanoalign.run import device
from nanoalign.run.command import main
from nanoalign.run.flags import DPOConfig, KTOConfig, SFTConfig, parse
from nanoalign.run.log import printable
from nanoalign.run.policy import load_policy, load_tokenizer, save_policy
from nanoalign.run.reference import reference_of
from nanoalign.run.session import check_output_dir, git_commit, start
from nanoalign.tools import chat, merge, plot

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.usefixtures("no_curves"),
]


@pytest.fixture
def script(model_dir, data, tmp_path):
    """script(method, **flags) -> (code, stdout, stderr) of train_METHOD.py in its own folder."""
    folder = tmp_path / "work"
    folder.mkdir()

    def go(method, *words, **changes):
        given = dict(
            model_name_or_path=model_dir, dataset_name=data / f"{method}.jsonl", device="cpu",
            output_dir="out", max_steps=2, logging_steps=1, per_device_train_batch_size=4,
        )  # fmt: skip
        return command(folder, f"train_{method}.py", *argv(given | changes), *words)

    go.folder = folder
    return go


def refused(script, method, *words, expected=(), **changes):
    """Exit code 2, one line, and everything as it was."""
    before = files(script.folder)
    code, _, errors = script(method, *words, **changes)
    assert errors.startswith(f"train_{method}.py: error: ") and errors.count("\n") == 1, errors
    assert errors[:-1].isprintable() and code == 2
    for word in expected:
        assert str(word) in errors
    assert files(script.folder) == before
    return errors


# ----------------------------------------------------------------------------------------- flags

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_dir", "o"]


def parsed(method, *flags):
    return parse(METHODS[method][0], [*NEEDED, *flags], {})


def test_a_loss_whose_number_is_no_flag(monkeypatch):
    monkeypatch.setitem(DPOConfig.losses, "own", lambda policy, reference, beta, price: ...)
    with pytest.raises(InputError, match="^--loss_type own: its parameter price has no flag yet$"):
        parsed("dpo", "--loss_type", "own")
    parsed("dpo", "--loss_type", "sigmoid")


BAD_FLAGS = [
    ("sft", "--no_such_flag 3", "unrecognized arguments: --no_such_flag"),
    ("sft", "--beta 0.1", "--beta is a flag of DPO and KTO only"),
    ("dpo", "--desirable_weight 2", "--desirable_weight is a flag of KTO only"),
    ("dpo", "--neftune_noise_alpha 5", "--neftune_noise_alpha is a flag of SFT only"),
    ("sft", "--learning_rat 1e-3", "--learning_rat 1e-3; the nearest is --learning_rate (--help"),
    ("sft", "--max_step=3", "arguments: --max_step=3; the nearest is --max_steps"),
    ("kto", "--desirable 2", "--desirable 2; the nearest is --desirable_weight"),
    ("sft", "stray", "unrecognized arguments: stray"),
    ("sft", "--learning_rate", "expected one argument"),
    ("sft", "--eval_dataset", "expected at least one argument"),
    ("sft", "--seed 1 --seed 2", "--seed is given more than once"),
    ("sft", "--dataset_name other.jsonl", "--dataset_name is given more than once"),
    ("sft", "--use_peft false --no_use_peft", "--use_peft is given more than once"),
    ("sft", "--max-steps 1 --max_steps 2", "--max_steps is given more than once"),
    # types
    ("sft", "--lora_r x", "invalid int value: 'x'"),
    ("sft", "--lora_r 2.5", "invalid int value: '2.5'"),
    ("sft", "--learning_rate fast", "invalid float value: 'fast'"),
    ("sft", "--use_peft maybe", "--use_peft"),
    ("sft", "--dtype float8", "invalid choice: 'float8'"),
    ("sft", "--lr_scheduler_type step", "invalid choice: 'step'"),
    ("dpo", "--loss_type kto", "invalid choice: 'kto'"),
    ("kto", "--loss_type sigmoid", "invalid choice: 'sigmoid'"),
    ("sft", "--chat_template llama", "invalid choice: 'llama'"),
    # values
    ("sft", "--lora_r 0", "--lora_r 0: must be more than 0"),
    ("sft", "--lora_r -4", "--lora_r -4: must be more than 0"),
    ("sft", "--lora_alpha 0", "--lora_alpha 0"),
    ("sft", "--lora_dropout 1", "--lora_dropout 1.0: must be at least 0 and below 1"),
    ("sft", "--lora_dropout -0.1", "--lora_dropout -0.1"),
    ("dpo", "--beta 0", "--beta 0.0: must be more than 0"),
    ("dpo", "--beta -0.1", "--beta -0.1: must be more than 0"),
    ("kto", "--beta 0", "--beta 0.0: must be more than 0"),
    ("kto", "--beta nan", "--beta nan: must be a finite number"),
    ("kto", "--beta inf", "--beta inf: must be a finite number"),
    ("dpo", "--label_smoothing 0.5", "--label_smoothing 0.5: must be at least 0 and below 0.5"),
    ("dpo", "--rpo_alpha -1", "--rpo_alpha -1.0: must not be negative"),
    ("kto", "--desirable_weight -1", "--desirable_weight -1.0: must not be negative"),
    ("kto", "--undesirable_weight nan", "--undesirable_weight nan: must be a finite number"),
    ("sft", "--neftune_noise_alpha -5", "--neftune_noise_alpha -5.0: must not be negative"),
    ("sft", "--learning_rate=-1e-3", "--learning_rate -0.001: must not be negative"),
    ("sft", "--learning_rate nan", "--learning_rate nan: must be a finite number"),
    ("sft", "--learning_rate inf", "--learning_rate inf: must be a finite number"),
    ("sft", "--warmup_ratio 1.1", "--warmup_ratio 1.1: must be at least 0 and at most 1"),
    ("sft", "--warmup_ratio -0.1", "--warmup_ratio -0.1"),
    ("sft", "--warmup_steps -1", "--warmup_steps -1.0: must not be negative"),
    ("sft", "--eval_fraction 1", "--eval_fraction 1.0: must be at least 0 and below 1"),
    ("sft", "--eval_fraction -0.1", "--eval_fraction -0.1"),
    ("sft", "--eval_fraction 5", "--eval_fraction 5.0"),
    ("sft", "--num_train_epochs 0", "--num_train_epochs 0.0: must be more than 0"),
    ("sft", "--num_train_epochs inf", "--num_train_epochs inf: must be a finite number"),
    ("sft", "--max_steps 0", "--max_steps 0: must be more than 0, or -1"),
    ("sft", "--max_steps -2", "--max_steps -2: must be more than 0, or -1"),
    ("sft", "--max_length 0", "--max_length 0: must be more than 0"),
    ("sft", "--max_prompt_length 0", "--max_prompt_length 0: must be more than 0"),
    ("sft", "--per_device_train_batch_size 0", "--per_device_train_batch_size 0"),
    ("sft", "--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0"),
    ("sft", "--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0"),
    ("sft", "--logging_steps 0", "--logging_steps 0"),
    ("sft", "--eval_steps 0", "--eval_steps 0"),
    ("sft", "--save_steps -1", "--save_steps -1: must not be negative"),
    ("sft", "--save_total_limit 0", "--save_total_limit 0"),
    ("sft", "--skip_nonfinite -1", "--skip_nonfinite -1: must not be negative"),
    ("sft", "--max_grad_norm -1", "--max_grad_norm -1.0: must not be negative"),
    ("sft", "--weight_decay -1", "--weight_decay -1.0: must not be negative"),
    ("sft", "--adam_beta1 1", "--adam_beta1 1.0: must be at least 0 and below 1"),
    ("sft", "--adam_beta2 -1", "--adam_beta2 -1.0"),
    ("sft", "--seed -1", "--seed -1: must not be negative"),
    ("sft", f"--seed {2**64}", f"--seed {2**64}: must be less than 2"),
    ("sft", "--eval_strategy epoch", "--eval_strategy epoch: needs --eval_dataset or"),
    ("sft", "--evaluation_strategy=steps", "--eval_strategy steps: needs --eval_dataset or"),
    ("sft", "--save_strategy best", "invalid choice: 'best'"),
    ("sft", "--lr_scheduler_kwargs 3", "expected numbers by name"),
    ("sft", '--lr_scheduler_kwargs {"power":nan}', "expected numbers by name"),
    ("sft", '--lr_scheduler_kwargs {"power":2}', "power: linear takes no numbers"),
    ("sft", '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"x":2}', "takes power, lr_end"),
    # contradictions
    ("sft", "--bf16 --dtype float16", "--bf16 and --dtype float16 contradict each other"),
    ("sft", "--warmup_ratio 0.1 --warmup_steps 5", "--warmup_ratio and --warmup_steps contradict"),
    ("sft", "--eval_dataset e --eval_fraction 0.1", "--eval_dataset and --eval_fraction contra"),
    ("sft", "--use_peft false --lora_r 8", "--use_peft false and --lora_r contradict"),
    ("sft", "--use-peft=false --lora-r=8", "--use_peft false and --lora_r contradict"),
    ("sft", "--no_use_peft --use_rslora", "--use_peft false and --use_rslora contradict"),
    ("sft", "--use_peft false --adapter_name_or_path a", "and --adapter_name_or_path contradict"),
    ("sft", "--use_peft false --load_in_4bit", "--use_peft false and --load_in_4bit contradict"),
]


@pytest.mark.parametrize("method, flags, message", BAD_FLAGS, ids=[row[1] for row in BAD_FLAGS])
def test_bad_flags(method, flags, message):
    with pytest.raises(InputError) as error:
        parsed(method, *flags.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_needed():
    for words, message in (
        (["--model_name_or_path", "m"], "--dataset_name: give the data"),
        (["--adapter_name_or_path", "a"], "--dataset_name: give the data"),
    ):
        with pytest.raises(InputError, match=message):
            parse(SFTConfig, words, {})
    with pytest.raises(InputError, match="--model_name_or_path: give the model to train"):
        parse(SFTConfig, NEEDED[2:], {})
    with pytest.raises(InputError, match="--output_dir: give a directory"):
        check_output_dir(parse(SFTConfig, NEEDED[:4], {}), False)


def test_dashes_and_the_built_in_settings():
    cfg = parse(SFTConfig, ["--max-steps", "7", "--learning_rate=3"], train_sft.BUILT_IN)
    assert (cfg.max_steps, cfg.learning_rate) == (7, 3)
    assert cfg.per_device_train_batch_size == 16


A = "--adapter_name_or_path a"
IDLE = [  # flags of a run, and which of them have nothing to do in it
    ("sft", "--eval_steps 3 --per_device_eval_batch_size 3",
     "eval_steps per_device_eval_batch_size"),
    ("sft", "--eval_steps 3 --per_device_eval_batch_size 3 --eval_fraction 0.5", ""),
    ("sft", "--generate_during_eval", "generate_during_eval"),
    ("sft", "--generate_during_eval --eval_fraction 0.5", ""),
    ("sft", "--truncation_mode keep_start", "truncation_mode"),
    ("sft", "--truncation_mode keep_start --max_prompt_length 9", ""),
    ("sft", "--max_steps 3 --num_train_epochs 2", "num_train_epochs"),
    ("sft", "--num_train_epochs 2", ""),
    ("sft", "--disable_dropout --lora_dropout 0.1", "lora_dropout"),
    ("sft", "--lora_dropout 0.1", ""),
    ("dpo", "--lora_dropout 0.1", "lora_dropout"),  # DPO has no dropout unless asked to
    ("dpo", "--lora_dropout 0.1 --no_disable_dropout", ""),
    ("sft", f"{A} --lora_r 8 --lora_alpha 8 --lora_bias all", "lora_alpha lora_bias lora_r"),
    ("sft", f"{A} --use_rslora --lora_modules_to_save lm_head", "lora_modules_to_save use_rslora"),
    ("sft", f"{A} --lora_target_modules q_proj --lora_dropout 0.2",
     "lora_dropout lora_target_modules"),
    ("sft", "--lora_r 8 --lora_alpha 8 --lora_bias all --use_rslora", ""),
    ("sft", "--use_bnb_nested_quant --bnb_4bit_quant_type nf4",
     "bnb_4bit_quant_type use_bnb_nested_quant"),
    ("sft", "--use_bnb_nested_quant --load_in_4bit", ""),
    ("sft", "--logging_first_step --logging_steps 1", "logging_first_step"),
    ("sft", "--logging_first_step", ""),
    ("sft", "--overwrite_output_dir --resume_from_checkpoint", ""),  # where there is no run yet
    ("sft", "--overwrite_output_dir", ""),
    ("sft", "--dataset_train_split a --dataset_test_split b",
     "dataset_test_split dataset_train_split"),
    ("sft", "--eval_dataset owner/name --dataset_test_split b", ""),
    ("sft", "--tf32 false --device cpu", "tf32"),
    ("sft", "--tf32 false --device cuda:1", ""),
    ("sft", "--warmup_steps 3 --lr_scheduler_type constant", "warmup_steps"),
    ("sft", "--warmup_ratio 0.1 --lr_scheduler_type constant", "warmup_ratio"),
    ("sft", "--warmup_steps 3 --lr_scheduler_type constant_with_warmup", ""),
    ("sft", "--eval_steps 3 --eval_fraction 0.5 --eval_strategy epoch", "eval_steps"),
    ("sft", "--eval_steps 3 --eval_fraction 0.5 --eval_strategy no", "eval_steps"),
    ("sft", "--save_steps 3 --save_strategy epoch", "save_steps"),
    ("sft", "--save_steps 3 --save_strategy steps --save_total_limit 2", ""),
    ("sft", "--run_name a", "run_name"),
    ("sft", "--run_name a --report_to wandb", ""),
    ("dpo", "--loss_type ipo --label_smoothing 0.1", "label_smoothing"),
    ("dpo", "--loss_type hinge --label_smoothing 0.1", "label_smoothing"),
    ("dpo", "--loss_type robust --label_smoothing 0.1 --beta 0.2 --rpo_alpha 1", ""),
    ("dpo", "--use_peft false --precompute_ref_log_probs", "precompute_ref_log_probs"),
    ("dpo", "--use_peft false --precompute_ref_log_probs --ref_model_name_or_path r", ""),
    ("dpo", "--precompute_ref_log_probs", ""),
    ("kto", "--use_peft false --ref_model_name_or_path r", ""),
    ("kto", "--loss_type apo_zero_unpaired --beta 0.2 --desirable_weight 2", ""),
]  # fmt: skip


@pytest.mark.parametrize("method, flags, idle", IDLE, ids=[row[1] for row in IDLE])
def test_idle_flags_are_one_line_each(method, flags, idle, capsys):
    parsed(method, *flags.split())
    said = [f"--{name} has nothing to do in this run" for name in idle.split()]
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize("method", METHODS)
def test_help(method, tmp_path):
    """Every flag with its line of help."""
    code, said, errors = command(tmp_path, f"train_{method}.py", "--help")
    assert code == 0 and not errors and said.startswith(f"usage: train_{method}.py")
    text = " ".join(said.split())
    for field in fields(METHODS[method][0]):
        assert f"--{field.name} " in text
        assert " ".join(field.metadata["help"].split()).split(":")[0].split("-")[0] in text
    assert files(tmp_path) == {}


def test_flags_through_the_command(script):
    refused(script, "sft", "--no_such_flag", expected=["unrecognized arguments: --no_such_flag"])
    refused(script, "dpo", "--bet=1", expected=["unrecognized arguments: --bet=1"])
    refused(script, "kto", beta=0, expected=["--beta 0.0: must be more than 0"])
    refused(script, "sft", "--use_peft=false", "--lora_r=4", expected=["contradict each other"])
    code, said, errors = script("sft", "--eval_steps=3", "--truncation_mode=keep_start")
    assert code == 0 and not errors
    assert said.splitlines()[:2] == [
        "--eval_steps has nothing to do in this run",
        "--truncation_mode has nothing to do in this run",
    ]


def test_real_processes(model_dir, data, tmp_path):
    """The forks elsewhere in this file stand for this: python, a script, flags, a terminal."""
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "p", "completion": None}])
    runs = {
        "sft": (dict(dataset_name=bad), f"{bad}, line 1: completion: null; expected"),
        "dpo": (dict(learning_rate="x"), "argument --learning_rate"),
        "kto": (dict(model_name_or_path=tmp_path / "none"), f"{tmp_path / 'none'}: no such dir"),
    }
    processes = {}
    for method, (changes, _) in runs.items():
        given = dict(
            model_name_or_path=model_dir, dataset_name=data / f"{method}.jsonl", device="cpu",
            output_dir=tmp_path / "out",
        )  # fmt: skip
        words = [sys.executable, ROOT / f"train_{method}.py", *argv(given | changes)]
        processes[method] = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
    for method, process in processes.items():
        _, errors = process.communicate()
        assert process.returncode == 2 and errors.count("\n") == 1
        assert errors.startswith(f"train_{method}.py: error: {runs[method][1]}"), errors
    assert list(files(tmp_path)) == ["bad.jsonl"]


def test_interrupted_outside_the_loop(monkeypatch, capsys):
    def run(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["x/train_sft.py", *NEEDED])
    with pytest.raises(SystemExit) as stop:
        main(SFTConfig, run, {})
    assert stop.value.code == 130
    assert capsys.readouterr().err.startswith("train_sft.py: interrupted")


def test_one_line():
    assert str(InputError("a\nb\x1b[31m\u2028\u202e é 漢")) == (r"a\nb\x1b[31m\u2028\u202e é 漢")


# ------------------------------------------------------------------------------------ output_dir


def test_output_dir(script, tmp_path):
    """Not empty, a file, below a file, a name too long, a link to nowhere."""
    for name in ("out", "taken"):
        (script.folder / name).mkdir()
        (script.folder / name / "thesis.txt").write_text("years of work")
    (script.folder / "file").write_text("x")
    (script.folder / "link").symlink_to("nowhere")
    refused(script, "sft", expected=["--output_dir out: not empty; --overwrite_output_dir or"])
    for place, words in (
        ("taken", "not empty"),
        (tmp_path / "work" / "taken", "not empty"),
        (".", "not empty"),
        ("runs/../taken", "not empty"),
        ("file", "file is a file"),
        ("file/deep/er", "file is a file"),
        ("link", "not saved: File exists"),
        ("x" * 300, "File name too long"),
        ("", "--output_dir: give a directory"),
    ):
        refused(script, "sft", output_dir=place, expected=[words])
    code, _, errors = script("sft", "--overwrite_output_dir")
    assert code == 0 and not errors
    assert (script.folder / "out" / "thesis.txt").read_text() == "years of work"


def test_output_dir_that_can_not_be_written(script):
    if os.geteuid() == 0:  # nothing is forbidden to root but what the system can't do
        place = "/proc/nanoalign/out"
    else:
        place = script.folder / "locked"
        place.mkdir(mode=0o555)
    errors = refused(script, "sft", output_dir=place)
    assert "not writable" in errors or "not saved" in errors


def test_a_start_never_overwrites_what_it_starts_from(script, model_dir, tmp_path):
    model = shutil.copytree(model_dir, script.folder / "model")
    for more in (["--overwrite_output_dir"], ["--resume_from_checkpoint"]):
        refused(
            script, "sft", *more, model_name_or_path=model, output_dir="model",
            expected=["would overwrite what training starts from"],
        )  # fmt: skip


def test_nor_what_lies_below_the_output_directory(script, model_dir):
    """A checkpoint of it as the model, the adapter, the base of an adapter, or the reference."""
    given = dict(save_steps=1, use_peft="false")
    assert script("sft", **given)[0] == script("sft", **given, output_dir="other")[0] == 0
    inner = "out/checkpoint-1"
    assert script("sft", model_name_or_path=inner, output_dir="adapter")[0] == 0
    for method, changes in (
        ("sft", {"model_name_or_path": inner}),
        ("sft", {"adapter_name_or_path": "adapter", "model_name_or_path": None}),
        ("dpo", {"ref_model_name_or_path": script.folder / inner}),
    ):
        words = ["--output_dir out: would overwrite what training starts from: ", inner]
        refused(script, method, "--overwrite_output_dir", **changes, expected=words)
    assert script("sft", "--overwrite_output_dir", model_name_or_path="other")[0] == 0


def test_nor_the_data_that_it_reads(script, data):
    """In a checkpoint's directory, which would be deleted, by a link too, or under a name that is
    written; a file of its own beside them stays."""
    assert script("sft", save_steps=1)[0] == 0
    out = script.folder / "out"
    for place in ("checkpoint-1/mine.jsonl", "metrics.jsonl", "mine.jsonl"):
        shutil.copy(data / "sft.jsonl", out / place)
    (script.folder / "link.jsonl").symlink_to(out / "checkpoint-1" / "mine.jsonl")
    for changes in (
        {"dataset_name": "out/checkpoint-1/mine.jsonl"},
        {"dataset_name": [data / "sft.jsonl", out / "checkpoint-1" / "mine.jsonl"]},
        {"dataset_name": "link.jsonl"},
        {"dataset_name": "out"},
        {"dataset_name": "out/metrics.jsonl"},
        {"eval_dataset": "out/../out/checkpoint-1/mine.jsonl"},
    ):
        words = ["--output_dir out: would overwrite what training starts from: "]
        refused(script, "sft", "--overwrite_output_dir", **changes, expected=words)
    code, _, errors = script("sft", "--overwrite_output_dir", dataset_name="out/mine.jsonl")
    assert code == 0 and not errors
    assert (out / "mine.jsonl").read_bytes() == (data / "sft.jsonl").read_bytes()


def test_to_resume_is_no_leave_to_overwrite(script):
    """A directory of somebody else's, or another run's, is not taken over by a checkpoint that
    isn't its own, nor where there is none."""
    assert script("sft", save_steps=1)[0] == script("sft", output_dir="first", save_steps=1)[0] == 0
    (script.folder / "taken").mkdir()
    (script.folder / "taken" / "thesis.txt").write_text("years of work")
    other, words = "--resume_from_checkpoint=first/checkpoint-1", ["not the run to resume"]
    refused(script, "sft", other, expected=words)
    refused(script, "sft", "--resume_from_checkpoint", output_dir="taken", expected=words)
    code, said, _ = script("sft", other, "--overwrite_output_dir", logging_steps=2, save_steps=5)
    assert code == 0 and "going on from first/checkpoint-1" in said
    assert not (script.folder / "out" / "checkpoint-1").exists()  # of the run that was there
    assert [line["step"] for line in metrics(script.folder / "out")] == [2]
    words = ["--resume_from_checkpoint", "--overwrite_output_dir"]
    code, said, _ = script("sft", *words, output_dir="taken")
    assert code == 0 and "taken: no checkpoint yet; starting at step 0" in said


def test_nothing_of_an_earlier_run_is_taken_for_the_new_ones(script):
    """Not the note on the base of a 4-bit adapter, by which merge would go, nor the curves."""
    reader = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(reader)

    def points():
        board = events.EventAccumulator(str(script.folder / "out")).Reload()
        return [event.step for event in board.Scalars("loss")]

    board = {"report_to": "tensorboard", "save_steps": 1, "max_steps": 4}
    assert script("sft", "--load_in_4bit", **board)[0] == 0
    assert (script.folder / "out" / NOTE).exists() and points() == [1, 2, 3, 4]
    assert script("sft", "--overwrite_output_dir", **board)[0] == 0
    assert not (script.folder / "out" / NOTE).exists() and points() == [1, 2, 3, 4]
    again = "--resume_from_checkpoint=out/checkpoint-2"
    assert script("sft", again, **board)[0] == 0 and points() == [1, 2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
def test_an_error_late_in_the_start_leaves_an_earlier_run_alone(method, script):
    """--overwrite_output_dir permits to overwrite, once there is something to overwrite it with."""
    assert script(method, save_steps=1)[0] == 0
    assert (script.folder / "out" / "checkpoint-1").is_dir()
    rows = [json.loads(line) for line in open(script.folder.parent / "work" / "out/metrics.jsonl")]
    assert len(rows) == 2
    broken = write_rows(script.folder / "broken.jsonl", [{"prompt": "p"}])
    refused(script, method, "--overwrite_output_dir", dataset_name=broken)
    refused(script, method, "--overwrite_output_dir", eval_dataset=broken)
    refused(script, method, "--overwrite_output_dir", model_name_or_path=script.folder)
    if method != "sft":
        refused(script, method, "--overwrite_output_dir", ref_model_name_or_path=script.folder)
    refused(script, method, "--overwrite_output_dir", "--eval_fraction=0.99")
    code, said, _ = script(method, "--overwrite_output_dir", max_steps=1, save_steps=5)
    assert code == 0 and not (script.folder / "out" / "checkpoint-1").exists()


class Reached(Exception):
    pass


def test_built_in_runs_may_overwrite_their_own_directory_only(tmp_path, monkeypatch):
    def built():
        raise Reached

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world, "build", built)
    for place in ("runs/sft", "runs/mine", "mine"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "thesis.txt").write_text("years of work")
    before = files(tmp_path)
    with pytest.raises(Reached):
        start(parse(SFTConfig, [], train_sft.BUILT_IN), {})
    for place in ("runs/mine", "mine", "runs/../mine"):
        with pytest.raises(InputError, match="not empty"):
            start(parse(SFTConfig, ["--output_dir", place], train_sft.BUILT_IN), {})
    with pytest.raises(InputError, match="run train_sft.py"):  # first
        start(parse(DPOConfig, [], train_dpo.BUILT_IN), {})
    assert files(tmp_path) == before


def test_only_the_built_in_worlds_own_files_make_a_built_in_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/sft").mkdir(parents=True)
    (tmp_path / "runs/sft/thesis.txt").write_text("years of work")
    write_rows(tmp_path / "runs/worldly.jsonl", [{"prompt": "p", "completion": "c"}])
    mine = ["--model_name_or_path=m", "--output_dir=runs/sft", "--dataset_name"]
    for name in ("runs/worldly.jsonl", "runs/world2/a.jsonl", "runs/world/deeper/a.jsonl"):
        with pytest.raises(InputError, match="runs/sft: not empty"):
            start(parse(SFTConfig, [*mine, name], train_sft.BUILT_IN), {})
    adapter = ["--adapter_name_or_path=a", "--output_dir=o", "--dataset_name=runs/world/a.jsonl"]
    with pytest.raises(InputError, match="a: no adapter_config.json"):
        start(parse(SFTConfig, adapter, {}), {})


FOURTH = '''"""A method of one's own: only long replies count."""

from dataclasses import dataclass

from nanoalign.formats.layouts import SFT
from nanoalign.run.flags import POSITIVE, Config, flag
from nanoalign.run.record import fit
from nanoalign.run.command import main
from nanoalign.run.report import finish
from nanoalign.run.session import start


@dataclass
class LongConfig(Config):
    least_tokens: int = flag(2, "of a reply that counts", POSITIVE)


def run_long(cfg):
    run = start(cfg, SFT)

    def long(batches):
        for batch in batches:
            scores = run.policy(batch)
            counts = scores.lengths >= cfg.least_tokens
            yield {"loss": (-(scores.logps * counts).sum(), sum(scores.tokens))}

    fit(cfg, run, long)
    return finish(cfg, run)


if __name__ == "__main__":
    main(LongConfig, run_long, {})
'''


def test_a_fourth_script_is_one_file(model_dir, data, tmp_path):
    """Nothing is registered anywhere."""
    folder = tmp_path / "work"
    folder.mkdir()
    (tmp_path / "train_long.py").write_text(FOURTH)
    given = dict(model_name_or_path=model_dir, dataset_name=data / "sft.jsonl", device="cpu",
                 output_dir="runs/long", max_steps=2, logging_steps=1)  # fmt: skip
    script = str(tmp_path / "train_long.py")
    code, said, errors = command(folder, script, *argv(given))
    assert code == 0 and not errors and "saved in runs/long" in said
    record = json.loads((folder / "runs/long/run.json").read_text())
    assert record["method"] == "long" and record["flags"]["least_tokens"] == 2
    card = (folder / "runs/long/README.md").read_text()
    assert "- long\n" in card and "trained with LONG by nanoalign" in card
    code, _, errors = command(folder, script, *argv(given | {"least_tokens": 0}))
    assert code == 2 and errors == "train_long.py: error: --least_tokens 0: must be more than 0\n"


@pytest.mark.parametrize(
    "error",
    [
        "torch.OutOfMemoryError('Tried to allocate 9 GiB.')",
        "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate 9')",
        "RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 9')",
        "RuntimeError('MPS backend out of memory')",
    ],
)
def test_out_of_memory(error, model_dir, data, tmp_path):
    """In step 3: one line names what needs less, of what is not on; steps 1 and 2 are saved."""
    folder, script = tmp_path / "work", tmp_path / "train_long.py"
    folder.mkdir()
    begin, raises = (
        "    def long(batches):\n",
        f"        if len(steps) > 2:\n            raise {error}\n",
    )
    method = f"    steps = []\n\n{begin}        steps.append(1)\n{raises}"
    script.write_text("import torch\n" + FOURTH.replace(begin, method))
    given = dict(model_name_or_path=model_dir, dataset_name=data / "sft.jsonl", device="cpu",
                 output_dir="out", max_steps=4)  # fmt: skip
    less = {
        "--gradient_checkpointing or --max_row_tokens or --load_in_4bit": {},
        "--max_row_tokens or --load_in_4bit": dict(gradient_checkpointing="true"),
        "--gradient_checkpointing or a lower --max_row_tokens": dict(
            max_row_tokens=99, load_in_4bit="true"
        ),
    }
    for names, flags in less.items() if "MPS" in error else [*less.items()][:1]:
        more = flags | {"overwrite_output_dir": "true"}
        code, said, errors = command(folder, str(script), *argv(given | more))
        line = f"out of memory; try {names}; checkpoints are kept"
        assert (code, errors) == (2, f"train_long.py: error: {line}\n")
        assert "saved in checkpoint-2; --resume_from_checkpoint goes on there" in said
        assert (folder / "out" / "checkpoint-2" / "state.json").exists()
    script.write_text(FOURTH)
    code, said, _ = command(folder, str(script), *argv(given | flags), "--resume_from_checkpoint")
    assert code == 0 and "going on from out/checkpoint-2" in said


def test_the_commit_is_that_of_our_own_code(tmp_path):
    """Not of a repository in which the package is only installed."""

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True)

    git("init", "-q")
    (tmp_path / "theirs.py").write_text("")
    (tmp_path / "ours.py").write_text("")
    git("add", "theirs.py")
    git("commit", "-qm", "theirs")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert len(head) == 40 and git_commit(tmp_path / "theirs.py") == head
    assert git_commit(tmp_path / "ours.py") is None


def test_a_reader_who_has_had_enough(data, model_dir, tmp_path):
    """`| head`: that is no error."""
    words = {
        "-m nanoalign.memory": ["sft", "--model_name_or_path", model_dir],
        "-m nanoalign.data": [data / "sft.jsonl", "--model_name_or_path", model_dir],
        "train_sft.py": ["--help"],
    }
    for name, more in words.items():
        code, said, errors = command(tmp_path, name, *more, first=no_reader)
        assert code in (0, 141) and not said and not errors


def test_home(tmp_path, monkeypatch):
    """No shell replaces the ~ of --output_dir=~/out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = "output_dir", "adapter_name_or_path", "ref_model_name_or_path", "resume_from_checkpoint"
    words = [f"--{name}=~/{name}" for name in names]
    cfg = parse(DPOConfig, [*words, "--dataset_name=~/a", "--eval_dataset", "b", "~/c"], {})
    assert [vars(cfg)[name] for name in names] == [str(tmp_path / name) for name in names]
    assert cfg.dataset_name == [str(tmp_path / "a")]
    assert cfg.eval_dataset == ["b", str(tmp_path / "c")]
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda runs, out: drawn.append(out) or True)
    (tmp_path / "metrics.jsonl").write_text("")
    plot.main(["~", "--out=~/a.png"])
    assert drawn == [tmp_path / "a.png"]
    said = []
    monkeypatch.setattr(chat, "open_policy", lambda args: said.append(args.directory))
    monkeypatch.setattr(chat, "say", lambda policy, turns, args: said.append(turns))
    chat.main(["~/m", "--prompt=~/x"])
    assert said == [str(tmp_path / "m"), [{"role": "user", "content": "~/x"}]]


def test_variables_that_other_launchers_set():
    """RANK alone does not make a process one of torchrun's."""
    code = "from nanoalign.run import ranks; print(ranks.LAUNCHED, ranks.RANK, ranks.WORLD)"
    env = {**os.environ, "RANK": "3", "WORLD_SIZE": "none", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "False 0 1\n", done.stderr


def test_what_a_system_refuses_is_one_line(adapter, model_dir, tmp_path):
    """A base's name of 5,000 characters, weights that are a directory, a file in the way."""
    (tmp_path / "work").mkdir()
    faults = {
        "base": "xxx; expected a name",
        "weights": "adapter_model.safetensors: damaged: ",
        "target": "Not a directory",
    }
    for number, (name, words) in enumerate(faults.items()):
        broken, target = shutil.copytree(adapter, tmp_path / str(number)), tmp_path / "merged"
        if name == "base":
            field(base_model_name_or_path="x" * 5000)(broken)
        elif name == "weights":
            (broken / "adapter_model.safetensors").unlink()
            (broken / "adapter_model.safetensors").mkdir()
        else:
            target = broken / "adapter_config.json"
        before = files(tmp_path)
        code, _, errors = command(tmp_path / "work", "-m nanoalign.merge", broken, target)
        assert code == 2 and words in errors and errors.count("\n") == 1 and len(errors) < 500
        now = {name: text for name, text in files(tmp_path).items() if not name.startswith("work")}
        assert now == {n: text for n, text in before.items() if not n.startswith("work")}


def test_a_merge_is_whole_or_not_there(adapter, tmp_path):
    """On a full disk, in a directory that is there, or in none."""
    place = tmp_path / "there"
    place.mkdir()
    (tmp_path / "work").mkdir()

    def full_disk():
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))

    for target in (tmp_path / "new", place):
        code, _, errors = command(
            tmp_path / "work", "-m nanoalign.merge", adapter, target, first=full_disk
        )
        assert code == 2 and errors.count("\n") == 1
        assert errors.startswith(f"nanoalign.merge: error: {target}: not saved: ")
        assert "File too large" in errors and not files(place)
        assert not (tmp_path / "new").exists()
    (place / "tmp-final").mkdir()  # a merge that was killed
    assert command(tmp_path / "work", "-m nanoalign.merge", adapter, place)[0] == 0
    assert sorted(files(place)) == [
        "Modelfile", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_tools_end_with_one_line_too(tmp_path):
    for tool, name in (("plot", "plot"), ("merge", "nanoalign.merge"), ("data", "data")):
        words = {"plot": ["no\nrun"], "merge": ["no\nadapter", "out"],
                 "data": ["no\nfile.jsonl", "--model_name_or_path", "none"]}[tool]  # fmt: skip
        code, _, errors = command(tmp_path, f"-m nanoalign.{tool}", *words)
        assert code == 2 and errors.startswith(f"{name}: error: ") and errors.count("\n") == 1
    code, _, errors = command(tmp_path, "-m nanoalign.chat", "d", "--top", "3")
    assert code == 2 and errors.startswith("chat: error: unrecognized arguments: --top 3")


# ---------------------------------------------------------------------- data, through the scripts

BAD_DATA = [
    ("sft", "a.jsonl", b'{"prompt": "p", "completion": "c"}\n\n{"prompt": NaN}', ", line 3: "),
    ("sft", "a.jsonl", b'{"prompt": "p", "completion": "c"}\n{"prompt": "p", "co', ", line 2: "),
    ("sft", "a.json", b'[{"prompt": "p", "completion": "c"}, {"prompt": 3}]', ", row 2: "),
    ("sft", "a.csv", b'prompt,completion\n"a\nb",c\nd\n', ", line 4: a row of 1"),
    ("sft", "a.jsonl", b"", ": the file is empty"),
    ("sft", "a.jsonl", b"\x80\x04", ": the file is binary, perhaps a pickle"),
    ("sft", "a.jsonl", b'{"text": "p"}', ", line 1: columns text make no known layout"),
    ("sft", "a.jsonl", b'{"prompt": "p", "completion": " "}', "1 skipped: empty completion"),
    ("sft", "a\x1b[31m\n.jsonl", b"{", r"a\x1b[31m\n.jsonl"),
    ("dpo", "a.jsonl", b'{"prompt": "p", "chosen": "c", "rejected": "c"}', "chosen equal"),
    ("dpo", "a.jsonl", b'{"messages": {"role": "user"}}', ", line 1: columns messages"),
    ("kto", "a.jsonl", b'{"prompt": "p", "completion": "c", "label": "no"}', "label is 'no'"),
    ("kto", "a.jsonl", b'{"prompt": "p", "completion": "c", "label": 2}', "label is 2"),
]


@pytest.mark.parametrize("method, name, content, words", BAD_DATA, ids=range(len(BAD_DATA)))
def test_bad_data(method, name, content, words, script):
    """tests/test_files.py and tests/test_data.py hold the others; this is what scripts make of an
    InputError."""
    (script.folder / name).write_bytes(content)
    errors = refused(script, method, dataset_name=name, expected=[words, "expected"])
    assert "\x1b" in name or errors.startswith(f"train_{method}.py: error: {name}")


def test_a_name_that_is_no_text(script, data):
    """Bytes that are not UTF-8 in the name of a file."""
    name = os.fsdecode(b"caf\xe9.jsonl")
    shutil.copy(data / "sft.jsonl", script.folder / name)
    code, said, errors = script("sft", dataset_name=name)
    assert (code, errors) == (0, "") and r"caf\udce9.jsonl: 11 rows" in said


def test_missing_data(script):
    refused(script, "sft", dataset_name="none.jsonl", expected=["none.jsonl: No such file"])
    refused(script, "sft", dataset_name=None, expected=["--dataset_name: give the data"])


def test_what_is_harmless_is_counted(script):
    rows = [{"prompt": f"p {i}", "completion": "c" * (i % 3)} for i in range(9)]
    write_rows(script.folder / "a.jsonl", rows)
    code, said, errors = script("sft", dataset_name="a.jsonl")
    assert code == 0 and not errors
    assert "a.jsonl: 9 rows, 6 examples; 3 skipped: empty completion" in said


def thumbs(script, labels, prompts="abcdef"):
    rows = [
        {"prompt": prompt, "completion": f"c {i}", "label": label}
        for i, (prompt, label) in enumerate(zip(prompts, labels))
    ]
    return write_rows(script.folder / "thumbs.jsonl", rows)


def test_kto_says_its_balance(script):
    code, said, errors = script("kto", dataset_name=thumbs(script, [1 == 1] * 4 + [False] * 2))
    assert code == 0 and not errors and "4 desirable, 2 undesirable" in said.splitlines()


@pytest.mark.parametrize("label", [True, False])
def test_kto_with_one_label_is_warned(label, script):
    code, said, errors = script("kto", dataset_name=thumbs(script, [label] * 6))
    assert code == 0 and errors.startswith("warning: one label only") and errors.count("\n") == 1
    assert ("6 desirable, 0 undesirable" if label else "0 desirable, 6 undesirable") in said


@pytest.mark.parametrize("full", [[], ["--use_peft=false"]], ids=["lora", "full"])
def test_kto_with_one_prompt_is_refused(full, script):
    same = thumbs(script, [True, False] * 3, prompts="aaaaaa")
    words = ["two different prompts", "--loss_type apo_zero_unpaired"]
    refused(script, "kto", *full, dataset_name=same, expected=words)
    (script.folder / "out").mkdir()
    (script.folder / "out" / "metrics.jsonl").write_text('{"step": 1}\n')
    refused(script, "kto", *full, "--overwrite_output_dir", dataset_name=same)
    words = ["the examples to evaluate on: ", "prompts", "--loss_type apo_zero_unpaired"]
    refused(script, "kto", *full, "--overwrite_output_dir", eval_dataset=same, expected=words)


def test_numbers_that_run_away(script):
    """AdamW at a learning rate of 1e30: the second step's loss is not finite."""
    code, said, errors = script("dpo", learning_rate=1e30, max_steps=3, save_steps=1)
    assert code == 2 and errors.count("\n") == 1 and "step 1/3" in said
    assert errors.startswith("train_dpo.py: error: step 2: loss or gradient is not finite; its row")
    assert "dpo.jsonl, line " in errors and len(metrics(script.folder / "out")) == 1


# ----------------------------------------------------------------------------------------- models


def config(directory, *flags, kind=SFTConfig):
    flags = ["--model_name_or_path", str(directory), "--dataset_name", "any.jsonl", *flags]
    return parse(kind, [*flags, "--device", "cpu", "--output_dir", "out"], {})


def json_file(name, **changes):
    """Change fields of a JSON file; ... removes one."""

    def edit(directory):
        text = json.loads((directory / name).read_text()) | changes
        text = {key: value for key, value in text.items() if value is not ...}
        (directory / name).write_text(json.dumps(text))

    return edit


def tensor_file(name="model.safetensors", **changes):
    def edit(directory):
        tensors = load_file(directory / name)
        for key, change in changes.items():
            key = next(k for k in tensors if k.replace(".", "_").endswith(key))
            tensors[key] = None if change is None else change(tensors[key])
        tensors = {key: t for key, t in tensors.items() if t is not None}
        save_file(tensors, directory / name, metadata={"format": "pt"})

    return edit


def content(name, text):
    return lambda directory: (directory / name).write_bytes(text)


def shortened(name, length):
    def edit(directory):
        (directory / name).write_bytes((directory / name).read_bytes()[:length])

    return edit


def removed(name):
    return lambda directory: (directory / name).unlink()


def index(place, kind="safetensors"):
    """All tensors lie in a file beside the directory, and an index says so."""

    def edit(directory):
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").rename(directory.parent / "x.safetensors")
        torch.save(tensors, directory.parent / "x.bin")
        where = place.replace("HERE", str(directory.parent))
        text = {"metadata": {}, "weight_map": dict.fromkeys(tensors, where)}
        name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
        (directory / f"{name}.index.json").write_text(json.dumps(text))

    return edit


def broken_index(text):
    def edit(directory):
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(text)

    return edit


BAD_MODELS = {
    "no config": (removed("config.json"), None),
    "config cut": (shortened("config.json", 50), None),
    "config a list": (content("config.json", b"[]"), None),
    "config UTF-16": (content("config.json", "{}".encode("utf-16")), None),
    "unknown kind": (json_file("config.json", model_type="nonesuch"), "nonesuch"),
    "vocab_size a word": (json_file("config.json", vocab_size="x"), "'vocab_size' expected int"),
    "heads": (json_file("config.json", num_attention_heads=7), "attention heads"),
    "no layers": (json_file("config.json", num_hidden_layers=0), None),
    "negative layers": (json_file("config.json", num_hidden_layers=-1), None),
    "more layers": (json_file("config.json", num_hidden_layers=3), "missing keys .*layers.2"),
    "no weights": (removed("model.safetensors"), "model.safetensors"),
    "empty weights": (shortened("model.safetensors", 0), None),
    "cut header": (shortened("model.safetensors", 99), None),
    "cut weights": (shortened("model.safetensors", -1), None),
    "noise": (content("model.safetensors", b"\x80" * 999), None),
    "pickle in safetensors": (content("model.safetensors", pickle.dumps({})), None),
    "nan": (tensor_file(layers_1_mlp_up_proj_weight=lambda t: t * torch.nan), "up_proj.* NaN"),
    "inf": (tensor_file(model_norm_weight=lambda t: t + torch.inf), "norm.weight holds NaN or inf"),
    "-inf": (tensor_file(lm_head_weight=lambda t: t - torch.inf), "lm_head.weight holds NaN or"),
    "missing": (tensor_file(model_norm_weight=None), "missing keys in the weights: model.norm"),
    "misshapen": (tensor_file(model_norm_weight=lambda t: t[:3].clone()),
                  r"model.norm.weight: shape \(3,\), expected \(32,\)"),
    "turned": (tensor_file(layers_0_mlp_up_proj_weight=lambda t: t.T.contiguous()),
               r"up_proj.weight: shape \(32, 64\), expected \(64, 32\)"),
    "fewer rows": (json_file("config.json", vocab_size=290), r"shape \(320, 32\)"),
    "index: ..": (index("../x.safetensors"), "index.json: ../x.safetensors leads out of the dir"),
    "index: a/../..": (index("a/../../x.safetensors"), "leads out of the directory"),
    "index: absolute": (index("HERE/x.safetensors"), "x.safetensors leads out of the directory"),
    "index: bin": (index("../x.bin", "bin"), "bin.index.json: ../x.bin leads out of the directory"),
    "index: gone": (index("gone.safetensors"), "gone.safetensors is not there"),
    "index cut": (broken_index('{"weight_map": {"a'), "index.json: no index"),
    "index a list": (broken_index("[]"), "index.json: no index"),
    "index of numbers": (broken_index('{"weight_map": {"a": 3}}'), "index.json: no index"),
    "empty index": (broken_index('{"metadata": {}, "weight_map": {}}'), None),
    "no tokenizer": (removed("tokenizer.json"), None),
    "tokenizer cut": (shortened("tokenizer.json", 99), None),
    "tokenizer a list": (content("tokenizer.json", b"[]"), None),
    "tokenizer config cut": (shortened("tokenizer_config.json", 20), None),
    "tokenizer config a list": (content("tokenizer_config.json", b"[]"), None),
}  # fmt: skip


@pytest.mark.parametrize("edit, words", BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models(edit, words, model_dir, tmp_path):
    directory = shutil.copytree(model_dir, tmp_path / "model")
    edit(directory)
    with pytest.raises(InputError, match=words) as error:
        load_policy(config(directory))
    assert "\n" not in str(error.value) and str(directory) in str(error.value)
    assert len(str(error.value)) - len(str(directory)) < 500


def test_bad_models_through_the_command(script, model_dir, tmp_path):
    (script.folder / "empty").mkdir()
    refused(script, "sft", model_name_or_path="./none", expected=["./none: no such directory"])
    refused(script, "dpo", model_name_or_path="empty", expected=["empty: "])
    bad = shutil.copytree(model_dir, tmp_path / "bad")
    index("../x.safetensors")(bad)
    refused(script, "kto", model_name_or_path=bad, expected=["leads out of the directory"])
    refused(script, "sft", "--load_in_4bit", model_name_or_path=bad, expected=["leads out of"])


def test_pickled_weights_through_the_command(script, model_dir, tmp_path):
    bad = shutil.copytree(model_dir, tmp_path / "bad")
    (bad / "model.safetensors").unlink()
    (bad / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil(str(tmp_path / "trace"))}))
    refused(script, "sft", model_name_or_path=bad, expected=["expected safetensors"])
    assert not (tmp_path / "trace").exists()


def test_more_tensors_than_the_model_has_are_said(model_dir, tmp_path, capsys):
    directory = shutil.copytree(model_dir, tmp_path / "model")
    json_file("config.json", num_hidden_layers=1)(directory)
    load_policy(config(directory))
    assert "9 tensors are not the model's and left out, e.g. model.layers.1." in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("in_4bit", [False, True])
def test_a_tensor_s_name_does_not_reach_the_terminal(in_4bit, model_dir, tmp_path, capsys):
    """As it is: its control characters are shown escaped."""
    directory, name = shutil.copytree(model_dir, tmp_path / "model"), "a\x1b]0;title\x07"
    tensors = load_file(directory / "model.safetensors")
    norm = tensors.pop("model.norm.weight") if in_4bit else torch.ones(1)
    save_file(tensors | {name: norm}, directory / "model.safetensors", {"format": "pt"})
    flags = ["--load_in_4bit"] if in_4bit else []
    with contextlib.suppress(InputError):  # then the dense model lacks it too
        load_policy(config(directory, *flags))
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\\x1b]0;title\\x07" in said


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")  # a file appears when it is unpickled


@pytest.mark.parametrize("zipped", [False, True])
def test_pickled_weights_that_run_code_are_refused(zipped, model_dir, tmp_path):
    directory, trace = shutil.copytree(model_dir, tmp_path / "model"), tmp_path / "trace"
    (directory / "model.safetensors").unlink()
    bad = {"model.norm.weight": Evil(str(trace))}
    if zipped:
        torch.save(bad, directory / "pytorch_model.bin")
    else:
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(bad, 2))
    for flags in ([], ["--load_in_4bit"], ["--trust_remote_code"]):
        with pytest.raises(InputError, match="pickled weights that are more than tensors"):
            load_policy(config(directory, *flags))
    assert not trace.exists()
    pickle.loads(pickle.dumps(bad))  # it would have
    assert trace.exists()


def test_pickled_tensors_are_taken(model_dir, tmp_path):
    """As torch's weights_only reader takes them."""
    directory = shutil.copytree(model_dir, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")
    weights = dict(load_policy(config(directory, "--use_peft", "false")).model.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
    (directory / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError):
        load_policy(config(directory))


CODE = """
open({trace!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "mine"
class Model(LlamaForCausalLM): config_class = Config
class Words(PreTrainedTokenizerFast): pass
def generate(*args, **kwargs): pass
"""


@pytest.mark.parametrize("what", ["model", "known model", "tokenizer", "generation"])
def test_remote_code_runs_only_when_it_is_trusted(what, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    directory = shutil.copytree(model_dir, tmp_path / f"m{what.replace(' ', '')}")
    trace = tmp_path / "trace"
    (directory / "mine.py").write_text(CODE.format(trace=str(trace)))
    names = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    if "model" in what:
        kind = {"model_type": "mine"} if what == "model" else {}
        json_file("config.json", auto_map=names, **kind)(directory)
    elif what == "tokenizer":
        names = {"AutoTokenizer": [None, "mine.Words"]}
        json_file("tokenizer_config.json", auto_map=names, tokenizer_class="Words")(directory)
    else:
        (directory / "custom_generate").mkdir()
        (directory / "mine.py").rename(directory / "custom_generate" / "generate.py")
    if what in ("model", "tokenizer"):  # there is no other code for these
        with pytest.raises(InputError, match="runs only with --trust_remote_code$"):
            load_policy(config(directory))
    else:
        policy = load_policy(config(directory))
        generate(policy, [[{"role": "user", "content": "Hello!"}]], max_new_tokens=2)
    assert not trace.exists()
    if what in ("model", "tokenizer"):
        load_policy(config(directory, "--trust_remote_code"))
        assert trace.exists()
    if what == "model":  # of the reference too
        trace.unlink()
        cfg = config(model_dir, "--ref_model_name_or_path", str(directory), kind=DPOConfig)
        with pytest.raises(InputError, match="runs only with --trust_remote_code$"):
            reference_of(cfg, load_policy(cfg), sigmoid, list)
        cfg.trust_remote_code = True
        reference_of(cfg, load_policy(cfg), sigmoid, list)


@pytest.mark.parametrize("flag", ["model_name_or_path", "ref_model_name_or_path"])
def test_a_length_that_the_model_or_the_reference_does_not_serve(flag, model_dir, script, tmp_path):
    model = shutil.copytree(model_dir, tmp_path / "model")
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    json_file("config.json", rope_parameters=rope)(model)
    words = [f"--max_length 513: {model}", "at most 512"]
    refused(script, "dpo", max_length=513, expected=words, **{flag: model})
    code, said, _ = script("dpo", max_length=512, **{flag: model})
    assert code == 0 and "advice: --max_length" not in said


@pytest.fixture
def five_threads(monkeypatch):
    """Said to be there, and none started."""
    said = [5]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: said[-1])
    monkeypatch.setattr(torch, "set_num_threads", said.append)


@pytest.mark.parametrize(
    "flags, environment, kept, built_in, number, why",
    [
        ({}, None, None, True, 1, "the model is tiny"),
        ({}, "3", None, True, 5, "(OMP_NUM_THREADS)"),  # torch read it when it was loaded
        ({"threads": 2}, "3", None, True, 2, "(--threads)"),
        ({}, None, None, False, 4, "(probed)"),
        ({"threads": 1}, None, None, False, 1, "(--threads)"),
        ({}, None, 3, False, 3, "(as before)"),
        ({}, None, 3, True, 3, "(as before)"),
        ({"threads": 1}, None, 3, False, 1, "(--threads; before it was 3, so sums round"),
        ({}, "3", 5, False, 5, "(OMP_NUM_THREADS)"),
        ({}, None, "many", False, 4, "(probed; before it was many"),
    ],
)
def test_threads(
    flags, environment, kept, built_in, number, why, five_threads, tmp_path, monkeypatch
):
    """What the user says wins, then what the run had; the built-in model computes with one."""
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    if kept:
        (tmp_path / "checkpoint-2").mkdir()
        (tmp_path / "checkpoint-2" / "state.json").write_text(json.dumps({"threads": kept}))
        flags = flags | {"resume_from_checkpoint": "last"}
    monkeypatch.setattr(device, "faster", lambda most: (most - 1, "probed"))
    data = [str(world.HOME / "sft.jsonl" if built_in else "a.jsonl")]
    line = device.use_threads(SFTConfig(output_dir=str(tmp_path), dataset_name=data, **flags))
    assert torch.get_num_threads() == number and f"{number} thread" in line and why in line


@pytest.mark.parametrize("slow, number", [(1.0, 1), (0.5, 5), (5.0, 1)])
def test_one_thread_or_all_by_a_clock(slow, number, five_threads):
    """A product of five threads takes `slow` times that of one; the probe reads a clock that goes
    on by so much with each look. It is over in a fifth of a second, or after two slow products."""
    time = 0.0

    def now():
        nonlocal time
        time += 0.001 * (slow if torch.get_num_threads() == 5 else 1)
        return time

    got, why = device.faster(5, now)
    assert got == number and f"{1 / slow:.1f} times" in why
    assert why.endswith("--threads 1 takes one" if number == 5 else "--threads 5 takes them")
    assert time < 0.3 and device.faster(1) == (1, "one core")


def test_a_program_that_comes_later_is_spoken_of(five_threads):
    cpu = torch.device("cpu")
    assert [device.advice_on_threads(cpu, speed, 100) for speed in (100, 34)] == [None, None]
    assert "--threads 1 is faster than 5" in device.advice_on_threads(cpu, 33, 100)
    assert device.advice_on_threads(torch.device("cuda"), 1, 100) is None
    torch.set_num_threads(1)
    assert device.advice_on_threads(cpu, 1, 100) is None


def test_a_run_keeps_its_number_of_threads(model_dir, script, tmp_path, five_threads, monkeypatch):
    monkeypatch.setattr(device, "faster", lambda most: (2, "probed"))
    flags = dict(save_steps=1, max_steps=2, output_dir=tmp_path / "one")
    code, said, _ = script("sft", **flags)
    assert code == 0 and "2 threads (probed)" in said
    assert json.loads((tmp_path / "one" / "run.json").read_text())["settled"]["threads"] == 2
    monkeypatch.setattr(device, "faster", lambda most: (1, "probed"))
    code, said, _ = script("sft", **flags | dict(
        output_dir=tmp_path / "two", resume_from_checkpoint=tmp_path / "one" / "checkpoint-1",
    ))  # fmt: skip
    assert code == 0 and "2 threads (as before)" in said
    assert json.loads((tmp_path / "two" / "run.json").read_text())["state"]["threads"] == 2


def test_another_model_on_the_built_in_data(model_dir, script, adapter):
    """It need not have learned from train_sft.py; the built-in one does."""
    data = "runs/world/kto.jsonl"
    words = ["the built-in model is not trained yet: run train_sft.py first"]
    refused(script, "kto", model_name_or_path=None, dataset_name=None, expected=words)
    refused(
        script, "kto", model_name_or_path="org/model", dataset_name=data, expected=["org/model: "]
    )
    words = [f"{data}: No such file"]
    refused(script, "kto", model_name_or_path=model_dir, dataset_name=data, expected=words)
    given = dict(model_name_or_path=None, adapter_name_or_path=adapter)
    refused(script, "kto", dataset_name=data, expected=words, **given)


def test_a_tokenizer_that_skips_ids(tmp_path):
    """3 tokens, but one of them has the id 999."""
    vocab = {"<|im_start|>": 0, "<|im_end|>": 1, "a": 999}
    words = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny(LlamaConfig)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>").save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="the tokenizer has 1000 ids, the embeddings 320 rows"):
        load_policy(config(tmp_path))


@pytest.mark.parametrize("template", ["chatml", "native"])
def test_a_tokenizer_without_end_and_padding(template, model_dir, script, tmp_path):
    """Neither is needed: batches have no padding, and a reply ends with the template's marker."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.chat_template = ChatML.jinja if template == "native" else None
    tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    json_file("tokenizer_config.json", chat_template=tokenizer.chat_template or ...)(model)
    assert '"eos_token": null' in (model / "tokenizer_config.json").read_text()
    flags = f"--chat_template={template}"
    code, _, errors = script("sft", flags, model_name_or_path=model)
    assert code == 0 and not errors
    policy = load_policy(config(model, flags))
    talks = [[{"role": "user", "content": text}] for text in ("a", "a much longer one")]
    assert len(generate(policy, talks, max_new_tokens=3)) == 2
    assert policy.tokenizer.pad_token == "<|im_end|>"


def test_a_tokenizer_without_a_template(model_dir, script):
    words = ["the tokenizer has no chat template; use --chat_template chatml"]
    refused(script, "sft", "--chat_template=native", expected=words)
    assert script("sft")[0] == 0


@pytest.mark.parametrize("use_peft", [True, False])
def test_the_template_of_training_is_that_of_the_next_stage(use_peft, model_dir, tmp_path):
    """Of what is saved, and of what is merged; a flag wins."""
    model, how = shutil.copytree(model_dir, tmp_path / "model"), f"--use_peft={use_peft}"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ChatML.jinja
    tokenizer.save_pretrained(model)
    policy = load_policy(config(model, "--chat_template=native", how))
    save_policy(policy, tmp_path / "one")
    save_policy(policy, tmp_path / "one" / "checkpoint-3")
    source = "adapter" if use_peft else "model"
    words = [f"--{source}_name_or_path={tmp_path}/one/checkpoint-3", "--dataset_name=x.jsonl"]
    for flags, kind in (([], NativeTemplate), (["--chat_template=chatml"], ChatML)):
        next_stage = load_policy(parse(SFTConfig, [*words, *flags, "--device=cpu"], {}))
        assert type(next_stage.template) is kind
    save_policy(next_stage, tmp_path / "two")  # in ChatML, from native
    assert type(load_tokenizer(str(tmp_path / "two"))[1]) is ChatML
    assert type(load_tokenizer(str(model))[1]) is NativeTemplate  # nobody said which, it has one
    if use_peft:
        merge.main([str(tmp_path / "one"), str(tmp_path / "merged"), "--device=cpu"])
        assert type(load_tokenizer(str(tmp_path / "merged"))[1]) is NativeTemplate


def test_a_template_that_is_not_known_here(model_dir, tmp_path):
    model = shutil.copytree(model_dir, tmp_path / "model")
    json_file("tokenizer_config.json", nanoalign_template=["llama3"])(model)
    with pytest.raises(InputError, match="template \\['llama3'\\], which is not known here"):
        load_policy(config(model))
    load_policy(config(model, "--chat_template=chatml"))


# ----------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapter(model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    save_policy(load_policy(config(model_dir, "--lora_r", "4")), directory)
    return directory


def field(**changes):
    return json_file("adapter_config.json", **changes)


WEIGHTS = "adapter_model.safetensors"
BAD_ADAPTERS = {
    "r a word": (field(r="x"), "r is 'x'; expected a whole number"),
    "r 0": (field(r=0), "r is 0; expected a whole number"),
    "r negative": (field(r=-4), "r is -4"),
    "r true": (field(r=True), "r is True"),
    "r a fraction": (field(r=2.5), "r is 2.5"),
    "r huge": (field(r=10**12), "r is 1000000000000"),
    "r other": (field(r=8), r"has shape \(4, 32\), here it is \(8, 32\)"),
    "alpha a word": (field(lora_alpha="x"), "lora_alpha is 'x'"),
    "alpha 0": (field(lora_alpha=0), "lora_alpha is 0"),
    "alpha infinite": (field(lora_alpha=float("inf")), "lora_alpha is inf"),
    "alpha nan": (field(lora_alpha=float("nan")), "lora_alpha is nan"),
    "dropout 1": (field(lora_dropout=1), "lora_dropout is 1"),
    "dropout a list": (field(lora_dropout=[0.1]), r"lora_dropout is \[0.1\]"),
    "targets 3": (field(target_modules=3), "target_modules is 3; expected names"),
    "targets numbers": (field(target_modules=[3]), r"target_modules is \[3\]; expected names"),
    "targets a dict": (field(target_modules={"q_proj": 1}), "target_modules is "),
    "targets none": (field(target_modules=[]), "target_modules: no layer is left for LoRA"),
    "targets no regex": (field(target_modules="("), "no regex"),
    "targets strange": (field(target_modules=["c_attn"]), "c_attn: no linear layer"),
    "targets left out": (field(exclude_modules=".*"), "target_modules: no layer is left for LoRA"),
    "out a number": (field(exclude_modules=3), "exclude_modules is 3; expected names, or a regex"),
    "out no regex": (field(exclude_modules="*"), "exclude_modules: no regex: .*nothing to repeat"),
    "layers a word": (field(layers_to_transform="1"), "layers_to_transform is '1'; expected"),
    "layers strange": (field(layers_to_transform=[7]), "no layer is left for LoRA"),
    "layers before": (field(layers_to_transform=[1], layers_pattern="h"), "no layer is left"),
    "ranks a list": (field(rank_pattern=[2]), r"rank_pattern is \[2\]; expected a rank for each"),
    "ranks 0": (field(rank_pattern={"q_proj": 0}), "rank_pattern is {'q_proj': 0}"),
    "ranks other": (field(rank_pattern={"q_proj": 2}), r"has shape \(4, 32\), here it is \(2, "),
    "ranks no regex": (field(rank_pattern={"(": 2}), "rank_pattern: no regex"),
    "alphas a word": (field(alpha_pattern={"q_proj": "x"}), "alpha_pattern is {'q_proj': 'x'}"),
    "tying a word": (field(ensure_weight_tying="no"), "ensure_weight_tying is 'no'"),
    "dora": (field(use_dora=True), "use_dora is not known here"),
    "bias of B": (field(lora_bias=True), "lora_bias is not known here"),
    "bias a number": (field(bias=3), "bias is 3"),
    "bias a word": (field(bias="some"), "bias is 'some'; expected none, lora_only or all"),
    "rslora": (field(use_rslora="yes"), "use_rslora is 'yes'; expected true or false"),
    "modules 3": (field(modules_to_save=3), "modules_to_save is 3; expected a list of names"),
    "modules strange": (field(modules_to_save=["none_such"]), "none_such: the model has no module"),
    "modules of layers": (field(modules_to_save=["layers"]), "layers: holds whole layers"),
    "base gone": (field(base_model_name_or_path="./none"), "its base ./none is not there"),
    "base long": (field(base_model_name_or_path="x" * 5000), "xxx; expected a name"),
    "base NUL": (field(base_model_name_or_path="/a\0"), r"its base /a\\x00 is not there"),
    "rows 3": (field(trainable_token_indices=3), "trainable_token_indices is 3"),
    "rows words": (field(trainable_token_indices=["x"]), "trainable_token_indices is"),
    "rows negative": (field(trainable_token_indices=[-1]), "trainable_token_indices is"),
    "rows far": (field(trainable_token_indices=[9999]), "embed_tokens has no row 9999"),
    "rows nowhere": (field(trainable_token_indices={"x": [1]}), "x is no embedding"),
    "base a number": (field(base_model_name_or_path=3), "base_model_name_or_path is 3"),
    "another method": (field(peft_type="LOHA"), "peft_type LOHA; only LORA"),
    "no method": (field(peft_type=...), "peft_type None; only LORA"),
    "unknown": (field(use_magic=True), "use_magic is not known here"),
    "a list": (content("adapter_config.json", b"[]"), "no JSON object"),
    "a number": (content("adapter_config.json", b"3"), "no JSON object"),
    "cut": (shortened("adapter_config.json", 30), "not JSON"),
    "deep": (content("adapter_config.json", b'{"r": ' + b"[" * 100_000), "not JSON"),
    "UTF-16": (content("adapter_config.json", "{}".encode("utf-16")), "not JSON"),
    "no config": (removed("adapter_config.json"), "no adapter_config.json"),
    "no weights": (removed(WEIGHTS), f"{WEIGHTS}: not there"),
    "weights cut": (shortened(WEIGHTS, -9), f"{WEIGHTS}: damaged"),
    "weights empty": (shortened(WEIGHTS, 0), f"{WEIGHTS}: damaged"),
    "missing": (tensor_file(WEIGHTS, layers_1_mlp_up_proj_lora_B_weight=None), "lacks 1 tensors"),
    "nan": (tensor_file(WEIGHTS, layers_1_mlp_up_proj_lora_B_weight=lambda t: t * torch.nan),
            "layers.1.mlp.up_proj.lora_B.weight holds what is no finite number"),
    "whole numbers": (tensor_file(WEIGHTS, layers_1_mlp_up_proj_lora_B_weight=lambda t: t.int()),
                      "holds what is no finite number"),
    "another base": (lambda directory: None, "an adapter of another base"),
    "pickle": (lambda d: (removed(WEIGHTS)(d), torch.save({}, d / "adapter_model.bin")),
               f"{WEIGHTS}: not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_bad_adapters(name, adapter, model_dir, tmp_path):
    edit, words = BAD_ADAPTERS[name]
    directory = shutil.copytree(adapter, tmp_path / "adapter")
    edit(directory)
    if name == "another base":
        model_dir = tmp_path / "wide"
        LlamaForCausalLM(tiny(LlamaConfig, intermediate_size=96)).save_pretrained(model_dir)
        make_tokenizer().save_pretrained(model_dir)
    if name == "missing":
        load_policy(config(model_dir, "--adapter_name_or_path", str(adapter)))  # the good one
    cfg = config(model_dir, "--adapter_name_or_path", str(directory))
    if name.startswith("base "):
        cfg.model_name_or_path = None
    with pytest.raises(InputError, match=words) as error:
        load_policy(cfg)
    assert "\n" not in str(error.value)


def test_extra_tensors_and_no_base(adapter, tmp_path, script):
    directory = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(directory / WEIGHTS)
    save_file(tensors | {"more": torch.ones(1)}, directory / WEIGHTS)
    words = ["also has 1 tensors, e.g. more"]
    refused(script, "sft", adapter_name_or_path=directory, model_name_or_path=None, expected=words)
    field(base_model_name_or_path=None)(directory)
    words = ["names no base model; give --model_name_or_path"]
    refused(script, "dpo", adapter_name_or_path=directory, model_name_or_path=None, expected=words)
    refused(script, "kto", adapter_name_or_path="none", expected=["none: no adapter_config.json"])


def test_pefts_own_defaults_where_the_config_is_silent(adapter, model_dir, tmp_path):
    directory = shutil.copytree(adapter, tmp_path / "adapter")
    field(lora_alpha=..., lora_dropout=...)(directory)
    policy = load_policy(config(model_dir, "--adapter_name_or_path", str(directory)))
    assert (policy.lora.lora_alpha, policy.lora.lora_dropout) == (8, 0)


# --------------------------------------------------------------------------------------------- chat


def test_control_characters_are_shown_escaped():
    assert printable("a\x1b[2J\x07\x9b1m\u202e\u2028\x00\x7f\ufeff\ud800") == (
        r"a\x1b[2J\x07\x9b1m\u202e\u2028\x00\x7f\ufeff\ud800"
    )
    fine = "Zeilen\nund\tTabs, é, 漢字, \U0001f469\u200d\U0001f680"
    assert printable(fine) == fine
    right_to_left = "می\u200cخواهم, \u200fשלום\u200e!, \u061cسلام"
    assert printable(right_to_left) == right_to_left
    for override in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069":
        assert printable(f"a{override}b") == f"a\\u{ord(override):x}b"


def test_chat_prints_a_hostile_model_escaped(model_dir, tmp_path):
    """A model that says nothing but the escape character (byte 0x1b), and a line that rings."""
    directory = shutil.copytree(model_dir, tmp_path / "model")
    token = make_tokenizer()("\x1b", add_special_tokens=False)["input_ids"]
    assert len(token) == 1

    def only(head):
        return torch.zeros_like(head).index_fill_(0, torch.tensor(token), 1.0)

    tensor_file(
        lm_head_weight=only, embed_tokens_weight=torch.ones_like, model_norm_weight=torch.ones_like,
        **{f"layers_{i}_{name}_weight": torch.zeros_like
           for i in (0, 1) for name in ("mlp_down_proj", "self_attn_o_proj")},
    )(directory)  # fmt: skip
    flags = ["--prompt", "Hello", "--max_new_tokens", "3", "--device", "cpu", "--temperature", "0"]
    code, said, _ = command(tmp_path, "-m nanoalign.chat", directory, *flags)
    assert code == 0 and said.strip() == r"\x1b\x1b\x1b"


@pytest.mark.parametrize("name", ["none", "empty", "file"])
def test_chat_with_what_is_no_model(name, tmp_path):
    folder = tmp_path / "work"
    (folder / "empty").mkdir(parents=True)
    (folder / "file").write_text("x")
    code, said, errors = command(folder, "-m nanoalign.chat", f"./{name}", "--prompt", "Hello")
    assert code == 2 and not said
    assert errors.startswith("chat: error: ") and errors.count("\n") == 1


def test_the_checks_look_at_both_kinds_of_reference(model_dir, tmp_path):
    LlamaForCausalLM(tiny(LlamaConfig, vocab_size=290)).save_pretrained(tmp_path)
    cfg = config(model_dir, "--ref_model_name_or_path", str(tmp_path), kind=KTOConfig)
    with pytest.raises(InputError, match="has fewer tokens than the policy"):
        reference_of(cfg, load_policy(cfg), sigmoid, list)
    cfg = config(model_dir, "--ref_model_name_or_path", model_dir, kind=KTOConfig)
    policy = load_policy(cfg)
    policy.tokenizer = Namespace(get_vocab=lambda: {"a": 0, "b": 320})  # which skips ids
    with pytest.raises(InputError, match="has fewer tokens than the policy"):
        reference_of(cfg, policy, sigmoid, list)
