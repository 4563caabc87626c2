"""Flipped labels give DPO an optimum, and labels without noise have none.

DPO (arXiv 2305.18290, eq. 7) on pairs of which a share f is the wrong way round ends at the
log-odds of the labels: the margin of its log-ratios is h = ln((1 - f) / f) / beta. Conservative DPO
(the same authors' note; label_smoothing e) smooths these labels once more, so it undershoots; where
no label was flipped it has an optimum of its own, h = ln((1 - e) / e) / beta. Robust DPO (arXiv
2403.00409) undoes the flips on average, so it lands where DPO would on clean labels. And there DPO
has no optimum: IPO's argument (arXiv 2310.12036, section 4.2) is that whatever beta is, the loss
asks for a rejected reply of probability 0. IPO stops at a margin per token of (1 - 2 f) / (2 beta).

Measured on the test questions between their two right replies: h, or IPO's margin per token, and
the probability that the two replies still have together. Expected: each loss at its own formula;
robust DPO well above DPO; DPO on clean labels still on its way when the steps are doubled, and
taking probability from both replies, while everything with an optimum leaves it with them.
"""

from math import log

import torch

from experiments.lab import Report, flip, load, logps, pairs, sft_model, train
from nanoalign.model import Policy

WITHIN = 0.1  # of the formula's beta h (IPO: of its margin per token), and as much as this besides,
# because 2,560 labels leave 0.04 to 0.07 of chance in it
ROBUST = 1.5  # times DPO's h, at least
GROWTH = 1.3  # times its h, at least, on clean labels when the steps are doubled
LOST = 0.02  # probability that DPO on clean labels takes from the two replies, at least
STEPS, BATCH, BETA = 80, 32, 0.5

RUNS = [("DPO", 0.0, 0.0, 2 * STEPS), ("cDPO", 0.0, 0.2, STEPS)]  # method, flipped, e, steps
RUNS += [(method, 0.0, 0.0, STEPS) for method in ("DPO", "IPO")]
for f in (0.1, 0.2, 0.4):
    RUNS += [("DPO", f, 0.0, STEPS), ("cDPO", f, f, STEPS), ("robust", f, f, STEPS)]
    RUNS += [("IPO", f, 0.0, STEPS)]


def formula(method: str, flipped: float, e: float) -> float | None:
    """h at the optimum, or IPO's margin per token; None where there is no optimum."""
    if method == "IPO":
        return (1 - 2 * flipped) / (2 * BETA)
    wrong = flipped * (1 - e) + (1 - flipped) * e if method == "cDPO" else flipped
    return None if method == "robust" or wrong == 0 else log((1 - wrong) / wrong) / BETA


def both(policy: Policy, asked: list[dict]) -> torch.Tensor:
    """log pi of the right sentence and of the right terse reply to each question. (2, n)"""
    prompts = [row["question"] for row in asked]
    sides = [[row[side] for row in asked] for side in ("sentence", "terse")]
    return torch.stack([logps(policy, prompts, replies) for replies in sides])


def run(small: bool) -> Report:
    asked, start = pairs("test", small), load(sft_model(small))
    before, rows, found = both(start, asked), [], {}
    tokens = [[len(start.tokenizer(row[side])["input_ids"]) + 1 for row in asked]
              for side in ("sentence", "terse")]  # with the marker that ends it  # fmt: skip
    for method, flipped, e, steps in RUNS[:4] if small else RUNS:
        data = flip(pairs("dpo", small)[: steps * BATCH], flipped, seed=int(100 * flipped))
        loss = {"robust": "robust", "IPO": "ipo"}.get(method, "sigmoid")
        flags = dict(loss_type=loss, beta=BETA, max_steps=steps, per_device_train_batch_size=BATCH)
        policy, _ = train("dpo", data, small, **flags, **({"label_smoothing": e} if e else {}))
        after = both(policy, asked)
        ratios = (after - before) / (torch.tensor(tokens) if method == "IPO" else 1)
        h, mass, goal = ratios[0] - ratios[1], after.exp().sum(0).mean().item(), None
        goal = formula(method, flipped, e)
        found[method, flipped, e, steps] = h.mean().item(), goal, mass
        unit = " a token" if method == "IPO" else ""
        name = f"{method}, e = {e}" if e else method
        rows.append([name, f"{flipped:.0%}", steps, f"{h.mean():.2f} (sd {h.std():.2f}){unit}"])
        rows[-1] += ["none" if goal is None else goal, mass]

    def draw(figure):
        axes = figure.subplots()
        for method, marker in (("DPO", "o"), ("cDPO", "s"), ("robust", "^"), ("IPO", "*")):
            dots = [(k[1], *v[:2]) for k, v in found.items() if k[0] == method and k[3] == STEPS]
            x, h, goals = zip(*sorted(dots, key=lambda dot: dot[0])) if dots else ((), (), ())
            (line,) = axes.plot([100 * share for share in x], h, marker, label=method)
            known = [(100 * share, goal) for share, goal in zip(x, goals) if goal is not None]
            axes.plot(*zip(*known), "--", color=line.get_color()) if known else None
        axes.set(xlabel="flipped labels, %", ylabel="h, nats (IPO: a token)")
        axes.set_title(f"After {STEPS} steps; dashed: the formula")
        axes.legend()

    def off(h, goal, scale):
        return abs(h - goal) * scale - WITHIN * (1 + goal * scale)

    far = [k for k, (h, goal, _) in found.items()
           if goal is not None and off(h, goal, 1 if k[0] == "IPO" else BETA) > 0]  # fmt: skip
    twice, once = (found["DPO", 0.0, 0.0, steps] for steps in (2 * STEPS, STEPS))
    apart = [found["robust", f, e, s][0] / found["DPO", f, 0.0, s][0]
             for method, f, e, s in found if method == "robust"]  # fmt: skip
    lost = before.exp().sum(0).mean().item() - twice[2]
    held = [
        (f"each within {WITHIN:.0%} of its formula (beyond it: {far or 'none'})", not far),
        (f"robust {ROBUST} times DPO or more ({[round(a, 2) for a in apart]})",
         min(apart, default=0.0) >= ROBUST),
        (f"clean DPO grows {GROWTH} times or more ({twice[0] / once[0]:.2f})",
         twice[0] >= GROWTH * once[0]),
        (f"and takes {LOST} or more from the two replies ({lost:.3f})", lost >= LOST),
    ]  # fmt: skip
    columns = ["loss", "flipped", "steps", "h", "by formula", "mass on the two"]
    notes = [
        f"before, the two right replies had {before.exp().sum(0).mean():.3f} of the mass",
        f"on clean labels h went from {once[0]:.1f} to {twice[0]:.1f} when the steps were "
        "doubled: the gradient falls like exp(-beta h), so h grows without end, but slowly, by "
        f"about ln 2 / beta = {log(2) / BETA:.1f} nats and not by a factor",
    ]
    return Report(columns, rows, held, draw, notes)
