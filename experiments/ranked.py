"""Ranked replies: DPO's optimum puts all K of them at their rewards over beta, at once.

DPO's appendix A.3 (arXiv 2305.18290) writes its loss for rankings, with the Plackett-Luce model;
this package makes all K (K - 1) / 2 pairs of a ranking and takes DPO's loss of each (LiPO, arXiv
2402.01878, compares the two ways). If rankings come from Plackett-Luce with rewards r_i, reply i is
before j with probability sigmoid(r_i - r_j). So the pairs follow Bradley-Terry, and the optimum of
their loss is equation 4 for all replies at once: log pi / pi_ref of reply i is r_i / beta plus a
number that all replies to a question share.

Here each question has four right replies: the sentence, the terse reply, the sentence without its
full stop, and the terse reply with one. Their rewards are 2, 1, 0 and -1, so a full stop is worth 2
in a sentence and -2 in a terse reply: no style is good by itself. A ranking is drawn for each of
3,840 questions. Measured on the test questions: log pi / pi_ref of each reply, minus its mean over
the four, for two betas; and for one pair of each ranking instead of all six.

Expected: each of the four is at (r_i - mean r) / beta, to 0.25 / beta nats. One pair of a ranking
has the same optimum and a sixth of the comparisons, so it is less exact; the pairs of one ranking
are not independent, so it is not worse by all of sqrt(6).
"""

import random
from math import log
from statistics import mean

from experiments.lab import Report, load, logps, pairs, sft_model, train

REWARDS = {"sentence": 2.0, "terse": 1.0, "sentence, no stop": 0.0, "terse and stop": -1.0}
STEPS, BATCH = 120, 32
WITHIN = 0.25  # nats, over beta


def replies(terse: str, sentence: str) -> list[str]:
    """The four, in the order of REWARDS."""
    return [sentence, terse, sentence.removesuffix("."), f"{terse}."]


def drawn(texts: list[str], rng: random.Random) -> list[str]:
    """A ranking from Plackett-Luce: sorted by reward plus Gumbel noise."""
    noisy = [r - log(-log(rng.random())) for r in REWARDS.values()]
    return [text for _, text in sorted(zip(noisy, texts), reverse=True)]


def run(small: bool) -> Report:
    rng, rankings, singles = random.Random(0), [], []
    for row in pairs("dpo", small)[: STEPS * BATCH]:
        order = drawn(replies(row["rejected"], row["chosen"]), rng)
        rankings.append({"prompt": row["prompt"], "responses": order})
        i, j = sorted(rng.sample(range(len(order)), 2))
        singles.append({"prompt": row["prompt"], "chosen": order[i], "rejected": order[j]})
    asked = pairs("test", small)
    prompts = [row["question"] for row in asked]
    each = list(zip(*(replies(row["terse"], row["sentence"]) for row in asked)))
    reference = load(sft_model(small))
    start = [logps(reference, prompts, texts) for texts in each]
    middle = mean(REWARDS.values())

    rows, off, points = [], {}, {}
    for name, data, beta in (
        ("all six pairs", rankings, 1.0),
        ("all six pairs", rankings, 0.5),
        ("one pair", singles, 1.0),
    ):
        flags = dict(beta=beta, max_steps=STEPS, per_device_train_batch_size=BATCH)
        policy, _ = train("dpo", data, small, **flags)
        ratios = [logps(policy, prompts, texts) - s for texts, s in zip(each, start)]
        found = [float((ratio - sum(ratios) / len(ratios)).mean()) for ratio in ratios]
        truth = [(r - middle) / beta for r in REWARDS.values()]
        key = f"{name}, beta {beta:g}"
        off[key] = beta * max(abs(f - t) for f, t in zip(found, truth))
        points[key] = truth, found
        rows.append([key, *(f"{f:.2f} ({t:g})" for f, t in zip(found, truth)), off[key]])

    def draw(figure):
        axis = figure.add_subplot()
        axis.plot([-3, 3], [-3, 3], color="black", lw=1, label="(r - mean r) / beta")
        for key, (truth, found) in points.items():
            axis.plot(truth, found, "o", label=key)
        axis.set(xlabel="by formula, nats", ylabel="log pi / pi_ref, minus its mean, nats")
        axis.legend()

    six, half, one = off.values()
    held = [
        (f"beta 1: each reply at its reward over beta, to {WITHIN} nats", six <= WITHIN),
        (f"beta 0.5: the same, to {WITHIN / 0.5} nats", half <= WITHIN),
        ("one pair of a ranking is less exact", one > six),
    ]
    columns = ["trained on", *REWARDS, "worst, times beta"]
    return Report(columns, rows, held, draw)
