"""Length is a cheap feature: does preference learning learn "right", or "long"?

The claim (Park et al. 2024, arXiv 2403.19159; DPO, arXiv 2305.18290, eq. 7): where chosen replies
are mostly the longer ones, DPO takes up length beyond what it is worth. Its reward is a sum over
tokens, so a longer reply has more places to earn it. The paper's own remedy, R-DPO, charges alpha a
token: what the labels say of length is explained before the policy has to. Averages over tokens,
with a reference (length-normalized DPO, Tulu 3, arXiv 2411.15124, eq. 6) or without one (SimPO,
arXiv 2405.14734, eq. 4 and 6), are the usual one.

Here the right reply ALWAYS wins. In four pairs of five it is a sentence and the wrong reply is
terse; in the fifth it is terse and the wrong reply is a sentence. So "right" explains all labels
and "long" 80 % of them, but length is seen at a glance and the answer has to be worked out.

Measured on held-out questions, by each loss's own reward: how often long beats terse where both are
right (length alone), right beats wrong where both are sentences (the answer alone), and right but
terse beats wrong but long (one against the other); and how the policy answers. Expected of DPO:
sentences increase, and the answer counts for less where length speaks against it. Of the remedies:
less of both. beta is the one usual for each loss.
"""

import random
from statistics import mean

import torch
import torch.nn.functional as F

from experiments.chosen_falls import mistaken, wrong
from experiments.lab import Report, load, logps, pairs, sft_model, train
from nanoalign.losses import DPO_LOSSES, margin
from nanoalign.world import measure

SEEDS = 1, 2
EVERY = 5  # each 5th pair speaks against length
ALPHA = 0.27  # nats a token: the longer reply wins with odds of 4, and has 5.2 tokens more
LOSSES = {  # name: (its flags, does its reward compare with the reference, is it an average)
    "sigmoid": (dict(beta=0.1), True, False),
    "sigmoid_norm": (dict(beta=5), True, True),
    "simpo": (dict(beta=2.5, simpo_gamma=1.25), False, True),
    "r_dpo": (dict(beta=0.1), True, False),
}
LONGER = 0.1  # sentences increased if their share rose by more than this
MISLED = 0.05  # length misleads if it costs more than this share of the comparisons


def r_dpo(policy, reference, lengths, beta):
    """Park et al.: -log sigmoid(beta * margin + alpha * (tokens chosen - rejected))."""
    longer = lengths.chosen - lengths.rejected
    return -F.logsigmoid(beta * margin(policy, reference) + ALPHA * longer)


DPO_LOSSES["r_dpo"] = r_dpo  # its name is a valid --loss_type now


def mixed(rows: list[dict], rng: random.Random) -> list[dict]:
    """Pairs that the right reply wins; it is the longer one in all but each 5th."""
    out = []
    for i, row in enumerate(rows):
        long, terse, mistake = row["chosen"], row["rejected"], wrong(row["rejected"], rng)
        chosen, rejected = long, mistake
        if i % EVERY == 0:
            chosen, rejected = terse, mistaken(long, terse, mistake)
        out.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return out


def run(small: bool) -> Report:
    rng = random.Random(0)
    data, test = mixed(pairs("dpo", small), rng), pairs("test", small)
    asked = [row["question"] for row in test]
    replies = {"long": [row["sentence"] for row in test], "terse": [row["terse"] for row in test]}
    replies["wrong long"] = [
        mistaken(row["sentence"], row["terse"], wrong(row["terse"], rng)) for row in test
    ]
    compared = ("long", "terse"), ("long", "wrong long"), ("terse", "wrong long")
    reference = load(sft_model(small))
    start = {kind: logps(reference, asked, texts) for kind, texts in replies.items()}
    lengths = {  # of each reply, with the marker that ends it
        kind: torch.tensor([1 + len(ids) for ids in reference.tokenizer(texts)["input_ids"]])
        for kind, texts in replies.items()
    }
    shares = "right answers, greedy", "full sentences, sampled"
    before = [measure(reference)[share] for share in shares]
    rows, found = [["before", "", "", "", "", *before]], {}
    for loss, (flags, compares, average) in LOSSES.items():
        for seed in SEEDS[: 1 if small else None]:
            policy, _ = train("dpo", data, small, seed=seed, loss_type=loss, **flags)
            reward = {}
            for kind, texts in replies.items():
                gained = logps(policy, asked, texts) - (start[kind] if compares else 0)
                reward[kind] = gained / lengths[kind] if average else gained
            wins = [float((reward[a] > reward[b]).float().mean()) for a, b in compared]
            after = measure(policy)
            found.setdefault(loss, []).append([*wins, *(after[share] for share in shares)])
            rows.append([loss, seed, *found[loss][-1]])

    columns = [f"{a} beats {b}" for a, b in compared] + ["right, greedy", "sentences, sampled"]

    def draw(figure):
        axis = figure.add_subplot()
        for i, (loss, runs) in enumerate(found.items()):
            for run_of_seed in runs:
                places = [place + 0.15 * (i - 1) for place in range(len(columns))]
                label = loss if run_of_seed is runs[0] else None
                axis.plot(places, run_of_seed, "o", color=f"C{i}", label=label)
        axis.set_xticks(range(len(columns)), [column.replace(" ", "\n") for column in columns])
        axis.axhline(0.5, color="black", linewidth=0.5)
        axis.set(ylabel="share")
        axis.legend(fontsize=8)

    dpo = [mean(column) for column in zip(*found["sigmoid"])]
    held = [
        (f"DPO: sentences increase by over {LONGER:.0%}", dpo[4] > before[1] + LONGER),
        (f"DPO: length costs the answer over {MISLED:.0%}", dpo[2] < dpo[1] - MISLED),
    ]
    for loss in [loss for loss in found if loss != "sigmoid"]:
        here = [mean(column) for column in zip(*found[loss])]
        held += [
            (f"{loss}: fewer sentences than of DPO", here[4] < dpo[4]),
            (f"{loss}: right but terse wins more often than of DPO", here[2] > dpo[2]),
        ]
    return Report(["loss", "seed", *columns], rows, held, draw)
