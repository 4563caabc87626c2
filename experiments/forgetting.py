"""What a new task costs the old ones: is it the KL on the new task, whatever the method?

"RL's Razor" (arXiv 2509.04259) measures what fine-tuning on a new task costs the old ones. It finds
that KL(pi_ref || pi) on the new task's prompts tells how much is forgotten, whatever the method,
and that the norm of the weights' change does not tell. On-policy learning has the smallest KL for
the same success.

Here the world's SFT model knows five kinds of questions. The new task is to answer one of them,
"Where is it?", in a full sentence. The model does so half of the time already. There are five ways,
each with LoRA, 40 steps, one schedule and four learning rates: SFT on the model's own kind of
sentence; SFT on a sentence that it has never said, "You can find it in the attic."; DPO and KTO on
its sentence against its terse reply; GRPO (examples/train_grpo.py), which rewards its sentence.

Measured on the new task: the share of right sentences among sampled replies, and the KL both ways,
each from the replies of its first policy. Measured on the four old kinds: how many nats the log-
probability of a right answer, in either style, has fallen, and the share of right answers. The norm
is that of the change of all weights.

Expected: over all runs the nats are in the order of KL(pi_ref || pi), with a rank correlation
(Spearman's) above 0.8. The norm's correlation is lower. At each rate SFT on a stranger's sentence
moves further and forgets more than on the model's own. At each rate at which GRPO gives 90 % right
sentences, it has the smallest KL of all ways that do, and forgets least.

A first run measured KL(pi || pi_ref) alone. Where the model's own sentence is learned it ends at ln
2, when all replies are sentences, and what is forgotten still depends on the rate. So it can't be
the cause. A second run gave each method its script's schedule, and compared means over the rates.
Then a way that solves the task at the lowest rates alone seems to move least.
"""

from statistics import mean
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from examples import train_grpo
from experiments.lab import METHODS, Report, load, logps, pairs, replies_of, sft_model, train
from nanoalign.lora import LoRALinear
from nanoalign.model import Policy
from nanoalign.packing import Example

METHODS["grpo"] = train_grpo.GRPOConfig, train_grpo.run_grpo, train_grpo.BUILT_IN
STEPS, BATCH = 40, 32
RATES = 3e-4, 1e-3, 2e-3, 4e-3
TRAINED = dict(  # each way: else the methods' own schedules would take other steps at one rate
    use_peft=True, lora_r=16, lora_alpha=32, lr_scheduler_type="linear", warmup_ratio=0.0,
    weight_decay=0.0, adam_beta2=0.999, max_steps=STEPS, per_device_train_batch_size=BATCH,
)  # fmt: skip
ORDERED = 0.8  # of Spearman's correlation
SOLVED = 0.9
STRANGE, OWN = "SFT, a stranger's words", "SFT, its own words"


class Result(NamedTuple):
    solved: float  # share of right sentences on the new task
    forward: float  # KL(pi_ref || pi) there, nats
    backward: float  # KL(pi || pi_ref)
    norm: float  # of the change of all weights
    lost: float  # nats of a right answer to the old kinds
    right: float  # share of right answers to them


def is_new(row: dict) -> bool:
    return "Where is it?" in (row.get("prompt") or row["question"])


def strange(place: str) -> str:
    """A right sentence that the model has never said."""
    return f"You can find it in the {place}."


def likes_sentences(example: Example, reply: list[int]) -> float:
    """GRPO's reward: 1 for the pair's chosen reply, the right sentence."""
    return float(reply == list(example.texts[0][0]))


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of the ranks of two lists of n different values."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def log_right(policy: Policy, asked: list[dict]) -> Tensor:
    """log of the probability of a right answer, terse or a sentence, to each question. (n,)"""
    prompts = [row["question"] for row in asked]
    both = [logps(policy, prompts, [row[kind] for row in asked]) for kind in ("terse", "sentence")]
    return torch.logaddexp(*both)


def run(small: bool) -> Report:
    data = [row for row in pairs("dpo") if is_new(row)][: STEPS * BATCH]
    thumbs = [
        dict(prompt=row["prompt"], completion=row[kind], label=kind == "chosen")
        for row in data
        for kind in ("chosen", "rejected")
    ]
    own = [dict(prompt=row["prompt"], completion=row["chosen"]) for row in data]
    foreign = [dict(prompt=row["prompt"], completion=strange(row["rejected"])) for row in data]
    ways = {
        OWN: ("sft", own, {}),
        STRANGE: ("sft", foreign, {}),
        "DPO": ("dpo", data, {"beta": 0.5}),
        "KTO": ("kto", thumbs, {"beta": 0.5, "per_device_train_batch_size": 2 * BATCH}),
        "GRPO": ("grpo", data, {"per_device_train_batch_size": 16}),
    }
    test = pairs("test")
    new, old = ([row for row in test if is_new(row) is side] for side in (True, False))
    if small:
        new, old = new[:4], old[:4]
    reference = load(sft_model(small))
    before = log_right(reference, old)
    asked, usual = [row["question"] for row in new], replies_of(reference, new, 1.0)
    start = logps(reference, asked, usual)

    rows, found = [], {}
    for way, (method, taught, flags) in ways.items():
        for rate in RATES[: 1 if small else None]:
            how = TRAINED | {"learning_rate": rate, **flags}
            with patch.object(train_grpo, "reward", likes_sentences):
                policy, _ = train(method, taught, small, model_name_or_path=sft_model(small), **how)
            said = replies_of(policy, new, 1.0)
            forward = (start - logps(policy, asked, usual)).mean().item()
            backward = (logps(policy, asked, said) - logps(reference, asked, said)).mean().item()
            layers = [m for m in policy.lm.modules() if isinstance(m, LoRALinear)]
            norm = sum(layer.delta().square().sum() for layer in layers).sqrt().item()
            solved = mean(
                reply in (row["sentence"], strange(row["terse"])) for reply, row in zip(said, new)
            )
            lost = (before - log_right(policy, old)).mean().item()
            greedy = replies_of(policy, old, 0.0)
            right = mean(
                reply in (row["terse"], row["sentence"]) for reply, row in zip(greedy, old)
            )
            found[way, rate] = Result(solved, forward, backward, norm, lost, right)
            rows.append([way, rate, *found[way, rate]])

    def draw(figure):
        left, right = figure.subplots(1, 2, sharey=True)
        for axis, column, label in ((left, "forward", "KL(pi_ref || pi) on the new task, nats"),
                                    (right, "norm", "norm of the change")):  # fmt: skip
            for way in ways:
                at = [result for (name, _), result in found.items() if name == way]
                axis.plot([getattr(r, column) for r in at], [r.lost for r in at], "o", label=way)
            axis.set(xlabel=label)
            axis.set_yscale("symlog", linthresh=0.01)
        left.set(ylabel="forgotten of the old kinds, nats", xscale="log")
        left.legend(fontsize=8)

    forgotten = [result.lost for result in found.values()]
    by_kl = spearman([result.forward for result in found.values()], forgotten)
    by_norm = spearman([result.norm for result in found.values()], forgotten)
    rates = sorted({rate for _, rate in found})
    further = all(
        getattr(found[STRANGE, rate], name) > getattr(found[OWN, rate], name)
        for rate in rates
        for name in ("forward", "lost")
    )
    least = []
    for rate in rates:
        solved = {way: found[way, rate] for way in ways if found[way, rate].solved >= SOLVED}
        if "GRPO" in solved:
            for name in ("forward", "lost"):
                nearest = min(solved, key=lambda way: getattr(solved[way], name))
                least.append(nearest == "GRPO")
    held = [
        (f"forgotten is in the order of the KL ({by_kl:.2f})", by_kl > ORDERED),
        (f"and less in that of the weights' norm ({by_norm:.2f})", by_norm < by_kl),
        ("a stranger's words: further away and more forgotten, at each rate", further),
        (f"with {SOLVED:.0%} right sentences GRPO moves least and forgets least, at each rate",
         bool(least) and all(least)),
    ]  # fmt: skip
    notes = [
        "The weights' norm orders the runs as well as the KL does. All runs train the same layers "
        "with the same steps; the paper's differ in more than that.",
        "A stranger's words move the policy further by this KL at the highest rate alone. It "
        "counts what the reference would say. With a stranger's words both of its replies become "
        "rare; with its own, the terse one does. By the other KL they are far away at each rate.",
    ]
    columns = ["way", "rate", "right sentences", "KL(ref, pi)", "KL(pi, ref)", "norm"]
    columns += ["forgotten, nats", "old, right"]
    return Report(columns, rows, held, draw, notes)
