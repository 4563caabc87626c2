"""DPO on three replies with one parameter: how often a pair is shown decides which reply wins.

"Why DPO is a Misspecified Estimator" (arXiv 2510.20413): if no policy of the class has the optimum
that the rewards ask for, DPO's answer depends on how often each pair is in the data, and it may
order the replies the other way round. RLHF's answer, the policy of the highest E[r] - beta KL, does
not depend on that.

Here a policy has one parameter t and is proportional to exp(t f(y)) on three replies with f = 0, 1
and 3, so the reference, t = 0, gives each 1/3. Their rewards are 0, 1 and -0.5: the middle reply is
the best, and the last the worst. The pair (middle, first) asks for a positive t, and the pair
(middle, last) for a negative one. Labels follow Bradley-Terry: the better of two replies wins with
probability sigmoid(difference of rewards). A share s of the pairs are of the first kind.

The loop is the lesson's own (train.py's optimizer_step, losses.py's dpo_loss), on the expected
loss, for five shares. The truth is a grid over t: of DPO's expected loss, and of RLHF's objective.
Expected: DPO lands on the grid's optimum for every s; for small s it is negative, so the replies
are ordered first, middle, last, and for large s positive: last, middle, first, the worst one on
top. RLHF's t is one number and negative.
"""

import torch
import torch.nn.functional as F

from experiments.lab import Report
from nanoalign.losses import dpo_loss
from nanoalign.train import optimizer_step

FEATURES = torch.tensor([0.0, 1.0, 3.0])
REWARDS = torch.tensor([0.0, 1.0, -0.5])
BETA = 0.5
SHARES = 0.5, 0.8, 0.9, 0.95, 0.99
GRID = torch.linspace(-4, 4, 1601)
WITHIN = 0.01  # of t
BETTER = torch.tensor([1, 1])  # of the two pairs, (middle, first) and (middle, last)
WORSE = torch.tensor([0, 2])


def logps(t: torch.Tensor) -> torch.Tensor:
    """log pi of the three replies, (..., 3), for t (...)."""
    return F.log_softmax(t[..., None] * FEATURES, -1)


def expected_loss(t: torch.Tensor, share: float) -> torch.Tensor:
    """DPO's loss over pairs and labels, for one t: mean of both labels' losses, weighted."""
    policy, reference = logps(t), logps(torch.zeros(()))
    wins = torch.sigmoid(REWARDS[BETTER] - REWARDS[WORSE])
    total = 0.0
    for chosen, rejected, weight in ((BETTER, WORSE, wins), (WORSE, BETTER, 1 - wins)):
        given = [p[at] for p in (policy, reference) for at in (chosen, rejected)]
        losses, *_ = dpo_loss(*given, beta=BETA)
        total = total + (torch.tensor([share, 1 - share]) * weight * losses).sum()
    return total


def by_dpo(share: float, steps: int) -> float:
    """t after `steps` of the loop."""
    t = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([t], weight_decay=0.0)
    for step in range(steps):
        rate = 0.1 * (1 - step / steps)
        optimizer_step(optimizer, rate, [{"loss": (expected_loss(t, share), 1)}])
    return t.item()


def run(small: bool) -> Report:
    log_pi = logps(GRID)
    kl = (log_pi.exp() * (log_pi - logps(torch.zeros(())))).sum(-1)
    objective = (log_pi.exp() * REWARDS).sum(-1) - BETA * kl
    rlhf = GRID[objective.argmax()].item()
    rows, off, found = [], [], {}
    for share in SHARES:
        t = by_dpo(share, 5 if small else 400)
        truth = GRID[torch.stack([expected_loss(g, share) for g in GRID]).argmin()].item()
        best = "first" if t < 0 else "last"
        mean_reward = (logps(torch.tensor(t)).exp() @ REWARDS).item()
        rows.append([share, t, truth, rlhf, f"{best} reply on top", mean_reward])
        off.append(abs(t - truth))
        found[share] = t

    def draw(figure):
        axis = figure.add_subplot()
        axis.plot(*zip(*found.items()), "o-", label="DPO")
        axis.axhline(rlhf, color="black", linewidth=1, label="RLHF, whatever the share")
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set(xlabel="share of the pairs (middle, first)", ylabel="t (over 0: the worst on top)")
        axis.legend()

    held = [
        (f"DPO lands on the optimum of its expected loss, to {WITHIN}", max(off) <= WITHIN),
        (f"with a share of {SHARES[0]} its t is negative", found[SHARES[0]] < 0),
        (f"with {SHARES[-1]} positive: the worst reply is on top", found[SHARES[-1]] > 0),
        ("RLHF's t is negative", rlhf < 0),
    ]
    columns = ["share", "t by DPO", "by the grid", "t by RLHF", "DPO's order", "mean reward"]
    return Report(columns, rows, held, draw)
