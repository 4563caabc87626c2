"""A real model and real pairs: what SFT, DPO and KTO learn of people's preferences in an hour.

DPO (arXiv 2305.18290, section 6) and KTO (arXiv 2402.01306, section 4) report what a judge prefers,
of models of 1 B to 30 B parameters. On two cores there is neither such a model nor a judge. What
can be measured with a small model and a thousand pairs is whether a method generalizes at all: the
share of held-out pairs whose chosen reply gained more log-probability in training than the rejected
one, where a coin has 1/2. Such a share p of n pairs has the standard error sqrt(p (1 - p) / n), and
two methods that saw the same pairs are compared pair by pair.

    python -m experiments real_pairs --model_name_or_path M --dataset_name pairs.jsonl

The pairs are transcripts as in hh-rlhf (arXiv 2204.05862): people's choice between two replies to
somebody who asks for something harmful. Its people agreed with its authors in 63 % of the cases, so
no method can be right in many more. SFT learns the chosen replies; DPO and KTO go on from it, KTO
with each pair as a thumb up and a thumb down. All with LoRA, one epoch, and rates that were not
tuned, so that nothing follows from a small difference between the two.

Expected: both are above chance, by more than two standard errors; and DPO is above SFT, which has
never seen a rejected reply. Length is a cheap feature here as well, so the share is also shown of
the pairs with the shorter and with the longer chosen reply.
"""

import json
import os
import re
import tempfile
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from experiments.lab import Report, in_batches, load, pairs, train
from nanoalign import InputError, world
from nanoalign.data import Case, make_examples
from nanoalign.formats.layouts import last_reply
from nanoalign.model import Policy
from nanoalign.packing import Example

NAMES = "chosen", "rejected"
LONGEST = 192  # tokens of a prompt with its longer reply; longer pairs are left out
HELD_OUT = 500  # pairs
ERRORS = 2  # standard errors make a difference
FLAGS = dict(learning_rate=2e-4, lr_scheduler_type="cosine", warmup_ratio=0.1, weight_decay=0.0)
FLAGS |= dict(num_train_epochs=1, max_steps=-1, per_device_train_batch_size=16, device="auto")
FLAGS["chat_template"] = "chatml"


def turns(text: str) -> list[dict]:
    """A transcript, "\\n\\nHuman: Hi.\\n\\nAssistant: Hello.", as messages."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    said = zip(parts[::2], parts[1::2])
    return [{"role": roles[who], "content": words.strip()} for who, words in said]


def read(rows: list[dict]) -> list[dict]:
    """Transcripts -> {"prompt", "chosen", "rejected"}, of the pairs whose speakers take turns and
    that differ in the last reply alone."""
    found = []
    for row in rows:
        pair = last_reply({name: turns(row[name]) for name in NAMES}, *NAMES)
        replies = [reply for reply, *more in pair.completions if reply["content"] and not more]
        roles = [message["role"] for message in pair.prompt]
        in_turn = roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        if in_turn and len(replies) == 2 and replies[0] != replies[1]:
            found.append({"prompt": pair.prompt} | {n: [r] for n, r in zip(NAMES, replies)})
    return found


def as_examples(policy: Policy, rows: list[dict]) -> list[Example]:
    cases = [Case(row["prompt"], [row[name] for name in NAMES]) for row in rows]
    return make_examples(cases, policy.tokenizer, policy.template)[0]


@torch.no_grad()
def logps(policy: Policy, test: list[Example]) -> Tensor:
    """log pi of the chosen and of the rejected replies, (n, 2) in nats."""
    policy.lm.eval()
    return torch.cat([policy(batch).logps.cpu() for batch in in_batches(test)]).view(-1, 2)


def share(right: Tensor) -> tuple[float, float]:
    """The mean of n values, (n,), and its standard error."""
    return right.float().mean().item(), right.float().std().item() / sqrt(len(right))


def given(small: bool) -> tuple[str, list[dict]]:
    """The model's directory, and the transcripts."""
    if small:
        asked = [(f"\n\nHuman: {row['prompt']}\n\nAssistant: ", row) for row in pairs("dpo", small)]
        return str(world.BASE), [{name: q + row[name] for name in NAMES} for q, row in asked]
    model, data = os.environ.get("NANOALIGN_MODEL"), os.environ.get("NANOALIGN_PAIRS")
    if not (model and data):
        raise InputError("real_pairs needs --model_name_or_path and --dataset_name")
    lines = Path(data).read_text(encoding="utf-8").splitlines()
    return model, [json.loads(line) for line in lines]


def run(small: bool) -> Report:
    model, rows = given(small)
    policy = load(model)
    rows = read(rows)
    fitting = [
        (row, example)
        for row, example in zip(rows, as_examples(policy, rows))
        if len(example.prompt) + max(len(ids) for ids, _ in example.texts) <= LONGEST
    ]
    rows, examples = zip(*fitting)
    held_out = 8 if small else HELD_OUT
    rows, test = rows[:-held_out], examples[-held_out:]
    shorter = torch.tensor([len(e.texts[0][0]) < len(e.texts[1][0]) for e in test])

    found = {"none": logps(policy, test)}
    with tempfile.TemporaryDirectory() as sft:
        how = FLAGS | {"model_name_or_path": model, "use_peft": True}
        replies = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        policy = train("sft", replies, small, lora_r=16, lora_alpha=32, output_dir=sft, **how)[0]
        found["SFT"] = logps(policy, test)
        how |= {"adapter_name_or_path": sft, "beta": 0.1}
        found["DPO"] = logps(train("dpo", rows, small, **how)[0], test)
        how["per_device_train_batch_size"] *= 2  # to KTO a pair is two examples
        found["KTO"] = logps(train("kto", rows, small, **how)[0], test)

    right, table = {}, []
    for name, start in (("SFT", "none"), ("DPO", "SFT"), ("KTO", "SFT")):
        gain = found[name] - found[start]
        right[name] = (gain[:, 0] > gain[:, 1]).float()
        parts = [right[name][where].mean().item() for where in (shorter, ~shorter)]
        likelier = (found[name][:, 0] > found[name][:, 1]).float().mean().item()
        table.append([name, *share(right[name]), *parts, likelier, *gain.mean(0).tolist()])

    def above(difference: Tensor) -> bool:
        mean, error = share(difference)
        return mean > ERRORS * error

    held = [(f"{name} is above chance", above(right[name] - 0.5)) for name in ("DPO", "KTO")]
    held.append(("DPO is above SFT", above(right["DPO"] - right["SFT"])))
    mean, error = share(right["KTO"] - right["DPO"])
    likelier = (found["none"][:, 0] > found["none"][:, 1]).float().mean().item()
    notes = [
        f"{len(rows)} pairs to train on, {len(test)} held out, of which the chosen reply is the "
        f"shorter one in {shorter.float().mean():.3f}; before training it is the likelier one in "
        f"{likelier:.3f}",
        f"KTO minus DPO, on the same pairs: {mean:+.3f}, standard error {error:.3f}",
        "to prefer the shorter reply needs no training; beyond that rule are "
        + " and ".join(
            f"{name} {mean:+.3f} (standard error {error:.3f})"
            for name in ("DPO", "KTO")
            for mean, error in [share(right[name] - shorter.float())]
        ),
        "one run of each, with one seed: the errors are those of the choice of held-out pairs, and "
        "not of the training",
    ]

    def draw(figure):
        axis = figure.subplots()
        means, errors = zip(*(share(values) for values in right.values()))
        axis.bar(list(right), means, yerr=[ERRORS * e for e in errors], capsize=6)
        axis.axhline(0.5, color="black", lw=1)
        axis.set(ylabel="chosen gained more, share of held-out pairs", ylim=(0.3, 0.8))

    columns = ["trained with", "chosen gained more", "standard error", "where it is shorter"]
    columns += ["where it is not", "chosen likelier", "gain of chosen, nats", "of rejected"]
    return Report(columns, table, held, draw, notes)
