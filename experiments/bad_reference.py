"""A reference that is far on the wrong side: DPO's loss falls, and the policy is still wrong.

DPO's optimum (arXiv 2305.18290, eq. 4) adds R / beta to the reference's log-odds of the better
reply. So if the reference prefers the worse one by more than R / beta, the policy of the lowest
loss prefers it too (arXiv 2605.20834 has the conditions). The training looks as it always does: the
loss falls, and the share of pairs with the higher reward for the chosen reply, rewards/accuracies,
goes up. It compares with the reference; it does not say what the policy prefers.

Here the reference is the world's SFT model after SFT on terse replies alone. Full sentences are
worth R = 2 more: they win with probability sigmoid(2). DPO trains with four betas from it. Measured
on the test questions, between their two right replies: the log-odds of the sentence before and
after, and the share of questions on which the policy prefers the sentence.

Expected: every loss falls under ln 2. The mean log-odds are those of the reference plus R / beta,
to 15 % of R / beta (each run sees 3,840 labels). So the policy prefers the sentence only where
beta < R / (minus the reference's log-odds), while rewards/accuracies are above 0.8 in each run:
0.88 of the labels are for the sentence.
"""

import tempfile
from math import exp, log
from statistics import mean

from experiments.lab import Report, flip, load, log_odds, pairs, quietly, sft_model, train
from nanoalign.run.policy import save_policy

REWARD = 2.0
BETAS = 2.0, 1.0, 0.5, 0.25
STEPS, BATCH = 120, 32
WITHIN = 0.15  # of R / beta
ACCURACY = 0.8


def run(small: bool) -> Report:
    data = pairs("dpo", small)[: STEPS * BATCH]
    terse = [dict(prompt=row["prompt"], completion=row["rejected"]) for row in data]
    labels = flip(data, 1 / (1 + exp(REWARD)), seed=0)
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as reference:
        how = dict(model_name_or_path=sft_model(small), learning_rate=1e-4, max_steps=60)
        how["per_device_train_batch_size"] = 64
        with quietly():
            save_policy(train("sft", terse, small, **how)[0], reference)
        before, _ = log_odds(load(reference), small)
        for beta in BETAS:
            flags = dict(beta=beta, max_steps=STEPS, per_device_train_batch_size=BATCH)
            policy, lines = train("dpo", labels, small, model_name_or_path=reference, **flags)
            after, _ = log_odds(policy, small)
            loss = mean(line["loss"] for line in lines[-5:])
            accuracy = mean(line["rewards/accuracies"] for line in lines[-5:])
            truth = before + REWARD / beta
            moved = (after - before).mean().item()
            shares = [(odds > 0).float().mean().item() for odds in (before, after, truth)]
            rows.append(
                [beta, REWARD / beta, moved, after.mean().item(), loss, accuracy, *shares[1:]]
            )
            found[beta] = moved, loss, accuracy, shares[1], truth.mean().item()

    def draw(figure):
        left, right = figure.subplots(1, 2)
        at = [REWARD / beta for beta in BETAS]
        left.plot([0, max(at)], [0, max(at)], color="black", lw=1, label="R / beta")
        left.plot(at, [moved for moved, *_ in found.values()], "o", label="DPO")
        left.axhline(-before.mean().item(), color="grey", ls="--", label="what the reference lacks")
        left.set(xlabel="R / beta", ylabel="added to the log-odds, nats")
        right.plot(at, [row[2] for row in found.values()], "o-", label="rewards/accuracies")
        right.plot(at, [row[3] for row in found.values()], "s-", label="prefers the sentence")
        right.set(xlabel="R / beta", ylabel="share")
        left.legend(), right.legend()

    start = before.mean().item()
    wrong = [beta for beta, (*_, truth) in found.items() if truth < 0]
    right = [beta for beta, (*_, truth) in found.items() if truth > 0]
    off = max(abs(moved * beta / REWARD - 1) for beta, (moved, *_) in found.items())
    held = [
        ("every loss falls under ln 2", all(loss < log(2) for _, loss, *_ in found.values())),
        (f"what DPO adds is R / beta, to {WITHIN:.0%} (worst: {off:.0%})", off <= WITHIN),
        (f"rewards/accuracies are over {ACCURACY}", all(f[2] > ACCURACY for f in found.values())),
        ("where R / beta is too small the policy prefers the terse reply on most questions",
         bool(wrong) and all(found[beta][3] < 0.5 for beta in wrong)),
        ("and where it is large enough the sentence",
         bool(right) and all(found[beta][3] > 0.5 for beta in right)),
    ]  # fmt: skip
    notes = [f"the reference's log-odds of the sentence are {start:.2f} (sd {before.std():.2f})"]
    columns = ["beta", "R / beta", "DPO added", "log-odds after", "loss", "rewards/accuracies"]
    columns += ["prefers the sentence", "by formula"]
    return Report(columns, rows, held, draw, notes)
