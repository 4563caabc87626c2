"""The clinic of notebook 9: eight broken runs, and how they were made. THE ANSWERS ARE IN HERE.

    python -m notebooks.clinic.ward        # makes notebooks/clinic/*/ again, in two minutes

A run is a healthy one but for a flag or a line. Of each there is what a stranger would send:
metrics.jsonl, and replies to six questions in replies.txt.
"""

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import torch
import transformers

import train_dpo
import train_sft
from nanoalign import world
from nanoalign.chatml import ChatML
from nanoalign.formats.templates import TEMPLATES
from nanoalign.model import generate
from nanoalign.run.flags import Config, DPOConfig, SFTConfig, parse
from nanoalign.run.policy import load_policy
from nanoalign.run.report import read_run
from nanoalign.tools.merge import main as merge

HERE = Path(__file__).parent
BASE = str(world.BASE)  # untrained
KEPT = "step", "loss", "grad_norm", "rewards/chosen", "rewards/rejected"
KEPT += "logps/chosen", "logps/rejected"


class WholeText(ChatML):
    """The question trains too."""

    def pieces(self, messages, tools=()):
        return ((piece, True) for piece, _ in super().pieces(messages, tools))


class NoEnd(ChatML):
    """The marker that ends a reply does not train."""

    def pieces(self, messages, tools=()):
        *rest, (end, _) = super().pieces(messages, tools)
        yield from [*rest, (end, False)]


TEMPLATES |= {"whole_text": WholeText, "no_end": NoEnd}

COMMON = dict(device="cpu", seed=42, save_steps=0)
DPO = COMMON | dict(
    model_name_or_path="healthy-sft", dataset_name="dpo.jsonl", per_device_train_batch_size=16,
    max_steps=16, learning_rate=1e-3, lr_scheduler_type="constant", beta=0.5, logging_steps=2,
)  # fmt: skip
TASKS = {  # the flags of a healthy run
    # answer "Where is it?"
    "sft": COMMON | dict(
        model_name_or_path=BASE, dataset_name="sft.jsonl", per_device_train_batch_size=16,
        max_steps=150, learning_rate=4e-3, lr_scheduler_type="cosine", warmup_ratio=0.05,
        weight_decay=0.05, adam_beta2=0.95, use_peft=False, disable_dropout=True, logging_steps=5,
    ),
    # then prefer the sentence
    "dpo": DPO,
    # or prefer the full stop: pairs that are the same but for it
    "stop": DPO | dict(dataset_name="stop.jsonl", beta=8.0, learning_rate=2e-3),
}  # fmt: skip

PATIENTS = {  # the task, and what was done to it
    1: {"task": "sft", "chat": {"chat_template": "none"}},
    2: {"task": "sft", "flags": {"chat_template": "whole_text"}},
    3: {"task": "dpo", "flags": {"learning_rate": 1e-5}},
    4: {"task": "dpo", "flags": {"dataset_name": "swapped.jsonl"}},
    5: {"task": "sft", "flags": {"chat_template": "no_end"}},
    6: {"task": "dpo", "merged_into": BASE},
    7: {"task": "dpo", "flags": {"ref_model_name_or_path": BASE}},
    8: {"task": "stop", "flags": {"beta": 0.01}},
}


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in open(path) if "Where is it?" in line]


def open_ward() -> None:
    """The world and the data of all tasks, in the directory we are in."""
    world.build()
    pairs = rows_of(world.HOME / "dpo.jsonl")
    files = {
        "sft": rows_of(world.HOME / "sft.jsonl"),
        "dpo": pairs,
        "swapped": [dict(p, chosen=p["rejected"], rejected=p["chosen"]) for p in pairs],
        "stop": [dict(p, rejected=p["chosen"].removesuffix(".")) for p in pairs],
    }
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(task: str, output_dir: str, **flags) -> list[dict]:
    """Train for a task, with the flags of a healthy run but for these. -> its lines of metrics."""
    kind, script = (
        (SFTConfig, train_sft.run_sft) if task == "sft" else (DPOConfig, train_dpo.run_dpo)
    )
    flags = TASKS[task] | {"output_dir": output_dir} | flags
    with contextlib.redirect_stdout(io.StringIO()):
        script(parse(kind, [f"--{name}={value}" for name, value in flags.items()], {}))
    return [{name: line[name] for name in KEPT if name in line}
            for line in read_run(Path(output_dir)) if "loss" in line]  # fmt: skip


def ask(directory: str, **chat) -> list[tuple[dict, str]]:
    """A sampled reply to each of 100 held-out questions; `chat` are flags of the chat."""
    adapter = Path(directory, "adapter_config.json").exists()
    name = "adapter_name_or_path" if adapter else "model_name_or_path"
    # a template's class that is broken in training is ChatML in the chat
    flags = {"chat_template": "chatml", name: directory} | chat
    asked = rows_of(world.HOME / "test.jsonl")
    with contextlib.redirect_stdout(io.StringIO()):
        policy = load_policy(Config(device="cpu", **flags))
    torch.manual_seed(1)
    prompts = [[{"role": "user", "content": row["question"]}] for row in asked]
    return list(zip(asked, generate(policy, prompts, max_new_tokens=24, temperature=1.0)))


def fall_ill(number: int, **more) -> tuple[list[dict], list[tuple[dict, str]]]:
    """Do to a run what was done to this patient. -> its metrics and its replies. The healthy runs
    must be there; `more` are flags."""
    patient, directory = PATIENTS[number], f"patient-{number}"
    task = patient["task"]
    if "flags" in patient:
        lines = run(task, directory, **patient["flags"], **more)
    else:  # training was healthy
        directory = f"healthy-{task}"
        lines = read_run(Path(directory))
    if "merged_into" in patient:
        with contextlib.redirect_stdout(io.StringIO()):
            merge([directory, "merged", "--model_name_or_path", patient["merged_into"]])
        directory = "merged"
    return lines, ask(directory, **patient.get("chat", {}))


def write(name: str, lines: list[dict], replies: list[tuple[dict, str]]) -> None:
    """What is known of a run, under notebooks/clinic."""
    (HERE / name).mkdir(exist_ok=True)
    short = [{k: float(f"{line[k]:.4g}") for k in KEPT if k in line} for line in lines]
    short = [line | {"step": int(line["step"])} for line in short if "loss" in line]
    text = "".join(json.dumps(line) + "\n" for line in short)
    (HERE / name / "metrics.jsonl").write_text(text, encoding="utf-8")
    text = "".join(f"{row['question']} -> {reply!r}\n" for row, reply in replies[:6])
    (HERE / name / "replies.txt").write_text(text, encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        open_ward()
        for task in TASKS:
            write(f"healthy-{task}", run(task, f"healthy-{task}"), ask(f"healthy-{task}"))
        for number in PATIENTS:
            write(str(number), *fall_ill(number))
            print(f"patient {number}")
        os.chdir(HERE)


if __name__ == "__main__":
    main()
