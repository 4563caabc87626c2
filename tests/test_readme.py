"""README says what is true: its commands run, its file tree is the real one."""

import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_quantized
import torch
from safetensors.torch import load_file
from scripts import METHODS, call, metrics, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dpo
from nanoalign import lora, losses, world
from nanoalign.formats import layouts
from nanoalign.model import make_policy
from nanoalign.packing import Example, pack
from nanoalign.run import flags as run_flags
from nanoalign.run import record
from nanoalign.run.flags import SFTConfig, parse
from nanoalign.train import make_optimizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
BLOCKS = [text for language, text in FENCED if not language]
PYTHON = [text for language, text in FENCED if language == "python"]


def commands() -> list[list[str]]:
    """The `python ...` commands of README's code blocks, in order, as words; of torchrun's, what it
    is to start (test_ranks.py starts it so)."""
    text = "\n".join(BLOCKS).replace("\\\n", " ")
    parts = [part.strip() for line in text.splitlines() for part in line.split("&&")]
    parts = [re.sub(r"^torchrun --nproc_per_node \d+ ", "python ", part) for part in parts]
    return [shlex.split(part, comments=True)[1:] for part in parts if part.startswith("python ")]


def rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory, model_dir):
    """A directory to stand in, with small data for README's placeholders."""
    home = tmp_path_factory.mktemp("readme")
    asked = [f"What is {i}?" for i in range(8)]
    pairs = [dict(prompt=q, chosen="Good.", rejected="Bad!") for q in asked]
    thumbs = [dict(prompt=q, completion="Yes.", label=i % 2 == 0) for i, q in enumerate(asked)]
    names = {
        "MODEL": model_dir,
        "DATA": rows(home / "d.jsonl", *(dict(prompt=q, completion="Yes, it is.") for q in asked)),
        "PAIRS": rows(home / "p.jsonl", *pairs),
        "THUMBS": rows(home / "t.jsonl", *thumbs),
    }
    return home, names


def run(words: list[str], home, monkeypatch) -> None:
    """`python WORDS` in this process, standing in `home`; built-in runs are cut to two steps."""
    directory, names = home
    words = [re.sub(r"\b(MODEL|DATA|PAIRS|THUMBS)\b", lambda m: names[m[0]], w) for w in words]
    monkeypatch.chdir(directory)
    monkeypatch.setattr(world, "EACH", 40)
    monkeypatch.setattr(world, "HELD_OUT", 2)
    if words[0].startswith("train_") and not any("_name_or_path" in word for word in words):
        words = [*words, "--max_steps", "2"]
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    before = torch.random.get_rng_state()
    try:
        if words[0] == "-m":
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    finally:
        torch.random.set_rng_state(before)


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:40])
def test_commands_run(words, home, monkeypatch, capsys):
    if "nanoalign.chat" in words:  # a person talks to it; here one prompt does
        words = [*words, "--prompt", "Hello", "--max_new_tokens", "4"]
    if "nanoalign.plot" in words:
        pytest.importorskip("matplotlib")
    run(words, home, monkeypatch)
    assert "error" not in capsys.readouterr().err


def test_there_are_commands_for_everything():
    spoken = " ".join(" ".join(words) for words in commands())
    for name in ("train_sft.py", "train_dpo.py", "train_kto.py", "chat", "merge", "plot", "data"):
        assert name in spoken


def test_the_two_commands_stand_as_they_are():
    lines = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
    assert "pip install -e . && python train_sft.py" in lines
    assert 'pip install -e ".[test]" && pytest' in lines


def test_the_file_tree_is_the_real_one():
    tree = next(block for block in BLOCKS if "nanoalign/\n" in block)
    told, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            told.add(folder + name)
        else:
            folder = name if name.endswith("/") else ""
            told.add(name)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    apart = "tests/", "benchmarks/", "experiments/", "exercises/"
    files = [f for f in listed.stdout.splitlines() if (ROOT / f).exists()]
    real = {f for f in files if f.endswith(".py") and f.count("/") <= 1}
    real = {f for f in real if not f.startswith(apart)}
    folders = {f.split("/")[0] + "/" for f in files if "/" in f and not f.startswith(".")}
    rooms = {f.rpartition("/")[0] + "/" for f in files if re.match("nanoalign/.*/.*py", f)}
    assert told == (real - {"nanoalign/__init__.py"}) | folders | rooms


def test_the_lesson_runs_without_files_and_flags(model_dir, monkeypatch, capsys):
    """Its snippet, on a model of transformers: the one sentence is learned."""
    monkeypatch.chdir("/")  # nothing is written beside it
    (code,) = [block for block in PYTHON if "make_policy" in block]
    torch.manual_seed(0)
    exec(code, {"MODEL": model_dir})
    *lines, reply = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[1]) for line in lines]
    assert len(losses) == 30 and losses[-1] < 0.8 * losses[0] and reply.startswith("['")


def test_the_loss_example_works(model_dir, tmp_path, monkeypatch, capsys):
    """The function, its name in the table and the line of its number are a loss; and a loss that
    asks for no reference loads none and computes none."""
    function, number = [block for block in PYTHON if "dpop_lambda" in block]
    scope, flags = dict(vars(losses)), dict(vars(run_flags), dataclass=dataclass)
    exec(function, scope)
    monkeypatch.setitem(losses.DPO_LOSSES, "dpop", scope["dpop"])
    exec(f"@dataclass\nclass OwnConfig(DPOConfig):\n{number}", flags)
    pairs = [dict(prompt=f"What is {i}?", chosen="Good.", rejected="Bad!") for i in range(8)]
    words = ["--model_name_or_path", model_dir, "--device", "cpu", "--overwrite_output_dir", "true"]
    words += ["--dataset_name", rows(tmp_path / "p.jsonl", *pairs), "--learning_rate", "1e-2"]
    words += ["--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--logging_steps", "1"]

    def run(*more):
        train_dpo.run_dpo(parse(flags["OwnConfig"], [*words, *more], {}))
        lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    policy, reference = (losses.Pair(*map(torch.tensor, pair)) for pair in ((-3, -9), (-2, -5)))
    # the margin is -1 - -4 = 3 and the chosen reply has fallen by 1: z = 0.5 * (3 - 2 * 1)
    assert scope["dpop"](policy, reference, 0.5, 2.0).item() == pytest.approx(0.4740770)
    plain, free = run(), run("--loss_type", "dpop", "--dpop_lambda", "0")
    assert plain == free and free[-1] < free[0]  # at lambda 0 it is DPO
    capsys.readouterr()
    parse(flags["OwnConfig"], [*words, "--loss_type", "ipo", "--dpop_lambda", "1"], {})
    assert capsys.readouterr().out == "--dpop_lambda has nothing to do in this run\n"

    def no_reference(self):
        raise AssertionError("a loss without a reference needs none")

    monkeypatch.setattr(lora.Reference, "__call__", no_reference)
    for loss in ("simpo", "orpo"):
        found = run("--loss_type", loss)
        assert found[-1] < found[0]


def test_the_format_example_is_the_tested_one():
    assert inspect.getsource(test_quantized.Int8Linear).strip() in README


def test_the_layout_example_is_one_line_of_a_table():
    (line,) = [block for block in PYTHON if '"ask"' in block]
    assert eval("{" + line + "}", vars(layouts)) == {("ask", "good", "bad"): layouts.answered}


def test_two_optimizers_as_one_are_resumed(model_dir, data, tmp_path, monkeypatch, no_curves):
    """Muon, where torch has it, for A and B, and AdamW for a norm: bit for bit, from a checkpoint
    with the states of both."""
    (code,) = [block for block in PYTHON if "class Both" in block]
    scope, kind = {"torch": torch}, getattr(torch.optim, "Muon", torch.optim.SGD)
    exec(code, scope)

    def both(cfg, lm):
        named = {n: p for n, p in lm.named_parameters() if p.requires_grad}
        parts = [[p for n, p in named.items() if (".lora_" in n) is lora] for lora in (True, False)]
        matrices = kind(parts[0], lr=cfg.learning_rate, momentum=0.9)
        return scope["Both"](matrices, torch.optim.AdamW(parts[1], lr=cfg.learning_rate))

    monkeypatch.setattr(record, "make_optimizer", both)
    given = dict(model_name_or_path=model_dir, dataset_name=str(data / "sft.jsonl"), device="cpu")
    given |= dict(lora_modules_to_save="norm", max_steps=4, save_steps=2, learning_rate=1e-2)
    call("sft", given | dict(output_dir=str(tmp_path / "whole")))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    keys = {name.partition(".")[0] for name in load_file(checkpoint / "state.safetensors")}
    assert keys >= {"momentum_buffer", "exp_avg"}
    resumed = dict(output_dir=str(tmp_path / "other"), resume_from_checkpoint=str(checkpoint))
    call("sft", given | resumed)
    assert tensors(tmp_path / "other") == tensors(tmp_path / "whole")


def test_the_head_example_finds_the_ends_of_replies(model_dir):
    """The states before each reply's last token, as transformers has them of whole sequences; and a
    head of the policy's is among what trains."""
    (code,) = [block for block in PYTHON if "head(" in block]
    model, tokenizer = (
        kind.from_pretrained(model_dir) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    policy, head = make_policy(model, tokenizer, r=2), torch.nn.Linear(32, 1)
    pairs = [([5, 6, 7], [8, 9, 10, 11], [12, 13]), ([14], [15, 16], [17, 18, 19])]
    batch = [Example(p, [(ids, [True] * len(ids)) for ids in both]) for p, *both in pairs]
    policy.lm.reward = head
    scope = {"policy": policy, "head": head, "batch": batch, "pack": pack, "torch": torch}
    exec(code, scope)
    plain, expected = AutoModelForCausalLM.from_pretrained(model_dir), []
    for prompt, *both in pairs:
        for ids in both:
            row = torch.tensor([prompt + ids[:-1]])
            expected.append(head(plain.get_decoder()(row).last_hidden_state[0, -1]))
    assert torch.allclose(scope["rewards"], torch.cat(expected), atol=1e-5)
    groups = make_optimizer(SFTConfig(), policy.lm).param_groups
    assert any(p is head.weight for group in groups for p in group["params"])


# ---------------------------------------------------------------------------------------- recipes

RECIPES = sorted((ROOT / "config").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(path, model_dir, data, tmp_path, no_curves):
    """Two steps of each file of config/, by the command that stands in it, on a tiny model."""
    [command] = re.findall(
        r"^# +python train_(\w+)\.py --config (\S+) (.*)", path.read_text(), re.M
    )
    method, file, words = command
    assert ROOT / file == path
    if "--adapter_name_or_path" in words:
        sft = dict(model_name_or_path=model_dir, dataset_name=str(data / "sft.jsonl"), device="cpu")
        call("sft", sft | dict(output_dir=str(tmp_path / "sft"), max_steps=1))
    names = {"MODEL": model_dir, "sft": tmp_path / "sft", words.split()[-1]: tmp_path / "out"}
    names |= dict.fromkeys(("DATA", "PAIRS", "THUMBS"), data / f"{method}.jsonl")
    words = [str(names.get(word, word)) for word in words.split()]
    words += ["--max_steps", "2", "--logging_steps", "1", "--device", "cpu"]
    kind, script = METHODS[method]
    script(parse(kind, ["--config", str(path), *words], {}))
    assert len([x for x in metrics(tmp_path / "out") if "loss" in x]) == 2
