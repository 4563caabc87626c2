"""Training on prompts too: does it help, and does it cost?

SFT usually trains on replies alone; `nanoalign/chatml.py` is where that is decided. "Instruction
Tuning With Loss Over Instructions" (Shi et al. 2024, arXiv 2405.14394) finds that a loss on the
prompts as well can help where prompts are long, replies short and examples few, as it keeps a model
from overfitting; QLoRA (arXiv 2305.14314, appendix B.3) finds that replies alone are better.

Measured: the world's untrained model learns its questions from all of the data, and from a part of
it in many epochs, with either mask and the same number of steps; on the held-out questions, the
loss of a reply's token and the share of right answers. The world's prompts are made by chance
(which letters, in which order), so to predict them can teach little but what a letter is. Expected:
with all of the data no gain, as the same weights must hold more; with the part, the prompts' loss
makes overfitting less, as the paper has it. Three seeds of the order; the spread is shown.

The second did not hold in an earlier run. Perhaps since letters drawn by chance are not language,
as the paper's prompts are. So there is a third kind of data: the same part, and before each
question another one with its answer, in the prompt, from all of the data. Now a prompt holds what a
reply needs, is long and the reply short. If that was the reason, prompts too are better here.
"""

import random
from dataclasses import replace
from statistics import mean, stdev

import train_sft
from experiments.lab import Report, examples_of, load, pairs, sft_method, token_loss
from nanoalign import world
from nanoalign.model import Policy
from nanoalign.packing import Example
from nanoalign.run.flags import SFTConfig, parse
from nanoalign.train import train

STYLES = "terse", "sentence"
FEW = 500  # examples of the part, out of 30,000


def on_prompts_too(example: Example) -> Example:
    """Every token trains but the first, which nothing predicts."""
    (first, *rest), [(reply, _)] = example.prompt, example.texts
    text = [*rest, *reply]
    return replace(example, prompt=[first], texts=[(text, [True] * len(text))])


def trained_on(policy: Policy, rows: list[dict]) -> list[Example]:
    return examples_of(policy, *zip(*((row["prompt"], row["completion"]) for row in rows)))


def test_rows(small: bool) -> list[dict]:
    """The held-out questions, each with both of its right replies."""
    test = pairs("test", small)
    return [dict(prompt=row["question"], completion=row[kind]) for row in test for kind in STYLES]


def test_examples(policy: Policy, small: bool) -> list[Example]:
    return trained_on(policy, test_rows(small))


def with_shown(rows: list[dict], shown: list[dict], seed: int) -> list[dict]:
    """Each row with another question and its answer before its own question."""
    rng, out = random.Random(seed), []
    for row in rows:
        other = rng.choice(shown)
        out.append({**row, "prompt": f"{other['prompt']} {other['completion']} {row['prompt']}"})
    return out


def run(small: bool) -> Report:
    rows = pairs("sft", small)
    found = {}  # (data, mask) -> of each seed: loss of a test reply's token, right answers
    steps = 2 if small else 500
    part, shown = f"{FEW} examples", f"{FEW}, and one shown"
    kinds = {
        "all": (rows, test_rows(small)),
        part: (rows[:FEW], test_rows(small)),
        shown: (with_shown(rows[:FEW], rows, 0), with_shown(test_rows(small), rows, 1)),
    }
    for kind, (taught, test) in kinds.items():
        for prompts in (False, True):
            for seed in range(1 if small else 3):
                policy = load(str(world.BASE))
                data = trained_on(policy, taught)
                data = [on_prompts_too(example) for example in data] if prompts else data
                flags = [f"--max_steps={steps}", f"--seed={seed}"]
                cfg = parse(SFTConfig, flags, train_sft.BUILT_IN)
                for _ in train(cfg, policy, data, sft_method(policy)):
                    pass
                loss = token_loss(policy, trained_on(policy, test))
                right = world.measure(policy)["right answers, greedy"]
                key = kind, "prompts too" if prompts else "replies"
                found.setdefault(key, []).append((loss, right))

    def column(key, i):
        values = [seed[i] for seed in found[key]]
        return mean(values), stdev(values) if len(values) > 1 else 0.0

    table = [[*key, *column(key, 0), *column(key, 1)] for key in found]
    loss = {key: column(key, 0) for key in found}

    def beyond_noise(key, other):
        """The first key's loss is lower than the other's, by more than both spreads."""
        return loss[key][0] + loss[key][1] + loss[other][1] < loss[other][0]

    held = [
        (
            "with all data, prompts too are no better than replies alone",
            not beyond_noise(("all", "prompts too"), ("all", "replies")),
        ),
        (
            f"with {part} they are better, by more than both spreads",
            beyond_noise((part, "prompts too"), (part, "replies")),
        ),
        (
            "and where a solved question is shown in the prompt",
            beyond_noise((shown, "prompts too"), (shown, "replies")),
        ),
    ]

    def draw(figure):
        axis = figure.subplots()
        for i, key in enumerate(found):
            axis.plot([i] * len(found[key]), [value for value, _ in found[key]], "o", alpha=0.7)
        labels = ["\n".join(key).replace(", and", ",\nand") for key in found]
        axis.set_xticks(range(len(found)), labels)
        axis.set(ylabel="nats a token of the test replies, each seed")

    columns = ["data", "trained on", "nats a reply's token", "sd", "right, greedy", "sd "]
    notes = [
        f"With {FEW} examples the prompts are no help by themselves. They are letters drawn by "
        "chance: to predict them takes a share of every step and teaches nothing that a reply "
        "needs. Where each prompt also holds a solved question, they do help, as in the paper, "
        "whose prompts are language as its replies are."
    ]
    return Report(columns, table, held, draw, notes)
