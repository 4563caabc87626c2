"""One packed row has the losses and gradients of a padded batch, and costs only its real tokens.

Packing as it is often done glues texts together and lets them see each other. Here one predicate
keeps them apart (nanoalign/packing.py), so the row must be the padded rectangle number for number.
Prefix sharing's authors (arXiv 2410.20305) report that packing is worth "up to 5 times", which
depends on the data alone: a rectangle pays its longest text for every text, so its share of real
tokens is what a row should take of its time.

Measured on the world's SFT model: losses and gradients of all weights in fp32, of a row against
transformers' own attention on a rectangle with an attention mask; the same without the predicate,
as if the row were one long text; and the seconds of a forward and backward pass, for 16 texts of
which one has 256 tokens and the others have fewer and fewer. The tolerance of the time is wide:
both passes have costs that do not shrink with the tokens, and the rectangle also makes logits at
prompts and padding, which the row does not.
"""

import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.lab import Report, load, sft_model
from nanoalign.model import Policy
from nanoalign.packing import Example, packed

SAME = 1e-4  # |row - rectangle| / |rectangle|, of the losses and of the gradient, in fp32
TIME = 0.3  # the row's share of the rectangle's time against the share of real tokens
LONGEST, TEXTS = 256, 16


def texts(length: int, vocabulary: int) -> list[Example]:
    """Random ids, half of each text a prompt: one text of LONGEST tokens and others of `length`."""
    rng, out = random.Random(length), []
    for n in [LONGEST] + (TEXTS - 1) * [length]:
        ids = [rng.randrange(2, vocabulary) for _ in range(n)]
        out.append(Example(ids[: n // 2], [(ids[n // 2 :], [True] * (n - n // 2))]))
    return out


def in_a_row(policy: Policy, batch: list[Example]) -> Tensor:
    """The loss of each text."""
    return -policy(batch).logps


def unmasked(policy: Policy, batch: list[Example]) -> Tensor:
    """The row as one long text, whose later parts see the earlier ones: one sum of losses."""
    ids, mask = [], []
    for example in batch:
        [(reply, trains)] = example.texts
        ids += [*example.prompt, *reply]
        mask += [*[False] * len(example.prompt), *trains]
    return -policy([Example([], [(ids, mask)])]).logps


def in_a_rectangle(policy: Policy, batch: list[Example]) -> Tensor:
    """By transformers alone: ids and labels with padding, all logits, cross-entropy."""
    ids, real = torch.zeros(2, len(batch), max(map(len, batch)), dtype=torch.long)
    labels = torch.full_like(ids, -100)  # what cross_entropy passes over
    for i, example in enumerate(batch):
        [(reply, _)] = example.texts
        start, end = len(example.prompt), len(example)
        ids[i, :end], real[i, :end] = torch.tensor([*example.prompt, *reply]), 1
        labels[i, start:end] = ids[i, start:end]
    policy.model.set_attn_implementation(policy.attention)
    logits = policy.model(ids, attention_mask=real, use_cache=False).logits[:, :-1]
    policy.model.set_attn_implementation(packed())
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)


def with_gradient(way: Callable, policy: Policy, batch: list[Example]) -> tuple[Tensor, Tensor]:
    """-> losses, and the gradient of their sum as one long vector."""
    policy.lm.zero_grad()
    losses = way(policy, batch)
    losses.sum().backward()
    return losses.detach(), torch.cat([p.grad.flatten() for p in policy.lm.parameters()])


def time_share(policy: Policy, one: tuple, other: tuple, rounds: int) -> float:
    """The time of (way, batch) `one` as a share of that of the `other`: the quickest of several
    passes, forward and backward, in turns. It is the processor's time, and the quickest, since
    whatever else runs on the machine can only make a pass slower."""
    clocked = [[], []]
    for _ in range(rounds):
        for times, (way, batch) in zip(clocked, (one, other)):
            start = time.process_time()
            with_gradient(way, policy, batch)
            times.append(time.process_time() - start)
    return min(clocked[0]) / min(clocked[1])


def run(small: bool) -> Report:
    policy, rounds = load(sft_model(small)), 1 if small else 7
    vocabulary, rows, apart = len(policy.tokenizer), [], []

    def off(a, b):
        return ((a - b).norm() / b.norm()).item()

    for length in (16, 64) if small else (256, 192, 128, 64, 16):
        batch = texts(length, vocabulary)
        real = sum(map(len, batch)) / (LONGEST * TEXTS)
        row, box, glued = (
            with_gradient(way, policy, batch) for way in (in_a_row, in_a_rectangle, unmasked)
        )
        same = [off(a, b) for a, b in zip(row, box)]
        apart.append(off(glued[1], box[1]))
        share = time_share(policy, (in_a_row, batch), (in_a_rectangle, batch), rounds)
        rows.append([length, *same, apart[-1], real, share])

    exact = all(row[i] < SAME for row in rows for i in (1, 2))
    held = [
        (f"losses and gradients of the row are the rectangle's, to {SAME:.2%}", exact),
        ("without the predicate they are not, by far", min(apart) > 100 * SAME),
        (
            f"the row's time is the rectangle's times its share of real tokens, to {TIME:.0%}",
            all(abs(row[5] / row[4] - 1) < TIME for row in rows),
        ),
    ]

    def draw(figure):
        axis = figure.subplots()
        real = [row[4] for row in rows]
        axis.plot(real, real, "k--", label="share of real tokens")
        axis.plot(real, [row[5] for row in rows], "o-", label="share of the time, measured")
        axis.set(xlabel="share of real tokens in the rectangle", ylabel="row / rectangle")
        axis.legend()

    columns = ["tokens of the others", "losses off by", "gradient off by"]
    columns += ["gradient off, no predicate", "real tokens, share", "time, share"]
    return Report(columns, rows, held, draw)
