"""The same run here and in TRL: losses, metrics and gradient norms, step by step.

Both sides start from one LoRA adapter that PEFT wrote, read the same rows in the same order and
compute in fp32, at a learning rate that moves the losses far in ten optimizer steps. TRL is given
ChatML that is rendered already: a pair of strings trains the reply and its <|im_end|>, as here.
"""

import json
import math
import random

import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

from dataclasses import replace  # noqa: E402

from conftest import TEXT  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import train_kto  # noqa: E402
from nanoalign.chatml import IM_END, IM_START  # noqa: E402
from nanoalign.run.flags import DPOConfig, KTOConfig, SFTConfig  # noqa: E402
from train_dpo import run_dpo  # noqa: E402
from train_kto import run_kto  # noqa: E402
from train_sft import run_sft  # noqa: E402

# what both sides compute with; the other settings keep their defaults, which are the same here and
# there: AdamW, linear decay, gradients clipped to norm 1, beta 0.1
COMMON = dict(learning_rate=1e-2, max_steps=10, logging_steps=1)
REWARDS = ["rewards/chosen", "rewards/rejected", "rewards/margins"]
PER_SIDE = ["logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"]


def rows_of(columns, count=10):
    """Rows of random words; lengths differ, and labels are mixed within every two."""
    rng = random.Random(7)
    words = " ".join(TEXT).split()

    def text(longest):
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    rows = []
    for i in range(count):
        row = {"prompt": f"{i} {text(9)}", "completion": text(12), "label": (i + i // 4) % 2 == 0}
        row |= {"chosen": f"Light {text(6)}", "rejected": f"Bye {text(14)}"}
        rows.append({column: row[column] for column in columns})
    return rows


COLUMNS = {
    "sft": ["prompt", "completion"],
    "dpo": ["prompt", "chosen", "rejected"],
    "kto": ["prompt", "completion", "label"],
}
OURS = {"sft": (SFTConfig, run_sft), "dpo": (DPOConfig, run_dpo), "kto": (KTOConfig, run_kto)}


def ours(method, rows, model_dir, adapter, directory, **more):
    """The lines of metrics.jsonl of a run of ours."""
    data, out = directory / f"{method}.jsonl", directory / "ours"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind, run = OURS[method]
    cfg = kind(
        model_name_or_path=model_dir,
        adapter_name_or_path=adapter,
        dataset_name=[str(data)],
        output_dir=str(out),
        overwrite_output_dir=True,
        shuffle_dataset=False,
        device="cpu",
        **{**COMMON, **more},
    )
    run(cfg)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def theirs(method, rows, model_dir, adapter, directory, **more):
    """The lines that TRL's trainer logs, unrounded, on the same rows in ChatML."""
    header = f"{IM_START}user\n{{}}{IM_END}\n{IM_START}assistant\n"
    rendered = [
        {k: v if k == "label" else header.format(v) if k == "prompt" else v + IM_END
         for k, v in row.items()}
        for row in rows
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.eos_token, tokenizer.pad_token = IM_END, "<|endoftext|>"
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    name = method.upper()
    args = getattr(trl, f"{name}Config")(
        output_dir=str(directory / "theirs"),
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{**COMMON, **more},
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=peft.PeftModel.from_pretrained(base, adapter, is_trainable=True),
        args=args,
        train_dataset=datasets.Dataset.from_list(rendered),
        processing_class=tokenizer,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_same(mine, other, metrics=(), moved=0.1, tolerance=1e-4):
    """Loss, gradient norm, tokens and metrics of every step, and that the run went anywhere."""
    assert [line["step"] for line in mine] == [line["step"] for line in other]
    for a, b in zip(mine, other):
        assert a["num_tokens"] == b["num_tokens"]
        for key in ("loss", "learning_rate", "grad_norm", *metrics):
            if key in b or key in a:  # no chosen reply in KTO's batch: no metric of it, both sides
                close = pytest.approx(b[key], abs=tolerance, rel=tolerance)
                assert a[key] == close, f"step {a['step']}: {key}"
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
    losses = [line["loss"] for line in mine]
    assert max(losses) - min(losses) > moved


@pytest.fixture(scope="module", params=["new", "trained"])
def adapter(request, model_dir, tmp_path_factory):
    """An adapter as PEFT starts it (B = 0), and one that has been trained: the reference then is
    the base model, or the adapter as it was."""
    return make_adapter(model_dir, tmp_path_factory.mktemp("adapter"), request.param == "trained")


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    return make_adapter(model_dir, tmp_path_factory.mktemp("trained"), True)


def make_adapter(model_dir, directory, trained):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM",
        init_lora_weights=not trained,
    )  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return str(directory)


# ------------------------------------------------------------------------------ ten steps, each way


def test_sft_with_accumulation(model_dir, trained, tmp_path):
    """An epoch of 10 rows is 3 steps of 2 x 2, the last of them half full; tokens differ a lot."""
    how = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    rows = rows_of(COLUMNS["sft"])
    args = (rows, model_dir, trained, tmp_path)
    assert_same(ours("sft", *args, **how), theirs("sft", *args, **how), moved=1.0)


def test_dpo(model_dir, adapter, tmp_path):
    how = dict(per_device_train_batch_size=4)
    args = (rows_of(COLUMNS["dpo"]), model_dir, adapter, tmp_path)
    mine, other = ours("dpo", *args, **how), theirs("dpo", *args, **how)
    assert_same(mine, other, ["rewards/accuracies", *REWARDS, *PER_SIDE])
    assert mine[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert mine[0]["rewards/accuracies"] == 0.0


def trl_pairs(size):
    """TRL's mismatched completions: y_{i-1}, cyclically within each batch of the data."""

    def pair(order, max_length):
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        pairs = [(e, group[i - 1]) for group in groups for i, e in enumerate(group)]
        return [replace(e, mismatch=replace(e, texts=other.texts)) for e, other in pairs]

    return pair


def test_kto_with_trls_pairs(model_dir, adapter, tmp_path, monkeypatch):
    """Three batches of 4, 4 and 2 rows an epoch. (One of 1 would be its own mismatch in TRL.)"""
    monkeypatch.setattr(train_kto, "with_mismatches", trl_pairs(4))
    how = dict(per_device_train_batch_size=4, desirable_weight=1.2, undesirable_weight=0.9)
    args = (rows_of(COLUMNS["kto"]), model_dir, adapter, tmp_path)
    mine, other = ours("kto", *args, **how), theirs("kto", *args, **how)
    assert_same(mine, other, ["kl", *REWARDS, *PER_SIDE])
    assert sum(line["kl"] > 0.1 for line in mine) >= 3


def test_kto_in_one_batch(model_dir, trained, tmp_path):
    """Where an epoch is one batch, our pairs are TRL's: y_{i-1}, cyclically."""
    how = dict(per_device_train_batch_size=6)
    args = (rows_of(COLUMNS["kto"], 6), model_dir, trained, tmp_path)
    mine = ours("kto", *args, precompute_ref_log_probs=True, **how)
    other = theirs("kto", *args, **how)
    assert_same(mine, other, ["kl", *REWARDS, *PER_SIDE])
    assert mine[0]["loss"] == pytest.approx(0.5, abs=1e-6)


def test_kto_where_a_mismatched_completion_has_to_be_cut(model_dir, trained, tmp_path):
    """Long prompts with short replies and the other way round: (x, y) fits max_length, (x, y')
    does not, and is cut where TRL cuts it."""
    texts = [
        ("Light is scattered. " * 3, "Bye."),
        ("Hello!", "Light is scattered, I am fine. " * 3),
    ]
    rows = [
        {"prompt": f"{i} {prompt}", "completion": reply, "label": i != 0}
        for i, (prompt, reply) in enumerate(texts * 3)
    ]
    args = (rows, model_dir, trained, tmp_path)
    kl = {}
    for longest in (1024, 90):
        how = dict(per_device_train_batch_size=6, max_length=longest)
        mine, other = ours("kto", *args, **how), theirs("kto", *args, **how)
        assert_same(mine, other, ["kl", *REWARDS, *PER_SIDE])
        kl[longest] = [line["kl"] for line in mine]
    assert max(abs(a - b) for a, b in zip(*kl.values())) > 0.01, kl  # it was cut


# ----------------------------------------------------------------------------------- other losses


@pytest.mark.parametrize(
    "method, more",
    [
        ("dpo", dict(loss_type="ipo")),
        ("dpo", dict(loss_type="hinge")),
        ("dpo", dict(loss_type="sigmoid_norm", beta=1.0)),
        ("dpo", dict(loss_type="apo_zero")),
        ("dpo", dict(loss_type="apo_down")),
        ("dpo", dict(loss_type="robust", label_smoothing=0.2)),
        ("kto", dict(loss_type="apo_zero_unpaired", undesirable_weight=0.7)),
    ],
)
def test_other_losses(method, more, model_dir, trained, tmp_path):
    how = dict(per_device_train_batch_size=5, max_steps=4, **more)
    args = (rows_of(COLUMNS[method]), model_dir, trained, tmp_path)
    assert_same(ours(method, *args, **how), theirs(method, *args, **how), REWARDS, moved=0.05)


def test_rpo(model_dir, trained, tmp_path):
    """TRL's word for it is a second loss, a mean over the batch's tokens: in batches of one pair
    that is RPO's mean over each pair's."""
    how = dict(per_device_train_batch_size=1, max_steps=6)
    args = (rows_of(COLUMNS["dpo"]), model_dir, trained, tmp_path)
    mine = ours("dpo", *args, rpo_alpha=0.5, **how)
    other = theirs("dpo", *args, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], **how)
    assert_same(mine, other, REWARDS)


# ------------------------------------------------------------ one gradient, whatever the batch size


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_batch_shapes_give_one_gradient(method, model_dir, trained, tmp_path):
    """8 x 1, 4 x 2 and 1 x 8. The reference is the base, so that rewards and z0 are not 0."""
    more = {} if method == "sft" else dict(ref_model_name_or_path=model_dir, beta=0.5)
    rows, gradients, losses = rows_of(COLUMNS[method], 8), [], []

    def keep(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))

    hook = register_optimizer_step_pre_hook(keep)
    try:
        for size in (8, 4, 1):
            how = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
            how |= dict(max_steps=1, max_grad_norm=0.0)
            (line,) = ours(method, rows, model_dir, trained, tmp_path, **how, **more)
            losses.append(line["loss"])
            if method == "kto":
                assert line["kl"] > 0.1
    finally:
        hook.remove()
    whole, *others = gradients
    assert whole.norm() > 0.01
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for other in others:
        assert (other - whole).norm() < 1e-5 * whole.norm()
