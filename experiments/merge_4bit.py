"""An adapter that was trained on a 4-bit base belongs to the rounded weights: merge it into those.

QLoRA (arXiv 2305.14314) trains y = dequant(W4) x + s B A x, eq. 5, and leaves open how the two
become one matrix. With D = s B A these ways are in use, and users ask why some change their model:

    into the dequantized weights        dequant(W4) + D              what was trained
    the same, rounded to 4 bits again   round4(dequant(W4) + D)
    into the original weights           W + D                        adds W - dequant(W4), unseen
    the same, rounded to 4 bits         round4(W + D)

Measured: the world's SFT model learns with LoRA, on an NF4 base, to answer in sentences only, with
a high and with a low learning rate. Then the loss of each merge on the test sentences, and how far
it moves log pi(y | x) of a sentence from what it was under the adapter.

Expected: the first way is exact. The original weights move it far more, for better or worse: they
are another model, and a better one. What dequant(W4) + D is rounded to is W4 itself wherever D is
less than half a step, as W4 stands on levels; so a small D, of the low rate, is mostly lost, while
round4(W + D) keeps its average. A LoRA run without 4 bits stands beside them: QLoRA's table 3 says
that QLoRA ends where LoRA ends. Three seeds, of the adapter's start and of the order.
"""

from statistics import mean, stdev

import torch
from torch import Tensor

from experiments.lab import Report, load, logps, pairs, sft_model, train
from nanoalign import nf4
from nanoalign.lora import LoRALinear
from nanoalign.model import Policy

EXACT = 1e-3  # nats: what the exact merge may move a sentence's log-prob by; fp32 rounds
FAR = 20  # the other merges move it at least so many times as far
LOST = 0.5  # of what a low rate has learned, rounding the dequantized weights again keeps less
MEETS = 0.1  # QLoRA's loss may miss LoRA's by this share of what LoRA has learned

RATES = 1e-4, 1e-3
LEARN = dict(use_peft=True, lr_scheduler_type="constant", warmup_ratio=0, weight_decay=0)
LEARN |= dict(lora_r=8, lora_alpha=32, per_device_train_batch_size=32, max_steps=40)


def round4(weight: Tensor) -> Tensor:
    """To NF4 and back."""
    return nf4.dequantize(*nf4.quantize(weight), weight.shape, torch.float32)


WAYS = {  # the original weight W and the adapter's change D of it -> the merged weight
    "dequantized + D": lambda w, d: round4(w) + d,
    "dequantized + D, rounded again": lambda w, d: round4(round4(w) + d),
    "original + D": lambda w, d: w + d,
    "original + D, rounded": lambda w, d: round4(w + d),
}
BASE, ADAPTER, LORA = "4 bits, no adapter", "4 bits and adapter", "LoRA without 4 bits"


@torch.no_grad()
def merged(trained: Policy, way, small: bool) -> Policy:
    """The world's SFT model, dense, with the trained adapter merged into it."""
    policy = load(sft_model(small))
    for name, layer in trained.model.named_modules():
        if isinstance(layer, LoRALinear):
            weight = policy.model.get_submodule(name).weight
            weight.copy_(way(weight, layer.delta()))
    return policy


def run(small: bool) -> Report:
    test = pairs("test", small)
    asked, sentences = [row["question"] for row in test], [row["sentence"] for row in test]
    rows = [dict(prompt=row["prompt"], completion=row["chosen"]) for row in pairs("dpo", small)]
    losses, moves = {}, {}  # of (rate, model): nats a sentence, and |change|; one for each seed

    def measure(rate, name, policy, adapter=None):
        found = logps(policy, asked, sentences)
        losses.setdefault((rate, name), []).append(-found.mean().item())
        if adapter is not None:
            moves.setdefault(name, []).append((found - adapter).abs().mean().item())
        return found

    for rate in RATES:
        for seed in range(1 if small else 3):
            how = LEARN | dict(model_name_or_path=sft_model(small), seed=seed, learning_rate=rate)
            policy, _ = train("sft", rows, small, **how, load_in_4bit=True)
            adapter = measure(rate, ADAPTER, policy)
            measure(rate, BASE, merged(policy, lambda w, d: round4(w), small))
            for name, way in WAYS.items():
                measure(rate, name, merged(policy, way, small), adapter)
            measure(rate, LORA, train("sft", rows, small, **how)[0])

    def kept(rate, name):
        """The share of what the adapter has learned on its 4 bits."""
        here, start, end = (mean(losses[rate, model]) for model in (name, BASE, ADAPTER))
        return (start - here) / (start - end)

    names, (low, high) = [BASE, ADAPTER, *WAYS, LORA], RATES
    exact, again, *_ = WAYS
    table = [
        [name, *(x for rate in RATES for x in (mean(losses[rate, name]), kept(rate, name)))]
        + [stdev(losses[high, name]) if not small else "", mean(moves.get(name, [0]))]
        for name in names
    ]
    held = [
        (f"the dequantized weights are exact, to {EXACT} nats", max(moves[exact]) < EXACT),
        (
            f"every other merge moves log pi(y | x) more than {FAR} times as far",
            all(min(moves[name]) > FAR * max(moves[exact]) for name in WAYS if name != exact),
        ),
        (f"rounded again, less than {LOST:.0%} of a low rate is kept", kept(low, again) < LOST),
        (
            f"QLoRA ends where LoRA ends, to {MEETS:.0%} of what was learned",
            all(abs(kept(rate, LORA) - 1) < MEETS for rate in RATES),
        ),
    ]

    def draw(figure):
        axis = figure.subplots()
        for rate in RATES:
            axis.plot([kept(rate, name) for name in names], names, "o", label=f"rate {rate:g}")
        axis.invert_yaxis()
        axis.axvline(1, color="grey", ls=":")
        axis.set(xlabel="share kept of what the adapter has learned")
        axis.legend()

    notes = [
        "That the merge into the original weights harms does not show here: it is another model, "
        "but its loss is as good, a little worse at the low rate and a little better at the high."
    ]
    columns = ["model", "nats, 1e-4", "kept", "nats, 1e-3", "kept ", "sd over seeds"]
    return Report([*columns, "mean change of log pi"], table, held, draw, notes)
