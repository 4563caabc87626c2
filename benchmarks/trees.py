"""What a tree saves in conversations with thoughts, and with ranked replies.

    python benchmarks/trees.py --model MODEL

A conversation with T replies and thoughts is T texts, and each repeats the earlier replies. As a
tree it is a trunk and T branches. K ranked replies are K (K - 1) / 2 pairs. As a tree they are one
prompt and K branches. Both ways give the same loss and the same gradient. This measures how many
tokens are computed, and the CPU seconds of forward and backward, taking turns.
"""

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from nanoalign.packing import Example, in_rows, pairs_of  # noqa: E402
from nanoalign.run.flags import DPOConfig  # noqa: E402
from nanoalign.run.policy import load_policy  # noqa: E402

ROW = 2048  # tokens


def thoughts(turns: int, ids) -> Example:
    """Questions of 40 tokens, thoughts of 120 and answers of 60: a text for each reply."""
    texts, before = [], ids(40)
    prompt = before
    for _ in range(turns):
        thought, answer = ids(120), ids(60)
        text = [*before, *thought, *answer]
        mask = [False] * len(before) + [True] * 180
        texts.append((text[len(prompt) :], mask[len(prompt) :]))
        before = [*before, *answer, *ids(40)]
    return Example(prompt, texts, completions=[0] * turns)


def ranked(replies: int, ids) -> Example:
    """A prompt of 200 tokens and replies of 150."""
    pairs = [(i, j) for i in range(replies) for j in range(i + 1, replies)]
    return Example(ids(200), [(ids(150), [True] * 150) for _ in range(replies)], pairs=pairs)


def alone(example: Example) -> list[Example]:
    """Each text by itself."""
    return [Example(example.prompt, [text]) for text in example.texts]


def exploded(example: Example) -> list[Example]:
    """Each pair by itself, as a pair of today: the prompt is shared already."""
    return [replace(example, texts=[example.texts[i] for i in pair], pairs=[(0, 1)])
            for pair in example.pairs]  # fmt: skip


def step(policy, examples: list[Example], pairwise: bool) -> tuple[float, float]:
    """The loss and the gradient's norm of all examples, in rows."""
    policy.lm.zero_grad()
    total = 0.0
    for batch in in_rows(examples, ROW):
        logps = policy(batch).logps
        if pairwise:
            better, worse = pairs_of(batch)
            loss = -torch.nn.functional.logsigmoid(0.1 * (logps[better] - logps[worse])).sum()
        else:
            loss = -logps.sum()
        loss.backward()
        total += loss.item()
    grads = [p.grad.norm() for p in policy.lm.parameters() if p.grad is not None]
    return total, torch.stack(grads).norm().item()


def compare(policy, tree: list[Example], apart: list[Example], pairwise: bool, times: int) -> str:
    """tokens and CPU seconds of both ways, and their ratios; the fastest of some, in turn."""
    seconds, found = {}, []
    for _ in range(times):
        for name, examples in (("apart", apart), ("tree", tree)):
            start = time.process_time()
            found.append(step(policy, examples, pairwise))
            took = time.process_time() - start
            seconds[name] = min(took, seconds.get(name, took))
    (a, norm_a), (b, norm_b) = found[:2]
    assert abs(a - b) < 2e-2 * abs(a) and abs(norm_a - norm_b) < 5e-2 * norm_a, found[:2]
    tokens = [sum(example.tokens for example in way) for way in (apart, tree)]
    fewer, faster = tokens[0] / tokens[1], seconds["apart"] / seconds["tree"]
    return (
        f"{tokens[0]:>6} {tokens[1]:>6} tokens {fewer:5.2f}x"
        f"{seconds['apart']:8.2f} {seconds['tree']:6.2f} s {faster:5.2f}x"
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    cfg = DPOConfig(model_name_or_path=args.model, device="cpu", dtype=args.dtype)
    policy, rng = load_policy(cfg), random.Random(0)
    policy.lm.train()
    for name, p in policy.model.named_parameters():
        if "lora_B" in name:  # as in the midst of training: so all gradients are there
            torch.nn.init.normal_(p, std=0.02)

    def ids(n):
        return [rng.randrange(300) for _ in range(n)]

    print("apart and as a tree: tokens, CPU seconds of forward and backward")
    for n in args.sizes:
        example = thoughts(n, ids)
        print(
            f"{n} replies that think", compare(policy, [example], alone(example), False, args.times)
        )
    for n in args.sizes:
        example = ranked(n, ids)
        print(
            f"{n} ranked replies    ",
            compare(policy, [example], exploded(example), True, args.times),
        )


if __name__ == "__main__":
    main()
