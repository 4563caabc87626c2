"""DPO lands on the closed-form optimum of the reward that its labels were drawn from.

Direct Preference Optimization (arXiv 2305.18290), equation 4 and figure 2. Of all policies the one
with the highest E[r] - beta KL(pi || pi_ref) is pi_ref(y | x) exp(r(x, y) / beta), normalized. Let
a full sentence be worth R and a terse reply 0, and draw which of the two wins from the
Bradley-Terry model: the sentence with probability sigmoid(R). Then the optimum is known on paper:
it adds h = R / beta to the reference's log-odds of a sentence, on every question, and the share of
sentences and the KL follow. Equation 7 says that DPO finds it without being told R. Measured on
the test questions, between their two right replies, for five betas and three rewards, one of them
with three draws of the labels.

The picture's right half is the paper's figure 2 with the true frontier drawn in: no policy can have
more reward at the same KL, and to reach it h must be the same on every question. So DPO should be
on it, and others below it by how unequally they tilt the questions: IPO, which averages over
tokens, and SFT on the chosen replies, whose optimum forgets the reference. KTO has no optimum on
such labels, only a stopping time: its loss is linear in a sigmoid, so it follows their majority.
"""

from math import exp

import torch
import torch.nn.functional as F
from torch import Tensor

import train_dpo
from experiments.lab import Report, flip, load, log_odds, pairs, sft_model, train
from nanoalign.model import Policy

H_WITHIN = 0.1  # of R / beta: 240 steps see 7,680 labels, which leaves 2 % of chance in h
SHARE_WITHIN = 0.03
KL_WITHIN = 0.04  # nats
BELOW_WITHIN = 0.03  # share of sentences below the frontier's, at the policy's own KL
STEPS, BATCH = 240, 32

LORA = {name: train_dpo.BUILT_IN[name] for name in ("learning_rate", "lora_alpha")}
RUNS = [  # method, R, seed of the labels, steps, flags
    *[("DPO", 2.0, 0, STEPS, {"beta": beta}) for beta in (0.25, 0.5, 1.0, 2.0, 4.0)],
    *[("DPO", reward, 0, STEPS, {"beta": 0.5}) for reward in (1.0, 3.0)],
    *[("DPO", 2.0, seed, STEPS, {"beta": 1.0}) for seed in (1, 2)],
    *[("IPO", 2.0, 0, STEPS, {"beta": beta, "loss_type": "ipo"}) for beta in (2.0, 0.5, 0.2)],
    *[("KTO", 2.0, 0, steps, {"beta": 0.5}) for steps in (5, 10, 40)],
    ("SFT", 2.0, 0, STEPS, LORA | {"use_peft": True}),
]


def share_and_kl(odds: Tensor, h: Tensor | float) -> tuple[float, float]:
    """Of a policy that adds h to the reference's log-odds of a sentence, each (n,): the share of
    sentences and KL(pi || pi_ref) in nats, averaged over the questions."""
    share = (odds + h).sigmoid()
    kl = share * (F.logsigmoid(odds + h) - F.logsigmoid(odds))
    kl += (1 - share) * (F.logsigmoid(-odds - h) - F.logsigmoid(-odds))
    return share.mean().item(), kl.mean().item()


def trained(method: str, reward: float, seed: int, steps: int, flags: dict, small: bool) -> Policy:
    rows = pairs("dpo", small)[: steps * BATCH]  # all new to it: one epoch
    rows = flip(rows, 1 / (1 + exp(reward)), seed)  # the terse reply wins with sigmoid(-R)
    if method == "SFT":
        rows = [dict(prompt=row["prompt"], completion=row["chosen"]) for row in rows]
        flags = {**flags, "model_name_or_path": sft_model(small)}
    batch = 2 * BATCH if method == "KTO" else BATCH  # to KTO a pair is two examples
    flags = {**flags, "max_steps": steps, "per_device_train_batch_size": batch}
    return train("dpo" if method == "IPO" else method.lower(), rows, small, **flags)[0]


def run(small: bool) -> Report:
    before, mass = log_odds(load(sft_model(small)), small)
    frontier = torch.tensor([share_and_kl(before, h / 100) for h in range(2000)])
    rows, wrong, dots = [], [], {}
    for method, reward, *how in RUNS[::4] if small else RUNS:
        odds, mass_now = log_odds(trained(method, reward, *how, small), small)
        h, (share, kl) = odds - before, share_and_kl(before, odds - before)
        below = frontier[(frontier[:, 1] - kl).abs().argmin(), 0].item() - share
        goal = best = best_kl = "-"
        if method == "DPO":
            goal = reward / how[-1]["beta"]
            best, best_kl = share_and_kl(before, goal)
            h_off = abs(h.mean().item() / goal - 1)
            wrong.append((h_off, abs(share - best), abs(kl - best_kl), below))
        name = f"{method}, {how[1]} steps"
        name += f", beta {how[-1]['beta']:g}" if "beta" in how[-1] else ""
        h_found = f"{h.mean():.2f} (sd {h.std():.2f})"
        rows.append([name, reward, h_found, goal, share, best, kl, best_kl, below, mass_now])
        dots.setdefault(method, []).append((goal, h.mean().item(), kl, share))

    def draw(figure):
        left, right = figure.subplots(1, 2)
        left.loglog([0.4, 10], [0.4, 10], color="black", lw=1, label="h = R / beta")
        left.loglog(*list(zip(*dots["DPO"]))[:2], "o", label="DPO")
        left.set(xlabel="R / beta", ylabel="h, nats", title="What DPO adds to the log-odds")
        right.plot(
            frontier[:, 1], frontier[:, 0], color="black", lw=1, label="frontier, by formula"
        )
        for (method, points), marker in zip(dots.items(), "os^*"):
            right.plot(*list(zip(*points))[2:], marker, label=method)
        right.set(xlabel="KL(policy || reference), nats", ylabel="share of sentences")
        right.set_title("Reward against KL")
        left.legend(), right.legend()

    columns = ["run", "R", "h", "R / beta", "share", "by formula", "KL", "by formula"]
    columns += ["below the frontier", "mass on the two"]
    worst = [max(column) for column in zip(*wrong)]
    limits = [H_WITHIN, SHARE_WITHIN, KL_WITHIN, BELOW_WITHIN]
    names = ["h, relative to R / beta,", "the share", "the KL, in nats,", "DPO below the frontier"]
    held = [(f"{n} within {m} (worst: {w:.3f})", w <= m) for n, m, w in zip(names, limits, worst)]
    others = max(row[-2] for row in rows if not row[0].startswith("DPO"))
    notes = [
        f"before, the two right replies had {mass:.3f} of the mass; h, share and KL are of the "
        "policy between these two alone",
        f"the other losses are at most {others:.3f} below the frontier, furthest where h differs "
        "most between the questions. With two replies to choose from there is no other way to "
        "waste KL, so this frontier says how far a loss goes and not, as the paper's does, which "
        "one spends KL best",
    ]
    return Report(columns, rows, held, draw, notes)
