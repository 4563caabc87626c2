"""The benchmarks run, and compare what they say they compare; how fast is not asked here."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripts import METHODS, call, metrics, write_data

import nanoalign.train
from nanoalign import world
from nanoalign.chatml import ChatML
from nanoalign.formats.layouts import DPO, KTO, SFT, read_examples
from nanoalign.nf4 import NF4Linear
from nanoalign.packing import Example
from nanoalign.run import session
from nanoalign.run.flags import SFTConfig
from nanoalign.run.policy import load_policy

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import breakdown
import compare
import gpu
import growth
import ideas
import load_4bit
import ranks as two_ranks
import speedrun
import threads

ALL = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return compare.random_model("tiny", tmp_path_factory.mktemp("tiny"))


# ---------------------------------------------------------------------------------------- ideas.py


@pytest.fixture(scope="module")
def dpo(model, tmp_path_factory, no_curves):
    """idea -> the metrics of two DPO steps with it, and how often what it puts in place ran."""
    home = write_data(tmp_path_factory.mktemp("data"))

    def run(idea):
        flags, patches, calls = {}, [], []
        for change in ideas.variants()[idea]:
            flags.update(change) if isinstance(change, dict) else patches.append(change)

        def counted(replacement):
            return lambda *given, **more: calls.append(idea) or replacement(*given, **more)

        with pytest.MonkeyPatch.context() as patch:
            load = session.load_policy

            def load_and_patch(*given):
                policy = load(*given)
                for module, name, new in patches:
                    patch.setattr(module, name, counted(new) if callable(new) else new)
                return policy

            patch.setattr(session, "load_policy", load_and_patch)
            out = tmp_path_factory.mktemp("out")
            given = dict(
                model_name_or_path=model, dataset_name=home / "dpo.jsonl", output_dir=out,
                device="cpu", dtype="float32", max_steps=2, logging_steps=1, learning_rate=1e-2,
                per_device_train_batch_size=4, save_steps=9,
            )  # fmt: skip
            call("dpo", {**given, **flags})
        assert bool(calls) == any(callable(new) for *_, new in patches)
        return metrics(out)

    return run


@pytest.fixture(scope="module")
def as_it_is(dpo):
    return {False: dpo("as it is"), True: dpo("4 bits")}


@pytest.mark.parametrize("idea", [name for name in ideas.variants() if "compiled" not in name])
def test_an_idea_taken_away_changes_no_number(idea, dpo, as_it_is):
    """It costs time or memory: rewards, losses and gradients are the same."""
    lines, expected = dpo(idea), as_it_is["4 bits" in idea]
    names = {"loss", "grad_norm", "rewards/margins", "rewards/accuracies"}
    if "prompts" in idea:  # log-probs of the prompt are in both replies', and in no difference
        assert lines[0]["logps/chosen"] < expected[0]["logps/chosen"] - 1
    else:
        names |= {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"}
    steps = 1 if "dropout" in idea else 2  # the mask is another; B is 0 in the first step
    names -= {"grad_norm"} if "dropout" in idea else set()
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for line, other in zip(lines[:steps], expected):
        for name in names:
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


def test_what_the_ideas_save():
    """Tokens that are computed, or trained."""
    pair = Example([1, 2, 3], [([4, 5], [True, True]), ([6, 7, 8, 9], [False, True, True, True])])
    one, two = ideas.unshared([pair])
    assert one.prompt == two.prompt == pair.prompt
    assert [one.texts, two.texts] == [[c] for c in pair.texts]
    one, two = ideas.padded([pair])
    assert one.texts == [([4, 5, 0, 0], [True, True, False, False])]
    assert len(one) == len(two) == 7
    one, two = ideas.everywhere([pair])
    assert one.prompt == [1] and one.texts == [([2, 3, 4, 5], [True] * 4)]
    assert len(two) == 7 and sum(two.texts[0][1]) == 6


# --------------------------------------------------------------------------------------- growth.py


def test_best_calls_once_more_than_it_counts():
    calls = []
    assert growth.best(lambda: calls.append(1), times=2) >= 0 and len(calls) == 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
@pytest.mark.parametrize("plain", [False, True])
def test_head_memory_is_a_number(plain, capsys):
    growth.head_memory(500, plain)
    assert float(capsys.readouterr().out) >= 0
    assert growth.resident("VmHWM") >= growth.resident("VmRSS") > 10


def test_lengths_and_batches(model, monkeypatch, capsys):
    monkeypatch.setattr(growth, "best", lambda action: action() or 1.0)
    growth.lengths_and_batches(argparse.Namespace(model=model))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(" ms") for line in lines) == 10
    assert f"  one sequence of  4096 tokens {1e3 / 4096:>8.2f} ms" in lines
    assert f"  16 sequences of 128 tokens  {1e3 / 2048:>8.2f} ms" in lines


def test_attention_of_rows(monkeypatch, capsys):
    monkeypatch.setattr(growth, "best", lambda action, times: action() or 1.0)
    growth.attention_of_rows(examples=(1, 2), length=9)
    *_, one, two = capsys.readouterr().out.splitlines()
    assert one.endswith(f"9 tokens {1e6 / 9:>8.2f} us")
    assert two.endswith(f"18 tokens {1e6 / 18:>8.2f} us")


def test_packing_of_trees(monkeypatch, capsys):
    """So many replies of nine tokens to a prompt of nine; so many turns, each on the last one's."""
    monkeypatch.setattr(growth, "best", lambda action: (action(), 1.0)[1])
    growth.packing_of_trees(numbers=(1, 2), length=9)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:3] for line in lines] == [
        ["1", "branches", "17"], ["1", "turns", "21"],
        ["2", "branches", "25"], ["2", "turns", "42"],
    ]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_many_rows(model, capsys):
    """The ids are counted; how much more memory there is, beside a tokenizer, is not asked here."""
    growth.data_memory(20, 15, model)
    rows, ids, peak, seconds = map(float, capsys.readouterr().out.split())
    assert rows == 20 and 20 * 20 < ids * 2**18 < 20 * 400 and peak >= 0 and seconds >= 0


def test_pipeline(model, tmp_path, capsys):
    pytest.importorskip("trl")
    growth.pipeline(4, tmp_path, model)
    assert capsys.readouterr().out.count("examples/s, theirs") == 2


# -------------------------------------------------------------------------------------- compare.py


@ALL
def test_rows_of_random_words(method, tokenizer, tmp_path):
    path = compare.write_rows(tmp_path / "rows.jsonl", compare.random_rows(method, 6, 9))
    layouts = {"sft": SFT, "dpo": DPO, "kto": KTO}[method]
    examples, _ = read_examples([path], layouts, tokenizer, ChatML(tokenizer))
    assert len(examples) == 6 and all(len(e.texts) == 1 + (method == "dpo") for e in examples)


@ALL
def test_our_side_of_a_comparison(method, model, tmp_path, no_curves, monkeypatch):
    """What both sides are given, and what ours reports of it."""
    for module, name in ((nanoalign.train, "optimizer_step"), (session, "read_examples")):
        monkeypatch.setattr(module, name, getattr(module, name))  # it patches them for good
    args = argparse.Namespace(
        model=model, batch=2, steps=2, max_length=512, lora_dropout=0.0, device="cpu",
        dtype="float32", qlora=False, torch_compile=False, checkpointing=False, method=method,
        worker="ours", directory=str(tmp_path), sft_data=None, dpo_data=None, kto_data=None,
    )  # fmt: skip
    tokens, flops = compare.prepare(args, method, tmp_path)
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("ours", "theirs")
    )
    assert len(ours) == len(theirs) == 6 and all("prompt" in row for row in theirs)
    counted = sum(len(r["ids"][0]) + len(ids) for r in ours[2:] for ids, _ in r["ids"][1])
    assert tokens == counted and flops > 2 * tokens * 64**2
    compare.run_ours(args)
    result = json.loads((tmp_path / "ours.json").read_text())
    assert result["seconds"] > 0 and result["peak"] > 0
    if method != "sft":
        assert result["first"] == pytest.approx({"dpo": math.log(2), "kto": 0.5}[method], abs=1e-4)


def test_flops(model):
    """A prompt counts once; a backward pass of frozen weights is as much as a forward."""
    lm = load_policy(SFTConfig(model_name_or_path=model, device="cpu")).model
    prompt, reply = [1] * 10, ([2] * 5, [True] * 5)
    one = compare.flops_of(lm, prompt, [reply])
    assert one < compare.flops_of(lm, prompt, [reply, reply]) < 2 * one
    assert one < compare.flops_of(lm, prompt, [reply], backward=True) <= 2 * one


# ------------------------------------------------------------------------------------ breakdown.py


@pytest.mark.parametrize("qlora", [False, True])
def test_breakdown(qlora, model, no_curves, monkeypatch):
    """Its parts add up, and the products with the weights are as many as the model has."""
    args = argparse.Namespace(
        model=model, batch=2, steps=2, max_length=512, lora_dropout=0.0, device="cpu",
        dtype="float32", torch_compile=False, checkpointing=False, worker="ours", sft_data=None,
    )  # fmt: skip
    for module, name in ((nanoalign.train, "optimizer_step"), (session, "read_examples")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(compare, "Clock", compare.Clock)
    alone, counted = breakdown.alone, lambda products, dtype: sum(products.values())
    monkeypatch.setattr(breakdown, "alone", counted)
    for name, (owner, function) in breakdown.SCOPES.items():
        monkeypatch.setattr(owner, function, breakdown.scoped(name, getattr(owner, function)))
    seconds = breakdown.breakdown(args, "sft", qlora)
    # 2 layers of 7; backward has no use for the gradient of what the first q, k and v are given
    assert seconds.pop("weights alone") == 14 + 11
    assert alone({((9, 8), (8, 7)): 2}, torch.float32) > 0
    assert seconds.pop("all") == pytest.approx(sum(seconds.values()))
    assert all(value > 0 or name == "decoding" for name, value in seconds.items())
    assert bool(seconds["decoding"]) == qlora


# ------------------------------------------------------------------------------------ load_4bit.py


def test_load_4bit(tmp_path, capsys):
    load_4bit.write(tmp_path, layers=1, hidden=256, shard_mb=10)
    assert "in 2 shards" in capsys.readouterr().out
    load_4bit.measure(str(tmp_path), double_quant=False)
    said = capsys.readouterr().out
    assert "4-bit model" in said and "largest tensors" in said and "loaded in" in said


# -------------------------------------------------------------------------------------- threads.py


def test_threads(tmp_path, model, capsys, monkeypatch):
    data = write_data(tmp_path)
    flags = ["--model_name_or_path", model, "--dataset_name", str(data / "sft.jsonl")]
    flags += ["--max_steps", "2", "--logging_steps", "1"]
    assert threads.speed(flags, 1, "passive", str(tmp_path / "out"), limit=400) > 0
    assert math.isnan(threads.speed(flags, 1, "passive", str(tmp_path / "late"), limit=0.01))

    asked = []
    monkeypatch.setattr(threads, "speed", lambda *case: asked.append(case) or 1234.5)
    threads.main([])
    head, _, idle, busy = capsys.readouterr().out.splitlines()
    assert "1 thread |" in head and head.endswith(" 1,000 turns |") and len(asked) >= 4
    assert idle.count("1234 tok/s") == busy.count("1234 tok/s") == len(asked) // 2


# ------------------------------------------------------------------------------------------ gpu.py


def test_everything_for_a_gpu_on_a_cpu(tmp_path, capsys, no_curves):
    """Our side of it: one line of JSON for each measurement, and the table for the README."""
    flags = ["--tiny", "--here", "--device", "cpu", "--bases", "qlora"]
    flags += ["--parts", "kernels", "ours", "rows", "--out", str(tmp_path / "gpu.jsonl")]
    results = gpu.main(flags)
    written = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert written == json.loads(json.dumps(results))
    _, kernels, *runs = results
    assert kernels["attention of 48 tokens"]["error"] < 0.02 and kernels["copy_gb_s"] > 0
    assert [run["part"] for run in runs] == ["ours"] * 3 + ["rows"] * 2
    first = {"dpo": math.log(2), "kto": 0.5, "sft": math.log(320)}
    for run in runs:
        assert run["losses"][0] == pytest.approx(first[run["method"]], rel=0.02)
        assert run["tokens_per_second"] > 0 and run["tflops"] > 0 and run["first_step_s"] > 0
    table = capsys.readouterr().out
    assert "| TINY QLoRA DPO |" in table and "checkpointed, in rows of" in table


def test_six_minutes_of_a_gpu(capsys, no_curves):
    """In the order of worth; on a CPU with tiny models, and in this process."""
    flags = ["--quick", "--tiny", "--here", "--device", "cpu"]
    _, tests, *runs = gpu.main([*flags, "--parts", "tests", "ours", "kernels"])
    assert tests["passed"] > 10 and not tests["failed"] and tests["all"]
    told = [(run["part"], run["method"], run["base"]) for run in runs]
    models = [("dpo", "qlora"), ("dpo", "lora"), ("sft", "qlora")]
    ours = [("ours", *model) for model in models]
    assert told == [("compiled", *model) for model in models] + ours + [("kernels", "sft", "lora")]
    assert all(run["first_step_s"] > 0 for run in runs[:-1])
    assert f"{tests['passed']} passed; failed: none" in capsys.readouterr().out
    args = argparse.Namespace(tiny=False, device="cuda")
    assert sum(case.seconds for case in gpu.quick(args)) < 400
    assert {case.rows for case in gpu.quick(args) if case.part == "ours"} == {4096}


def test_who_is_stopped_midway_keeps_what_was_measured(tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, gpu.__file__, "--quick", "--tiny", "--device", "cpu"]
    command += ["--parts", "ours", "kernels", "--out", str(out)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    try:
        while process.poll() is None and (not out.exists() or out.read_text().count("\n") < 2):
            time.sleep(0.1)
        assert process.poll() is None, (tmp_path / "said").read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    machine, first = [json.loads(line) for line in out.read_text().splitlines()]
    assert machine["torch"] and first["part"] == "ours" and first["tokens_per_second"] > 0


@pytest.mark.parametrize("workers", ["", "[gw3] [ 25%] "], ids=["", "xdist"])
def test_tests_that_passed_and_failed(workers):
    said = ["head[in steps-cuda]", "nf4[(65, 31)-cuda]"]
    lines = ["== test session starts ==", f"FAILED t.py::test_{said[1]} - assert 1 < 0"]
    for word, name in zip(("PASSED", "FAILED"), said):
        test = f"t.py::test_{name}"
        lines.append(f"{workers}{word} {test}" if workers else f"{test} {word}  [ 25%]")
    assert gpu.outcomes("\n".join(lines)) == ({f"test_{said[0]}"}, {f"test_{said[1]}"})


def test_random_weights_are_those_that_are_packed():
    """Drawn in 4 bits, layer by layer, they are the dense model's, packed; tied tables stay one."""
    dense, packed = (gpu.random_model("tiny", "cpu", four_bits) for four_bits in (False, True))
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        linear, layer = (model.get_decoder().get_submodule(name) for model in (dense, packed))
        assert torch.equal(layer.dequantize(), NF4Linear.from_linear(linear).dequantize())
    for model in (dense, packed):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not any(p.requires_grad or p.is_meta for p in model.parameters())


@pytest.mark.parametrize("method, base", [("sft", "lora"), ("kto", "qlora"), ("dpo", "qlora")])
def test_their_side_trains_the_same_tokens(method, base, tmp_path, no_curves):
    for package in gpu.PEERS[base]:
        pytest.importorskip(package)
    case = gpu.Case("theirs", method, base, "tiny", "cpu", batch=2, warm=1, steps=1)
    theirs, ours = (way(case, tmp_path) for way in (gpu.theirs, gpu.ours))
    assert theirs["losses"][0] == pytest.approx(ours["losses"][0], rel=2e-3)
    tokenizer = gpu.words_tokenizer(320)
    ids = gpu.random_examples(case)[0].prompt + [1]
    text = " ".join(tokenizer.convert_ids_to_tokens(ids))
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_a_measurement_in_a_process_of_its_own(monkeypatch):
    """What goes wrong there, a crash or too long a wait, is a result like another."""
    case = gpu.Case("ours", "sft", "lora", "tiny", "cpu", batch=2, warm=1, steps=1)
    assert gpu.spawn(case)["tokens_per_second"] > 0
    assert "not done after 0 s" in gpu.spawn(replace(case, seconds=0.01))["error"]
    [late] = gpu.in_turn([case], minutes=0.1, here=False)
    assert late["error"] == "no time left"
    crash = argparse.Namespace(
        returncode=1, stdout="", stderr="Traceback\nOutOfMemoryError: full\n"
    )
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: crash)
    failed = gpu.spawn(case)
    assert failed["error"] == "OutOfMemoryError: full"
    assert "| TINY LoRA SFT | OutOfMemoryError: full |" in gpu.table([failed], None)


# --------------------------------------------------------------------------------------- ranks.py


def test_two_ranks(tmp_path, model, capsys, monkeypatch):
    data = write_data(tmp_path)
    flags = ["--model_name_or_path", model, "--dataset_name", str(data / "sft.jsonl")]
    rate, waiting, wire = two_ranks.run(
        [*flags, "--max_steps", "4", "--logging_steps", "1"], 2, str(tmp_path / "out")
    )
    assert rate > 0 and 0 < waiting < 1 and 0 < wire < 1

    asked = []
    shown = [(100.0, 0.0, 0.0), (150.0, 0.25, 0.125)]
    monkeypatch.setattr(two_ranks, "run", lambda *case: asked.append(case) or shown[case[1] - 1])
    two_ranks.main(["--model", "M", "--data", "D"])
    assert "| LoRA | 100 tok/s | 150 tok/s | 25.0% | 12.5% |" in capsys.readouterr().out
    assert [case[1] for case in asked] == [1, 2, 1, 2]


# ------------------------------------------------------------------------------------- speedrun.py


def test_a_speedrun_takes_flags_and_another_shape(tmp_path, monkeypatch, capsys):
    """Each kind of the held-out questions has its share, and the clock counted the training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world, "EACH", 8)
    monkeypatch.setattr(world, "HELD_OUT", 2)
    monkeypatch.setattr(speedrun, "SEEDS", (1, 2))
    trained = []
    counted = lambda *given: trained.append(given) or nanoalign.train.train(*given)  # noqa: E731
    monkeypatch.setattr(speedrun, "train", counted)
    more = "per_device_train_batch_size=64", "initializer_range=0.02"
    speedrun.main(["max_steps=2", "hidden_size=96", "model_type=llama", *more])
    for cfg, policy, examples, _ in trained:
        config = policy.model.config
        assert (cfg.max_steps, config.hidden_size, config.model_type) == (2, 96, "llama")
        assert len(examples) == 2 * 5 * 8 and config.initializer_range == 0.02
    head, *rows, mean = capsys.readouterr().out.splitlines()[-4:]
    assert head.startswith("seed") and mean.startswith("mean")
    assert [row.split()[0] for row in rows] == ["1", "2"] == [str(c.seed) for c, *_ in trained]
    assert all(float(row.split()[1]) > 0 and row.count(",") == 4 for row in rows)
