"""An adapter that was trained on a 4-bit base belongs to the rounded weights: merge it into those.

QLoRA (arXiv 2305.14314) trains y = dequant(W4) x + s B A x, eq. 5, and leaves open how the two
become one matrix. Three ways are in use, and users ask why two of them change their model:

    into the dequantized weights    dequant(W4) + s B A             what was trained
    into the original weights       W + s B A                       adds W - dequant(W4), unseen
    and rounded to 4 bits again     dequant(round4(... + s B A))    rounds the adapter as well

Measured: the world's SFT model learns with LoRA, on an NF4 base, to answer in sentences only. Then
the test sentences' loss of each merge, and how far log pi(y | x) of a sentence has moved from what
it was under the adapter, on average. The first way is exact by construction. Of the other two it is
expected only that they move it far more: whether that helps or harms is a matter of the model.
A plain LoRA run of the same settings stands beside them, since table 3's claim is that QLoRA ends
where LoRA ends. Three seeds, which draw the adapter's start and the order of the data.
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
MEETS = 0.1  # QLoRA's loss may miss LoRA's by this share of what LoRA has learned

LEARN = dict(use_peft=True, learning_rate=1e-3, lr_scheduler_type="constant", warmup_ratio=0)
LEARN |= dict(lora_r=8, lora_alpha=32, per_device_train_batch_size=32, max_steps=40, weight_decay=0)


def round4(weight: Tensor) -> Tensor:
    """To NF4 and back."""
    return nf4.dequantize(*nf4.quantize(weight), weight.shape, torch.float32)


WAYS = {  # the original weight W and the adapter's change D of it -> the merged weight
    "dequantized weights": lambda w, d: round4(w) + d,
    "original weights": lambda w, d: w + d,
    "dequantized, rounded again": lambda w, d: round4(round4(w) + d),
    "original, rounded again": lambda w, d: round4(w + d),
}


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
    losses, moves = {}, {}  # of each model: nats a sentence, and their change; one for each seed

    def measure(name, policy, adapter=None):
        found = logps(policy, asked, sentences)
        losses.setdefault(name, []).append(-found.mean().item())
        if adapter is not None:
            moves.setdefault(name, []).append((found - adapter).abs().mean().item())
        return found

    start = load(sft_model(small))
    measure("before", start)
    for seed in range(1 if small else 3):
        how = LEARN | dict(model_name_or_path=sft_model(small), seed=seed)
        measure("LoRA", train("sft", rows, small, **how)[0])
        qlora, _ = train("sft", rows, small, **how, load_in_4bit=True)
        adapter = measure("QLoRA: 4 bits and the adapter", qlora)
        for name, way in WAYS.items():
            measure(name, merged(qlora, way, small), adapter)

    exact, *others = (moves[name] for name in WAYS)
    lora, qlora = mean(losses["LoRA"]), mean(losses["QLoRA: 4 bits and the adapter"])
    learned = mean(losses["before"]) - lora
    held = [
        (f"merged into the dequantized weights, no more than {EXACT} nats", max(exact) < EXACT),
        (
            f"every other merge moves log pi(y | x) more than {FAR} times as far",
            min(map(min, others)) > FAR * max(exact),
        ),
        (
            f"QLoRA ends where LoRA ends, to {MEETS:.0%} of what LoRA learned",
            abs(qlora - lora) < MEETS * abs(learned),
        ),
    ]

    def spread(values):
        return stdev(values) if len(values) > 1 else ""

    table = [
        [name, mean(values), spread(values), mean(moves[name]) if name in moves else ""]
        for name, values in losses.items()
    ]

    def draw(figure):
        axis = figure.subplots()
        names = [name for name in losses if name != "before"]
        for i, name in enumerate(names):
            axis.plot(losses[name], [i] * len(losses[name]), "o", alpha=0.7)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set(xlabel="nats a test sentence, each seed")

    columns = ["model", "nats a test sentence", "sd over seeds", "mean change of log pi"]
    return Report(columns, table, held, draw)
