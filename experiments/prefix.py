"""A preference pair needs its prompt once: what that saves grows with the prompt.

"Accelerating Direct Preference Optimization with Prefix Sharing" (arXiv 2410.20305) puts a prompt
of p tokens and its two replies of r tokens in one row, in which each reply sees the prompt and
itself. Where a pair used to cost 2 (p + r) tokens it costs p + 2 r, so its time should be

    (p + 2 r) / (2 p + 2 r)

of that, from 1 without a prompt to 1/2 with a long one. Its table 1 has 1.1 to 1.5 times the speed.

Measured on the world's SFT model: the losses and gradients of pairs in both forms, which must be
the same numbers, and the seconds of a forward and backward pass, with replies of 32 tokens and
prompts of 8 to 192. Attention adds a little: the formula counts tokens, and two replies on one
prompt save more than half of the prompt's own attention, which is quadratic. The head adds a
little the other way: it works on the replies alone, and saves nothing.
"""

import random
from dataclasses import replace

from experiments.lab import Report, load, sft_model
from experiments.packing import in_a_row, time_share, with_gradient
from nanoalign.packing import Example

SAME = 1e-4  # |shared - unshared| / |unshared|, of the losses and of the gradient, in fp32
TIME = 0.1  # seconds measured, as a share, against the formula's share
PAIRS, REPLY = 16, 32


def formula(p: int, r: int) -> float:
    """Tokens with a shared prompt, as a share of those without."""
    return (p + 2 * r) / (2 * p + 2 * r)


def examples(pairs: int, prompt: int, reply: int, vocabulary: int) -> list[Example]:
    """Pairs of random ids."""
    rng = random.Random(prompt)

    def ids(n):
        return [rng.randrange(2, vocabulary) for _ in range(n)]

    def completion():
        return ids(reply), [True] * reply

    return [Example(ids(prompt), [completion(), completion()]) for _ in range(pairs)]


def unshared(batch: list[Example]) -> list[Example]:
    """The prompt once for each reply."""
    return [replace(e, texts=[c]) for e in batch for c in e.texts]


def run(small: bool) -> Report:
    policy, rounds, rows = load(sft_model(small)), 1 if small else 9, []
    for prompt in (8, 64) if small else (8, 16, 32, 64, 128, 192):
        shared = examples(PAIRS, prompt, REPLY, len(policy.tokenizer))
        apart = unshared(shared)
        one, two = (with_gradient(in_a_row, policy, batch) for batch in (shared, apart))
        off = [((a - b).norm() / b.norm()).item() for a, b in zip(one, two)]
        time = time_share(policy, (in_a_row, shared), (in_a_row, apart), rounds)
        rows.append([prompt, *off, formula(prompt, REPLY - 1), time, 1 / time])

    held = [
        (
            f"losses and gradients are those of two prompts, to {SAME:.2%}",
            all(row[i] < SAME for row in rows for i in (1, 2)),
        ),
        (
            f"the time is the formula's share, to {TIME:.0%}",
            all(abs(row[4] / row[3] - 1) < TIME for row in rows),
        ),
    ]

    def draw(figure):
        axis, prompts = figure.subplots(), list(range(200))
        axis.plot(prompts, [formula(p, REPLY - 1) for p in prompts], "k--", label="the formula")
        axis.plot([row[0] for row in rows], [row[4] for row in rows], "o", label="measured")
        axis.set(xlabel=f"tokens of the prompt; replies have {REPLY}", ylabel="time, shared / not")
        axis.set_ylim(0.45, 1.05)
        axis.legend()

    columns = ["tokens of the prompt", "losses off by", "gradient off by", "(p+2r)/(2p+2r)"]
    return Report([*columns, "time, share", "times as fast"], rows, held, draw)
