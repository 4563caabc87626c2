"""KTO where thumbs up are rare: the weight that repairs it, one reply a prompt, and z0.

The claims (KTO, Ethayarajh et al. 2024, arXiv 2402.01306). Section 4.3 and figure 6 of its first
version: up to 90 % of the desirable examples can be left out, if their weight keeps
w_up n_up : w_down n_down about even (eq. 8). Table 1: one reply for each prompt does about as well
as both. Table 2: KTO is at least as good as DPO on the same pairs, and without the reference point
z0 it is worse. The authors' guide: an optimizer step needs 4 examples or more to estimate z0.

Here 1,280 pairs of the built-in world are 2,560 labels: the sentence gets thumbs up, the terse
answer thumbs down. Then only every 10th or 50th thumbs up stays. All runs take as many steps of 64
labels (DPO: 32 pairs). Measured: the share of held-out questions answered rightly, and in a
sentence. Expected: with equal weights the many thumbs down only push probability away, and nothing
says where to, so that the answers break; the weight says it again.

The last four runs are short (640 labels) and cut into steps of 1, 4, 16, 64; the learning rate goes
with the square root of the size. z0 is a mean over a step, so its spread from step to step should
fall with that square root, 8 times from 1 to 64. And as z0 is cut off at 0, noise lifts its mean.
"""

from statistics import mean, pstdev

from experiments.lab import Report, load, pairs, sft_model, train
from nanoalign.world import measure

SEEDS = 1, 2
PAIRS = 1280
BROKEN = 0.05  # the answers are broken if the share of right ones lost more than this
SAME = 0.02  # shares closer than this count as equal: 10 of the 500 held-out questions
NOISIER = 4.0  # z0's spread at steps of 1 over that at 64, at least; the square root says 8


def thumbs(rows: list[dict], every: int = 1, one_reply: bool = False) -> list[dict]:
    """Each pair as two labels, of which each `every`th thumbs up stays; or as one, in turn."""
    out = []
    for i, row in enumerate(rows):
        if i % every == 0 and not (one_reply and i % 2):
            out.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        if not one_reply or i % 2:
            out.append({"prompt": row["prompt"], "completion": row["rejected"], "label": False})
    return out


def run(small: bool) -> Report:
    data = pairs("dpo", small)[:PAIRS]
    both, tenth, fiftieth = (thumbs(data, every) for every in (1, 10, 50))
    variants = {
        "DPO on the pairs": ("dpo", data, {}),
        "1:1": ("kto", both, {}),
        "one reply a prompt": ("kto", thumbs(data, one_reply=True), {}),
        "1:10": ("kto", tenth, {}),
        "1:10, weight 10": ("kto", tenth, dict(desirable_weight=10)),
        "1:50": ("kto", fiftieth, {}),
        "1:50, weight 50": ("kto", fiftieth, dict(desirable_weight=50)),
        "1:1, no z0": ("kto", both, dict(loss_type="apo_zero_unpaired")),
    }
    shares = "right answers, greedy", "full sentences, sampled"
    before = [measure(load(sft_model(small)))[share] for share in shares]
    rows, right, sentences, z0 = [["before", "", *before, "", ""]], {}, {}, {}

    def one(name, method, rows_of_data, seed, **how):
        policy, lines = train(method, rows_of_data, small, seed=seed, logging_steps=1, **how)
        after = measure(policy)
        found = [line["kl"] for line in lines[len(lines) // 2 :] if "kl" in line]
        spread = [mean(found), pstdev(found)] if found else ["", ""]
        rows.append([name, seed, *(after[share] for share in shares), *spread])
        right.setdefault(name, []).append(after[shares[0]])
        sentences.setdefault(name, []).append(after[shares[1]])
        z0[name] = spread

    for name, (method, rows_of_data, how) in variants.items():
        for seed in SEEDS[: 1 if small else None]:
            one(name, method, rows_of_data, seed, **how)
    sizes = (1, 4, 16, 64)
    for size in sizes:
        rate = 1e-3 * (size / 64) ** 0.5
        how = dict(per_device_train_batch_size=size, max_steps=640 // size, learning_rate=rate)
        one(f"steps of {size}", "kto", both, SEEDS[0], **how)

    def draw(figure):
        left, right_hand = figure.subplots(1, 2)
        for i, name in enumerate(right):
            left.plot(right[name], [i] * len(right[name]), "o", color="tab:blue")
        left.set_yticks(range(len(right)), list(right))
        left.invert_yaxis()
        left.axvline(before[0], color="black", linewidth=0.5)
        left.set(xlabel="right answers, greedy (line: before)")
        means, spreads = zip(*(z0[f"steps of {size}"] for size in sizes))
        right_hand.errorbar(sizes, means, spreads, fmt="o", capsize=4)
        right_hand.set(
            xlabel="labels a step", ylabel="z0, mean and spread over steps", xscale="log"
        )

    def kept(name, other):  # as many right answers and sentences, with every seed
        return all(min(share[name]) > mean(share[other]) - SAME for share in (right, sentences))

    held = []
    for ratio, weight in (("1:10", 10), ("1:50", 50)):
        lost = before[0] - max(right[ratio])
        held.append((f"{ratio}, equal weights: over {BROKEN:.0%} of answers lost", lost > BROKEN))
        weighted = f"{ratio}, weight {weight}"
        held.append((f"{weighted}: as 1:1, to {SAME:.0%}", kept(weighted, "1:1")))
    noisiest, least = (z0[f"steps of {size}"][1] for size in (1, 64))
    held += [
        (f"one reply a prompt: as both, to {SAME:.0%}", kept("one reply a prompt", "1:1")),
        (f"KTO: as DPO on the same pairs, to {SAME:.0%}", kept("1:1", "DPO on the pairs")),
        (f"without z0: worse by over {SAME:.0%}", not kept("1:1, no z0", "1:1")),
        (f"z0 of steps of 1 spreads {NOISIER:g} times as far as of 64", noisiest > NOISIER * least),
    ]
    columns = ["labels", "seed", "right, greedy", "sentences, sampled", "z0", "its spread"]
    return Report(columns, rows, held, draw)
