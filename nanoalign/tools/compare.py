"""Is a model better than another? python -m nanoalign.compare A B [C ...] --dataset_name PAIRS

A, B, ... are models or adapters. The pairs should not be in their training data. For each model
this prints the share of pairs in which the chosen reply has the higher log pi, summed over its
tokens and per token. No reference is subtracted: the question is what the model prefers.

Longer replies have lower sums, so a model could be right by preferring short replies. Therefore the
table also has the shares of the rules "the longer wins" and "the shorter wins", and shares that are
controlled for length: the mean of two shares, of pairs whose chosen reply is longer and of pairs
whose chosen reply is shorter.

All models judge the same pairs, so two models are compared pair by pair: the mean difference, its
standard error, and McNemar's exact test on the pairs that only one of them gets right.

--generate N writes the replies of all models to the first N prompts into OUT/replies.jsonl. Then

    python -m nanoalign.compare vote OUT

shows you two replies at a time, without names. There is a vote for each two replies that differ.
The result is shown after the last vote only: if you could stop when it looks good, it would often
look good by chance.
"""

import gc
import json
import math
import random
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import torch

from nanoalign import InputError
from nanoalign.formats.layouts import DPO, read_cases
from nanoalign.model import Policy, generate
from nanoalign.packing import in_rows
from nanoalign.run.command import command
from nanoalign.run.files import saving, write_file, write_text
from nanoalign.run.flags import Parser, add_flags
from nanoalign.run.log import printable
from nanoalign.run.session import hold_out, read
from nanoalign.tools import thumbs
from nanoalign.tools.chat import FLAGS, open_policy
from nanoalign.tools.thumbs import verdict, wilson

DATA = "max_length", "max_prompt_length", "truncation_mode", "input_as_system", "dataset_test_split"
BATCH = 8  # replies generated at a time
MEASURES = "summed", "per token"


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of McNemar (1947). It assumes that the models are equally good: then
    for each pair that only one of them gets right, it is a coin toss which one."""
    n, throws, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):
        tail += throws  # math.comb(n, k), computed from the last one
        throws = throws * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def difference(a: list[bool], b: list[bool]) -> dict:
    """By how much b's share is larger than a's, on the same pairs."""
    steps = [y - x for x, y in zip(a, b)]
    only_a, only_b = steps.count(-1), steps.count(1)
    return {
        "difference": mean(steps),
        "standard error": stdev(steps) / math.sqrt(len(steps)) if len(steps) > 1 else None,
        "only the first": only_a,
        "only the second": only_b,
        "p": mcnemar(only_a, only_b),
    }


def share(right: list[bool], longer: list[int]) -> dict:
    """The share of pairs that are right, also controlled for length. `longer` is 1 if the chosen
    reply is the longer one, -1 if it is the shorter one, and 0 if both are equally long."""
    sides = [[r for r, side in zip(right, longer) if side == s] for s in (1, -1)]
    low, high = wilson(sum(right), len(right))
    return {
        "share": mean(right),
        "from": low,
        "to": high,
        "where chosen is longer": mean(sides[0]) if sides[0] else None,
        "where chosen is shorter": mean(sides[1]) if sides[1] else None,
        "controlled for length": mean(map(mean, sides)) if all(sides) else None,
    }


@torch.no_grad()
def score(policy: Policy, examples) -> dict[tuple[str, int], tuple]:
    """{(line of the data, which pair of this line): ((log pi, tokens) of the chosen reply, the same
    of the rejected one)}"""
    scored, seen = {}, Counter()
    policy.lm.eval()
    for batch in in_rows(examples, 2 * policy.lm.row_tokens):
        scores = policy(batch)
        replies = iter(zip(scores.logps.tolist(), scores.tokens))
        for example in batch:
            values = [next(replies) for _ in range(example.count)]
            for better, worse in example.pairs:
                scored[example.where, seen[example.where]] = values[better], values[worse]
                seen[example.where] += 1
    return scored


def reply(policy: Policy, prompts: list[list[dict]], max_new_tokens: int, temperature: float):
    """A reply to each prompt."""
    parts = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    return [text for part in parts for text in generate(policy, part, **options)]


def judge(scored: list[dict]) -> dict:
    """All results, on the pairs that fit the limits for every model."""
    pairs = [p for p in scored[0] if all(p in other for other in scored)]
    if not pairs:
        raise InputError("no pair is left that all models can read")
    lengths = [[n for _, n in scored[0][pair]] for pair in pairs]  # in the first one's tokens
    longer = [(a > b) - (a < b) for a, b in lengths]
    rules = {"the longer wins": longer.count(1), "the shorter wins": longer.count(-1)}
    found = {"pairs": len(pairs), "models": [{} for _ in scored], "differences": []}
    found |= {name: {"share": wins / len(pairs)} for name, wins in rules.items()}
    for measure in MEASURES:

        def value(logp, tokens):
            return logp / tokens if measure == "per token" else logp

        right = [[value(*one[p][0]) > value(*one[p][1]) for p in pairs] for one in scored]
        for model, correct in zip(found["models"], right):
            model[measure] = share(correct, longer)
        for i, k in combinations(range(len(scored)), 2):
            found["differences"] += [dict(first=i, second=k, measure=measure,
                                          **difference(right[i], right[k]))]  # fmt: skip
    return found


def table(found: dict) -> str:
    """The results as a table for a terminal."""

    def percent(x):
        return "-" if x is None else f"{x:.1%}"

    names = [model["name"] for model in found["models"]]
    width = max(map(len, [*names, "the shorter wins"]))
    lines = [f"{found['pairs']} pairs: share whose chosen reply is the likelier one"]
    head = f"{'summed':^19}  controlled  {'per token':^19}  controlled"
    lines += [" " * width + "  " + head]
    for model in found["models"]:
        line = f"{model['name']:<{width}}"
        for result in map(model.get, MEASURES):
            interval = f"({result['from']:.0%} to {result['to']:.0%})"
            line += f"  {percent(result['share']):>6} {interval:<12}"
            line += f"  {percent(result['controlled for length']):>10}"
        lines.append(line)
    for rule in ("the longer wins", "the shorter wins"):
        lines.append(f"{rule:<{width}}  {percent(found[rule]['share']):>6}")
    return "\n".join(lines + differences(found))


def differences(found: dict) -> list[str]:
    """A line for each two models and each measure."""
    lines, names = [], [model["name"] for model in found["models"]]
    for d in found["differences"]:
        error = "" if d["standard error"] is None else f" ± {100 * d['standard error']:.1f}"
        lines.append(
            f"{names[d['second']]} - {names[d['first']]}, {d['measure']}: "
            f"{100 * d['difference']:+.1f}{error} points; right alone {d['only the second']} and "
            f"{d['only the first']} times, p = {d['p']:.2g}"
        )
    return lines


def draw(found: dict, out: Path) -> None:
    """The results as a picture, in PNG."""
    from matplotlib.figure import Figure

    height = 2.2 + 0.5 * len(found["models"]) + 0.15 * len(found["differences"])
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names, y = [m["name"] for m in found["models"]], range(len(found["models"]))
    for axis, measure in zip(axes, MEASURES):
        results = [model[measure] for model in found["models"]]
        shares = [100 * m["share"] for m in results]
        ends = [[100 * abs(m["share"] - m[end]) for m in results] for end in ("from", "to")]
        axis.barh(y, shares, xerr=ends, color="#4c78a8", height=0.5, ecolor="#333", capsize=3)
        controlled = [(100 * m["controlled for length"], i) for i, m in enumerate(results)
                      if m["controlled for length"] is not None]  # fmt: skip
        axis.plot(*zip(*controlled) if controlled else ([], []), "D", color="#f58518",
                  label="controlled for length")  # fmt: skip
        axis.axvline(50, color="#999", lw=1)
        for rule, style in (("the longer wins", "--"), ("the shorter wins", ":")):
            axis.axvline(100 * found[rule]["share"], color="#54a24b", ls=style, label=rule)
        axis.set_xlim(0, 100)
        axis.set_title(f"chosen is the likelier reply, {measure}", fontsize=10)
        axis.set_xlabel(f"% of {found['pairs']} pairs (bars: 95 %)", fontsize=9)
    axes[0].set_yticks(y, names, fontsize=9)
    axes[0].invert_yaxis()
    figure.supxlabel("\n".join(differences(found)), fontsize=8, ha="left", x=0.02)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  fontsize=8, frameon=False)  # fmt: skip
    write_file(out, lambda beside: figure.savefig(beside, dpi=120, format="png"))


def unseen(directory: str, sources: list[str]) -> None:
    """Print a warning if a model was trained on the file that it is compared on."""
    try:
        flags = json.loads(Path(directory, "run.json").read_text(encoding="utf-8"))["flags"]
        seen = {Path(name).resolve() for name in flags["dataset_name"]}
    except (OSError, ValueError, KeyError, TypeError):
        return  # made by another tool
    if not flags.get("eval_fraction") and seen & {Path(name).resolve() for name in sources}:
        print(f"{directory} was trained on this file: its share says little")


def compare(args) -> None:
    """Measure one model after another, so that only one is in memory. Then compare the results."""
    out, scored, prompts, replies = Path(args.out), [], [], []
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
    for directory in args.models:
        args.directory = directory
        unseen(directory, args.dataset_name)
        policy = open_policy(args)
        examples, _ = read(args, DPO, policy, args.dataset_name, args.dataset_test_split)
        if args.eval_fraction:
            examples = hold_out(args, examples)[1]
        scored.append(score(policy, examples))
        if args.generate:
            prompts = prompts or first_prompts(args, {e.where for e in examples})
            torch.manual_seed(args.seed)
            replies.append(reply(policy, prompts, args.max_new_tokens, args.temperature))
        del policy, examples
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    found = judge(scored)
    for model, name in zip(found["models"], args.models):
        model["name"] = name
    print(table(found))
    write_text(out / "compare.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    try:
        draw(found, out / "compare.png")
    except ImportError:
        print("no compare.png: pip install 'nanoalign[plot]' for that")
    if args.generate:
        rows = [dict(prompt=p, models=args.models, replies=r) for p, *r in zip(prompts, *replies)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(out / "replies.jsonl", "".join(lines))
        (out / "votes.jsonl").unlink(missing_ok=True)  # votes on other replies
        print(f"{len(ballots(rows))} votes: python -m nanoalign.compare vote {out}")
    print(f"saved in {out}")


def first_prompts(args, lines: set[str]) -> list[list[dict]]:
    """The first prompts in these lines of the data, each once. Generation can't call tools."""
    options = dict(split=args.dataset_test_split, input_as_system=args.input_as_system)
    cases = read_cases(args.dataset_name, DPO, Counter(), [], **options)
    read = [case.prompt for case in cases if case.where in lines and not case.tools]
    once = {json.dumps(prompt): prompt for prompt in read}
    return list(once.values())[: args.generate]


def ballots(rows: list[dict]) -> list[tuple[dict, int, int]]:
    """The votes to ask for, in random order: (row, A, B), where A and B are the indices of two
    models whose replies in the row differ. Which of the two is A is random."""
    pairs = [
        (row, *pair)
        for row in rows
        for pair in combinations(range(len(row["models"])), 2)
        if row["replies"][pair[0]] != row["replies"][pair[1]]
    ]
    rng = random.Random(json.dumps(rows))
    rng.shuffle(pairs)
    return [(row, *rng.sample(pair, 2)) for row, *pair in pairs]


def outcome(asked: list[tuple[dict, int, int]], votes: list[dict]) -> list[str]:
    """The result of the votes for each two models. Votes for neither are not counted."""
    wins, names = Counter(), asked[0][0]["models"]
    for (_, a, b), vote in zip(asked, votes):
        wins[(min(a, b), max(a, b), {"a": a, "b": b}.get(vote["choice"]))] += 1
    lines = []
    for i, k in combinations(range(len(names)), 2):
        first, second, ties = (wins[i, k, who] for who in (i, k, None))
        said = f"{names[k]} beats {names[i]} in {verdict(second, first + second)}"
        lines.append(said + (f"; {ties} for neither" if ties else ""))
    return lines


def vote(out: Path) -> None:
    """Ask for the votes that are missing. After the last one print the result."""
    path = out / "votes.jsonl"
    try:
        asked = ballots(thumbs.read_rows(out / "replies.jsonl"))
        votes = thumbs.read_rows(path)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out}: not what --generate has written: {error!r}") from None
    if not asked:
        raise InputError(f"{out}/replies.jsonl: no two replies that differ")
    for number, (row, a, b) in list(enumerate(asked, 1))[len(votes) :]:
        shown = [f"{m['role']}: {m['content']}" for m in row["prompt"]]
        for name, model in (("A", a), ("B", b)):
            shown += ["", f"[{name}] {row['replies'][model]}"]
        print(f"\n--- {number} of {len(asked)}\n" + printable("\n".join(shown)))
        choice = ""
        while choice not in ("a", "b", "tie"):
            try:
                choice = input("a, b or tie (an empty line: later) > ").strip().lower()
            except EOFError:
                choice = ""
            if not choice:
                print(f"{len(votes)} of {len(asked)} votes; the count comes after the last")
                return
        votes.append({"choice": choice, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        thumbs.append(path, votes[-1])
    print("\n".join(outcome(asked, votes)))


@command("compare")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m nanoalign.compare", allow_abbrev=False)
    parser.add_argument("models", nargs="+", help="models or adapters; or: vote OUT")
    parser.add_argument("--dataset_name", nargs="+", help="pairs, as train_dpo.py reads them")
    parser.add_argument("--out", default="compare", help="directory for numbers and picture")
    parser.add_argument("--generate", type=int, default=0, help="how many prompts to reply to")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="of one reply")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    add_flags(parser, "eval_fraction", "seed", *DATA, *FLAGS)
    args = parser.parse_args(argv)
    if args.models[0] == "vote" and len(args.models) == 2:
        return vote(Path(args.models[1]))
    if len(args.models) < 2:
        raise InputError("expected two models or more")
    if not args.dataset_name:
        raise InputError("--dataset_name: give the pairs to compare on")
    for name in ("generate", "temperature"):
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must not be negative")
    compare(args)


if __name__ == "__main__":
    main()
