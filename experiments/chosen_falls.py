"""Near-identical pairs: DPO lowers the chosen reply too, and then breaks the answers.

The claim (DPO-Positive, Pal et al. 2024, arXiv 2402.13228): DPO's loss (DPO, arXiv 2305.18290,
eq. 7) sees only the difference of two log-ratios, so it is content when both fall as long as the
rejected reply falls faster; and with pairs that differ in a few tokens they do fall together, since
nearly all that a gradient step knows of one reply it knows of the other.

Here the chosen reply is the right sentence, and the rejected one the same sentence with a wrong
answer: "In order they are c k p." and "In order they are k p c.". Nothing in such data speaks
against sentences. As a control, the rejected reply is the wrong answer alone ("k p c"): the same
questions, chosen replies and mistakes, but now the replies differ in every token.

Measured on held-out pairs: log pi - log pi_ref of both replies, in nats, where pi_ref is the policy
that DPO began with, and how the policy answers (world.py). Four remedies side by side: RPO's term,
the chosen reply's own negative log-likelihood (arXiv 2404.19733, eq. 1); a higher beta, the price
of leaving the reference; SFT on the chosen replies first; and SFT on both replies first, which
"Learning Dynamics of LLM Finetuning" (arXiv 2407.10490) has against squeezing: to push an unlikely
reply down lifts the likeliest one alone, so the rejected reply is made likely first. Expected: the
first repairs both, since it asks for what DPO forgets; beta makes the fall smaller, since the
optimum is nearer; SFT on the chosen replies changes where the fall begins, not that it comes; after
SFT on both the chosen reply ends higher than after SFT on the chosen alone.
"""

import random
import tempfile

from experiments.lab import Report, load, logps, pairs, quietly, sft_model, train
from nanoalign.run.policy import save_policy
from nanoalign.world import LETTERS, ROOMS, measure

SEEDS = 1, 2
FALLS = 0.5  # nats: the chosen reply has fallen if it lost more than this
BROKEN = 0.05  # the answers are broken if the share of right ones lost more than this
HELD_UP = 0.02  # and repaired if it lost less than this


def wrong(answer: str, rng: random.Random) -> str:
    """Another answer of the same kind: letters in another order, another letter, another room."""
    words = answer.split()
    if len(words) > 1:
        return " ".join(words[1:] + words[:1])
    others = LETTERS if len(answer) == 1 else ROOMS
    return rng.choice([other for other in others if other != answer])


def mistaken(sentence: str, answer: str, mistake: str) -> str:
    """The sentence, which ends with the answer, with a mistake in its place."""
    return sentence.removesuffix(f"{answer}.") + f"{mistake}."


def run(small: bool) -> Report:
    rng, near, far = random.Random(0), [], []
    for row in pairs("dpo", small):  # chosen is the right sentence, rejected the right answer alone
        mistake = wrong(row["rejected"], rng)
        near.append({**row, "rejected": mistaken(row["chosen"], row["rejected"], mistake)})
        far.append({**row, "rejected": mistake})
    held_out = pairs("test", small)
    asked = [row["question"] for row in held_out]
    right = [row["sentence"] for row in held_out]
    mistakes = [wrong(row["terse"], rng) for row in held_out]
    close = [mistaken(row["sentence"], row["terse"], m) for row, m in zip(held_out, mistakes)]

    with tempfile.TemporaryDirectory() as work, quietly():
        how = dict(model_name_or_path=sft_model(small), learning_rate=1e-4, max_steps=40)
        how["per_device_train_batch_size"] = 64
        after = {}
        for name, which in (("chosen", ["chosen"]), ("both", ["chosen", "rejected"])):
            taught = [dict(prompt=row["prompt"], completion=row[w]) for row in near for w in which]
            policy, _ = train("sft", taught, small, **how)
            after[name] = f"{work}/{name}"
            save_policy(policy, after[name])
        variants = {
            "DPO, beta 0.1": (near, close, {}),
            "replies that share nothing": (far, mistakes, {}),
            "rpo_alpha 1": (near, close, dict(rpo_alpha=1)),
            "beta 0.5": (near, close, dict(beta=0.5)),
            "SFT on the chosen first": (near, close, dict(model_name_or_path=after["chosen"])),
            "SFT on both first": (near, close, dict(model_name_or_path=after["both"])),
        }
        before = measure(load(sft_model(small)))
        share = "right answers, greedy", "full sentences, greedy"
        rows, found, curves = [["before", "", 0.0, 0.0, *(before[s] for s in share)]], {}, {}
        for name, (data, rejected, how) in variants.items():
            how = {"beta": 0.1, "max_steps": 120} | how
            reference = load(how.get("model_name_or_path", sft_model(small)))
            start = [logps(reference, asked, replies) for replies in (right, rejected)]
            for seed in SEEDS[: 1 if small else None]:
                policy, lines = train("dpo", data, small, seed=seed, **how)
                end = [logps(policy, asked, replies) for replies in (right, rejected)]
                moved = [float((e - s).mean()) for e, s in zip(end, start)]
                now = measure(policy)
                rows.append([name, seed, *moved, *(now[s] for s in share)])
                found.setdefault(name, []).append((moved[0], now[share[0]] - before[share[0]]))
                curves[name] = [(x["step"], x["rewards/chosen"] / how["beta"]) for x in lines]

    def draw(figure):
        axis = figure.add_subplot()
        for name, points in curves.items():
            axis.plot(*zip(*points), label=name)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set(xlabel="step", ylabel="chosen: log pi - log pi_ref, nats")
        axis.legend(fontsize=8)

    fall = {name: max(fell for fell, _ in pairs) for name, pairs in found.items()}  # the least fall
    deepest = {name: min(fell for fell, _ in pairs) for name, pairs in found.items()}
    lost = {name: [answers for _, answers in pairs] for name, pairs in found.items()}
    plain = "DPO, beta 0.1"
    held = [
        (f"near-identical pairs: the chosen reply loses over {FALLS} nats", fall[plain] < -FALLS),
        (f"and over {BROKEN:.0%} of the right answers are lost", max(lost[plain]) < -BROKEN),
        (
            "replies that share nothing: neither",
            deepest["replies that share nothing"] > -FALLS
            and min(lost["replies that share nothing"]) > -HELD_UP,
        ),
        (
            f"rpo_alpha repairs both (to {HELD_UP:.0%})",
            deepest["rpo_alpha 1"] > 0 and min(lost["rpo_alpha 1"]) > -HELD_UP,
        ),
        ("beta 0.5: the fall is smaller", deepest["beta 0.5"] > fall[plain]),
        (
            "SFT first: the chosen reply falls all the same",
            fall["SFT on the chosen first"] < -FALLS,
        ),
        (
            "SFT on both first: it falls less than after SFT on the chosen",
            deepest["SFT on both first"] > fall["SFT on the chosen first"],
        ),
    ]
    notes = [
        "The control comes out in part: where the replies share no token the chosen one rises, by "
        "half a nat, and stays up for 90 steps. Then it falls, with one seed below where it "
        "began, and 1 and 7 % of the right answers are lost, not 8 and 19 %. The labels all go one "
        "way, so that DPO has no optimum but only a stopping time (IPO, arXiv 2310.12036, section "
        "4.2): at beta 0.1 the rejected reply is driven down by 30 nats.",
        "Beta 0.5 lowers the rejected reply by 9 nats and not by 13. The chosen one falls as far: "
        "its fall comes in the first 30 steps, and there AdamW's steps are as long with either "
        "beta.",
        "SFT on the chosen replies first keeps the sentences, and loses more of the answers.",
        "SFT on both replies first is no remedy here. For 25 steps of DPO the chosen reply does "
        "not fall, as the paper has it; in the end it falls further. SFT on both teaches the "
        "mistakes too: after it 88 % of the sampled answers were right, and 96 % after SFT on the "
        "chosen alone. That this is the reason was not tried.",
    ]
    columns = ["", "seed", "chosen, nats", "rejected, nats", "right, greedy", "sentences, greedy"]
    return Report(columns, rows, held, draw, notes)
