"""The loop and the three scripts, each run in the process on a few examples of its own."""

import json
import math
import random

import pytest
import torch
from conftest import make_tokenizer, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, get_scheduler

from nanoalign.logps import PackedLM
from nanoalign.lora import LoRALinear
from nanoalign.run import session
from nanoalign.run.flags import SCHEDULES, DPOConfig, KTOConfig, SFTConfig, parse
from nanoalign.run.record import rescale
from nanoalign.train import learning_rate, optimizer_step, plan
from train_dpo import run_dpo
from train_kto import run_kto
from train_sft import run_sft

METHODS = {"sft": (SFTConfig, run_sft), "dpo": (DPOConfig, run_dpo), "kto": (KTOConfig, run_kto)}
ALL = pytest.mark.parametrize("method", METHODS)
WITH_REFERENCE = pytest.mark.parametrize("method", ["dpo", "kto"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """11 examples of each method, their replies of many lengths; three of them share a prompt."""
    home, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(longest):
        words = "Paris is the capital of France. Light is scattered, thank you.".split()
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    rows = {"sft": [], "dpo": [], "kto": []}
    for i in range(11):
        prompt = "Why is the sky blue?" if i % 4 == 0 else text(9)
        rows["sft"].append({"prompt": prompt, "completion": text(12)})
        rows["dpo"].append({"prompt": prompt, "chosen": text(12), "rejected": text(5)})
        rows["kto"].append({"prompt": prompt, "completion": text(12), "label": i % 3 != 0})
    for method in rows:
        lines = [json.dumps(row) + "\n" for row in rows[method]]
        (home / f"{method}.jsonl").write_text("".join(lines))
    return home


@pytest.fixture
def run(model_dir, data, tmp_path):
    """run(method, *flags) -> the lines of metrics.jsonl; what it wrote is in run.directory."""
    defaults = {
        "--model_name_or_path": model_dir,
        "--device": "cpu",
        "--learning_rate": "1e-2",
        "--max_steps": "3",
        "--logging_steps": "1",
        "--per_device_train_batch_size": "4",
        "--lora_r": "4",
    }

    def go(method, *flags):
        kind, script = METHODS[method]
        go.directory = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        full = "--use_peft" in flags
        given = {k: v for k, v in defaults.items() if not (full and k == "--lora_r")}
        given["--dataset_name"] = str(data / f"{method}.jsonl")
        given["--output_dir"] = str(go.directory)
        given |= dict(zip(flags[::2], flags[1::2]))
        given = {name: value for name, value in given.items() if value is not None}
        script(parse(kind, [word for pair in given.items() for word in pair], {}))
        return [json.loads(line) for line in open(go.directory / "metrics.jsonl")]

    return go


def column(lines, name):
    return [line[name] for line in lines if name in line]


def adapter(directory):
    return load_file(directory / "adapter_model.safetensors")


def same(tensors, others):
    assert tensors.keys() == others.keys()
    return all(torch.equal(tensors[name], others[name]) for name in tensors)


# ------------------------------------------------------------------------------------- schedules


WARMUPS = {"none": ({}, 0), "ratio": ({"warmup_ratio": 0.13}, 7)}  # ceil(0.13 * 50) = 7
WARMUPS |= {"share": ({"warmup_steps": 0.13}, 7), "steps": ({"warmup_steps": 7}, 7)}


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize("numbers", [{}, {"num_cycles": 3, "power": 2.0, "lr_end": 1e-6}], ids=str)
def test_schedules_are_those_of_transformers(shape, warmup, numbers):
    flags, warmup_steps = WARMUPS[warmup]
    numbers = {name: n for name, n in numbers.items() if name in SCHEDULES[shape]}
    cfg = SFTConfig(
        learning_rate=3e-4, lr_scheduler_type=shape, lr_scheduler_kwargs=numbers, **flags
    )
    optimizer, total = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4), 50
    theirs = get_scheduler(shape, optimizer, warmup_steps, total, numbers)
    for step in range(total):
        assert math.isclose(learning_rate(cfg, step, total), theirs.get_last_lr()[0], rel_tol=1e-9)
        optimizer.step()
        theirs.step()


def test_how_many_steps():
    cfg = SFTConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2)  # 8 a step
    for examples, passes, steps, begun in (
        (16, 3.0, 6, 3),
        (17, 3.0, 9, 3),  # the last step of an epoch takes what is left
        (17, 0.5, 2, 1),
        (80, 1.25, 13, 2),  # 12.5 steps
        (1, 0.001, 1, 1),
    ):
        cfg.num_train_epochs = passes
        per_epoch, total = plan(cfg, examples)
        assert (total, math.ceil(total / per_epoch)) == (steps, begun)
    cfg.max_steps = 5
    assert plan(cfg, 17) == (3, 5)


# --------------------------------------------------------------------------------------- metrics

SHARED = {"step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens"}
SHARED |= {"tokens_per_second", "time"}
SIDES = {f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in ("chosen",)}
SIDES |= {name.replace("chosen", "rejected") for name in SIDES} | {"rewards/margins"}
OWN = {"sft": set(), "dpo": SIDES | {"rewards/accuracies"}, "kto": SIDES | {"kl"}}


@ALL
def test_metrics_have_the_documented_names(method, run, data):
    """6 steps of 4 examples of 11: two epochs; an evaluation every 4 steps and at the end."""
    evaluation = ("--eval_dataset", str(data / f"{method}.jsonl"), "--eval_steps", "4")
    lines = run(method, "--num_train_epochs", "2", "--max_steps", "-1", *evaluation)
    train = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "eval_loss" in line]
    assert column(train, "step") == [1, 2, 3, 4, 5, 6] and column(evals, "step") == [4, 6]
    assert column(train, "epoch") == pytest.approx([i / 3 for i in range(1, 7)])
    whole = [line for line in train if line["step"] not in (3, 6)]  # of 3 examples: labels may lack
    assert all(set(line) <= SHARED | OWN[method] for line in train)
    assert set().union(*train) == SHARED | OWN[method] and len(whole) == 4
    for line in evals:
        assert set(line) == {f"eval_{name}" for name in {"loss"} | OWN[method]} | (
            {"step", "epoch", "time"}
        )
    assert all(math.isfinite(value) for line in lines for value in line.values())
    tokens, times = column(train, "num_tokens"), column(lines, "time")
    assert tokens == sorted(tokens) and tokens[5] == 2 * tokens[2] and times == sorted(times)
    assert column(train, "learning_rate") == pytest.approx([1e-2 * (6 - i) / 6 for i in range(6)])


@ALL
def test_logging_steps_average_over_the_steps_since_the_last_line(method, run):
    """Every example weighs the same (SFT: every token), in a line as in a step."""
    one = run(method, "--learning_rate", "0", "--num_train_epochs", "1", "--max_steps", "-1")
    three = run(
        method, "--learning_rate", "0", "--num_train_epochs", "1", "--max_steps", "-1",
        "--logging_steps", "3",
    )  # fmt: skip
    whole = run(
        method, "--learning_rate", "0", "--max_steps", "1", "--per_device_train_batch_size", "11"
    )
    assert column(one, "step") == [1, 2, 3] and column(three, "step") == [3]
    assert three[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    if method != "sft":  # 4, 4 and 3 examples
        mean = sum(line["loss"] * n for line, n in zip(one, (4, 4, 3))) / 11
        assert three[0]["loss"] == pytest.approx(mean, rel=1e-5)


def test_the_first_step_on_request(run):
    flags = ("--logging_steps", "2", "--max_steps", "4")
    assert column(run("sft", *flags), "step") == [2, 4]
    assert column(run("sft", *flags, "--logging_first_step", "true"), "step") == [1, 2, 4]


@WITH_REFERENCE
def test_where_training_starts(method, run):
    """The policy is the reference: DPO's loss is ln 2, KTO's 1/2, and all rewards are 0."""
    first = run(method, "--max_steps", "1")[0]
    assert first["loss"] == pytest.approx(math.log(2) if method == "dpo" else 0.5, abs=1e-6)
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/rejected"]) < 1e-5
    assert first.get("rewards/accuracies", 0) == 0  # a tie is not a win


@ALL
def test_training_lowers_the_loss(method, run):
    lines = run(method, "--max_steps", "12", "--per_device_train_batch_size", "11")
    losses = column(lines, "loss")
    assert losses[-1] < 0.8 * losses[0]


# ------------------------------------------------------------------------------------ evaluation


@ALL
def test_evaluation_does_not_depend_on_its_batch_size(method, run, data):
    """Neither its loss nor a metric; KTO's z0 is that of the whole set too."""
    evaluations = []
    for size in ("1", "3", "11"):
        lines = run(
            method, "--eval_dataset", str(data / f"{method}.jsonl"),
            "--per_device_eval_batch_size", size,
        )  # fmt: skip
        line = lines[-1]
        evaluations.append([v for k, v in line.items() if k.startswith("eval_")])
    assert len(evaluations[0]) == 1 + len(OWN[method])
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-4, abs=1e-5)
    assert evaluations[2] == pytest.approx(evaluations[0], rel=1e-4, abs=1e-5)
    if method == "kto":
        assert line["eval_kl"] > 0  # where a mean of clamped batches would differ


def test_the_kl_of_kto_is_measured_on_other_prompts_replies(run, model_dir, data):
    """The log-ratios of (x_i, y'_i) written out: the policy is the trained adapter, merged."""
    lines = run("kto", "--eval_dataset", str(data / "kto.jsonl"), "--use_peft", "false")
    rows = [json.loads(line) for line in open(data / "kto.jsonl")]
    tokenizer = make_tokenizer()

    def logp(model, prompt, reply):
        start = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        x, y = (tokenizer(text)["input_ids"] for text in (start, reply + "<|im_end|>"))
        z = model(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1)
        return z.gather(1, torch.tensor(y)[:, None]).sum()

    policy = AutoModelForCausalLM.from_pretrained(run.directory)
    reference = AutoModelForCausalLM.from_pretrained(model_dir)
    ratios = []
    with torch.no_grad():
        for i, row in enumerate(rows):
            others = [rows[i - back] for back in range(1, len(rows))]
            reply = next(o for o in others if o["prompt"] != row["prompt"])["completion"]
            ratios.append(
                logp(policy, row["prompt"], reply) - logp(reference, row["prompt"], reply)
            )
    expected = max(0.0, float(sum(ratios)) / len(ratios))
    assert lines[-1]["eval_kl"] == pytest.approx(expected, rel=1e-4) and expected > 0


def test_a_row_is_held_out_whole(run, data, monkeypatch):
    """Thumbs up and down of one pair stay together: neither's prompt is trained on and measured."""
    split, hold_out = [], session.hold_out
    monkeypatch.setattr(session, "hold_out", lambda *given: split.extend(hold_out(*given)) or split)
    run("kto", "--dataset_name", str(data / "dpo.jsonl"), "--eval_fraction", "0.4")
    trained, held_out = ([e.where for e in examples] for examples in split)
    assert len(held_out) == 2 * round(0.4 * 11) and len(trained) == 22 - len(held_out)
    assert not set(trained) & set(held_out)


def test_replies_are_shown_beside_those_at_the_start(run, model_dir, capsys):
    """Whatever model the loss compares with: it is the policy that is asked, as it was."""
    flags = ("--generate_during_eval", "true", "--eval_fraction", "0.3")
    run("dpo", "--ref_model_name_or_path", model_dir, *flags)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    names = [words[0] for words in lines if words[-1][:1] in "'\""]
    assert names == ["prompt", "policy", "start"] * 3


# --------------------------------------------------------------------------- where logps come from


@WITH_REFERENCE
def test_policy_and_reference_see_a_reply_in_the_same_row(method, run, monkeypatch):
    """And KTO's y' too, or its z0 begins with the rounding of bfloat16 instead of 0."""
    rows, whole = {True: [], False: []}, PackedLM.forward

    def forward(self, examples, *more):
        asked = [([*e.prompt], [([*ids], [*mask]) for ids, mask in e.texts]) for e in examples]
        if layers := [m for m in self.modules() if isinstance(m, LoRALinear)]:
            rows[not layers[0].enabled].append(asked)
        return whole(self, examples, *more)

    monkeypatch.setattr(PackedLM, "forward", forward)
    run(method, "--max_row_tokens", "40")
    assert len(rows[True]) > 3 and sorted(rows[True]) == sorted(rows[False])


@WITH_REFERENCE
@pytest.mark.parametrize("shuffle", ["true", "false"], ids=["shuffled", "in order"])
def test_precomputed_reference_log_probs_change_nothing(method, shuffle, run, data):
    flags = ("--eval_dataset", str(data / f"{method}.jsonl"), "--eval_steps", "3")
    flags += ("--max_steps", "7", "--shuffle_dataset", shuffle)  # into the third epoch
    usual = run(method, *flags)
    before = run(method, *flags, "--precompute_ref_log_probs", "true")
    assert len(usual) == len(before) == 7 + 3
    for line, other in zip(usual, before):
        assert line.keys() == other.keys()
        for name in line.keys() - {"time", "tokens_per_second"}:
            assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-5), name


@WITH_REFERENCE
def test_full_fine_tuning_keeps_its_reference(method, run, model_dir):
    """All weights train; the table made before step 1 and a second model are the same reference."""
    flags = ("--use_peft", "false", "--learning_rate", "1e-3", "--max_steps", "7")
    table = run(method, *flags)
    files = {path.name for path in run.directory.iterdir()}
    assert "model.safetensors" in files and "adapter_config.json" not in files
    second = run(method, *flags, "--ref_model_name_or_path", model_dir)
    assert table[0]["loss"] == pytest.approx(math.log(2) if method == "dpo" else 0.5, abs=1e-5)
    assert abs(table[-1]["rewards/margins"]) > 0.01
    for name in ("loss", "rewards/margins"):
        assert column(table, name) == pytest.approx(column(second, name), rel=1e-4, abs=1e-5)


@WITH_REFERENCE
def test_another_model_as_the_reference(method, run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(tiny(Qwen2Config)).save_pretrained(other)
    first = run(method, "--ref_model_name_or_path", str(other))[0]
    assert abs(first["rewards/chosen"]) > 0.1
    with_table = run(
        method, "--ref_model_name_or_path", str(other), "--precompute_ref_log_probs", "true"
    )[0]
    assert with_table["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_kto_without_a_reference_point_needs_no_second_prompt(run, tmp_path):
    one = tmp_path / "one.jsonl"
    row = {"prompt": "Hello!", "completion": "Bye.", "label": True}
    one.write_text(json.dumps(row) + "\n" + json.dumps(row | {"label": False}) + "\n")
    lines = run("kto", "--dataset_name", str(one), "--loss_type", "apo_zero_unpaired")
    assert len(lines) == 3 and not column(lines, "kl")  # nothing measured, nothing said


# -------------------------------------------------------------------------- the step and the seed


@ALL
def test_one_step_however_it_is_cut(method, run):
    """8 x 1, 4 x 2 and 1 x 8 examples: one loss and one gradient at every step."""
    results = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        lines = run(
            method, "--max_steps", "3", "--learning_rate", "1e-3",
            "--per_device_train_batch_size", str(size),
            "--gradient_accumulation_steps", str(accumulation), "--disable_dropout", "true",
        )  # fmt: skip
        results.append([line[k] for line in lines for k in ("loss", "grad_norm", "num_tokens")])
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert results[2] == pytest.approx(results[0], rel=1e-4)
    assert column(lines, "epoch") == [0.5, 1.0, 1.5]


@ALL
def test_a_seed_is_a_run(method, run):
    """Dropout, noise, order and new weights: bit for bit with one seed, otherwise with another."""
    flags = ["--disable_dropout", "false", "--lora_dropout", "0.2", "--max_steps", "4"]
    flags += ["--neftune_noise_alpha", "5"] if method == "sft" else []
    runs = []
    for seed in ("1", "1", "2"):
        lines = run(method, *flags, "--seed", seed)
        runs.append((column(lines, "loss"), adapter(run.directory)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0] and not same(runs[0][1], runs[2][1])


@ALL
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("use_peft", ["true", "false"], ids=["lora", "full"])
def test_in_half_precision(method, dtype, use_peft, run):
    flags = ("--dtype", dtype, "--max_steps", "2", "--learning_rate", "1e-3")
    lines = run(method, *flags, "--use_peft", use_peft)
    assert len(lines) == 2
    assert all(math.isfinite(value) for line in lines for value in line.values())
    name = "adapter_model" if use_peft == "true" else "model"
    saved = load_file(run.directory / f"{name}.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@ALL
def test_gradient_checkpointing_changes_nothing(method, run):
    usual = column(run(method), "loss")
    assert column(run(method, "--gradient_checkpointing", "true"), "loss") == pytest.approx(
        usual, rel=1e-5
    )


def test_gradients_are_clipped(run):
    """AdamW's first step does not see the size of a gradient, the reported norm does; 0 is off."""
    free = run("sft", "--max_grad_norm", "0", "--learning_rate", "1e-3")
    tight = run("sft", "--max_grad_norm", "1e-9", "--learning_rate", "1e-3")
    assert free[0]["grad_norm"] == pytest.approx(tight[0]["grad_norm"]) and free[0]["grad_norm"] > 0
    assert free[1]["loss"] < free[0]["loss"]
    # 1e-9 is less than AdamW's eps of 1e-8: hardly a step
    assert abs(tight[2]["loss"] - run("sft", "--learning_rate", "0")[2]["loss"]) < 0.01


def test_the_last_step_is_always_logged(run):
    lines = run("sft", "--logging_steps", "4", "--max_steps", "6")
    assert [line["step"] for line in lines] == [4, 6] and "loss" in lines[1]
    assert [line["step"] for line in run("sft", "--logging_steps", "100", "--max_steps", "3")] == [
        3
    ]


def test_checkpoints(run):
    run("sft", "--save_steps", "2", "--max_steps", "5")
    names = sorted(path.name for path in run.directory.iterdir() if path.is_dir())
    assert names == ["checkpoint-2", "checkpoint-4"]
    for directory in (run.directory, *(run.directory / name for name in names)):
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
            assert (directory / name).is_file()
    assert not same(adapter(run.directory), adapter(run.directory / "checkpoint-4"))


# ------------------------------------------------------------------------------------- float16


def test_the_loss_scale_goes_down_after_overflow_and_up_after_2000_steps():
    state = {"scale": 2.0**16, "since_overflow": 5}
    rescale(state, overflow=True)
    assert state == {"scale": 2.0**15, "since_overflow": 0}
    for _ in range(1999):
        rescale(state, overflow=False)
    assert state["scale"] == 2.0**15
    rescale(state, overflow=False)
    assert state["scale"] == 2.0**16


def test_the_scale_is_taken_out_of_the_gradient():
    """sum of x * w over two examples, scaled by 1024: the mean's gradient all the same."""
    w = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    x = torch.tensor([1.0, -4.0])
    batch = {"loss": (sum(example @ w for example in (x, x)), 2)}
    sums, norm = optimizer_step(optimizer, 0.5, [batch], scale=1024.0)
    assert norm == pytest.approx(17**0.5) and sums["loss"] == (-20.0, 2)
    assert w.tolist() == [1.5, 5.0]  # w - 0.5 * x


def test_a_group_of_parameters_has_its_own_share_of_the_rate():
    """LoRA+ in one place: B at 16 times the learning rate of A."""
    a, b = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "times": 16.0}], lr=1.0)
    optimizer_step(optimizer, 0.01, [{"loss": (a + b, 1)}])
    assert a.item() == pytest.approx(0.99) and b.item() == pytest.approx(0.84)


@ALL
def test_fp16_trains(method, run):
    flags = ("--fp16", "true", "--max_steps", "16", "--per_device_train_batch_size", "11")
    lines = run(method, *flags)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < 0.9 * losses[0]


def test_float16_is_scaled_however_it_was_asked_for(run):
    for dtype, scale in (("float16", 2.0**16), ("bfloat16", 1.0)):
        lines = run("sft", "--dtype", dtype, "--max_steps", "2", "--save_steps", "1")
        state = json.loads((run.directory / "checkpoint-1" / "state.json").read_text())
        assert state["scale"] == scale and len(lines) == 2


@ALL
def test_fp16_does_not_overflow_on_a_sum(method, run):
    """2^16 times the mean of a step fits float16, and 2^16 times a sum over hundreds of tokens does
    not: the first steps were left out for it."""
    lines = run(method, "--fp16", "true", "--gradient_accumulation_steps", "3")
    assert all("loss" in line for line in lines)


@ALL
def test_a_scale_that_is_too_high_costs_steps_and_nothing_else(method, run, monkeypatch):
    monkeypatch.setattr("nanoalign.run.record.INITIAL_SCALE", 2.0**40)
    lines = run(method, "--fp16", "true", "--max_steps", "40")
    skipped = [line for line in lines if "loss" not in line]
    assert 0 < len(skipped) < 40 and all(math.isfinite(ln["loss"]) for ln in lines if "loss" in ln)


# ---------------------------------------------------------------------------------- ranked replies


def ranked_rows(rng):
    """Four replies each, with their scores."""
    words = "Paris is the capital of France. Light is scattered, thank you.".split()

    def replies():
        return [f"{i} {' '.join(rng.choices(words, k=rng.randint(1, 9)))}" for i in range(4)]

    return [
        {"prompt": "Why is the sky blue?", "responses": replies(), "scores": [9, 1, 0, -1]},
        {"prompt": "How?", "responses": replies(), "scores": [0.1, 3, 2, 0.1]},
        {"prompt": "Hello!", "responses": replies(), "scores": [4, 3, 2, 1]},
    ]


def exploded(rows):
    """Each pair in which one reply is better, as a row of its own."""
    pairs = []
    for row in rows:
        ranked = sorted(zip(row["scores"], row["responses"]), key=lambda pair: -pair[0])
        pairs += [
            {"prompt": row["prompt"], "chosen": good, "rejected": bad}
            for i, (a, good) in enumerate(ranked)
            for b, bad in ranked[i + 1 :]
            if a > b
        ]
    return pairs


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo", "orpo"])
def test_ranked_replies_train_as_all_their_pairs(loss_type, run, tmp_path):
    rows = ranked_rows(random.Random(0))
    pairs = exploded(rows)
    assert len(pairs) == 6 + 5 + 6  # one tie
    lines, weights = [], []
    for name, data, size in (("ranked", rows, 2), ("pairs", pairs, 7)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
        steps = str(math.ceil(len(data) / size))  # batches a step: a step has all there is
        flags = ("--dataset_name", str(path), "--per_device_train_batch_size", str(size))
        flags += ("--gradient_accumulation_steps", steps, "--loss_type", loss_type)
        lines.append(run("dpo", *flags, "--max_grad_norm", "0"))
        weights.append(load_file(run.directory / "adapter_model.safetensors"))
    for one, other in zip(*lines):
        clock = {"num_tokens", "tokens_per_second", "time"}
        one, other = ({k: v for k, v in x.items() if k not in clock} for x in (one, other))
        assert one == pytest.approx(other, rel=2e-5, abs=2e-6)
        assert one["rewards/accuracies"] <= 1 and one["grad_norm"] > 0
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=0, atol=2e-4), name


def test_a_ranked_row_counts_its_replies_and_not_its_pairs(run, tmp_path):
    """num_tokens: each reply with its prompt, once."""
    rows = ranked_rows(random.Random(0))[:1]
    path = tmp_path / "ranked.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n")
    [line] = run("dpo", "--dataset_name", str(path), "--max_steps", "1")
    tokens = 0
    tokenizer = make_tokenizer()
    for reply in rows[0]["responses"]:
        text = f"<|im_start|>user\n{rows[0]['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        tokens += len(tokenizer(text)["input_ids"]) + len(tokenizer(reply)["input_ids"]) + 1
    assert line["num_tokens"] == tokens
