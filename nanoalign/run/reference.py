"""The reference policy of DPO and KTO, as a function: batches -> log-probs.

It is the policy as it was at the start, in the same weights, so it costs no memory; or another
model; or, when all weights train and no copy of "then" is left, a table made before step 1.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanoalign import InputError, one_line
from nanoalign.fast.transfer import to_device
from nanoalign.logps import PackedLM
from nanoalign.losses import compares
from nanoalign.model import Policy, vocabulary
from nanoalign.packing import Example, in_rows, packed
from nanoalign.run import ranks
from nanoalign.run.advice import length_advice
from nanoalign.run.flags import ReferenceConfig
from nanoalign.run.policy import Reader, base_of, load_base, load_policy, shard_or_compile
from nanoalign.train import Batches

LogpsOf = Callable[[Batches], list[Tensor]]  # (C,) log-probs of the completions of each batch


def reference_of(
    cfg: ReferenceConfig, policy: Policy, loss: Callable, all_requests: Callable[[], list[Example]]
) -> LogpsOf:
    """The reference: another model (--ref_model_name_or_path), or the policy as it is now.

    It computes each batch as one row, as the policy does. In bfloat16 that is what makes the two
    start equal: a product's last bits depend on how many rows it has, so the same completion in two
    different packings scores up to 3 nats apart.

    With full fine-tuning there is no copy of "now", so the log-probs of `all_requests()`, all that
    the run will ask for, are computed here; with --precompute_ref_log_probs too. (A table knows no
    batches, so there the start is equal only in float32.) For a `loss` that compares with none
    nothing is loaded or computed, and the log-probs are 0.
    """
    lm, at_start, name = policy.lm, policy.reference or nullcontext, cfg.ref_model_name_or_path
    if not compares(loss):
        return lambda batches: [
            torch.zeros(sum(e.count for e in batch), device=lm.device) for batch in batches
        ]
    if name:
        lm, at_start = load_reference(cfg, name, policy), nullcontext
    if at_start is nullcontext:
        lm.eval()  # where it is the policy, it is asked before training begins, and only then

    def reference(batches):
        with at_start():
            return logps_of(lm, batches)

    all_train = policy.reference is None and not name
    if cfg.precompute_ref_log_probs or all_train:
        return table(reference, all_requests(), cfg, policy.lm)
    return reference


def long_rows(examples: list[Example], cfg: ReferenceConfig, lm: PackedLM) -> Batches:
    """Any number of examples in rows for a pass without gradient: twice as long as those of
    backward, which keeps all that a layer computes. That makes larger products, and each weight is
    read (from 4 bits: decoded) for more tokens."""
    return ranks.level(in_rows(examples, 2 * (cfg.max_row_tokens or lm.row_tokens)))


@torch.no_grad()
def logps_of(lm: PackedLM, batches: Batches) -> list[Tensor]:
    """The log-probs that a model gives now, without gradient."""
    return [lm(batch).logps for batch in batches]


def load_reference(cfg: ReferenceConfig, name: str, policy: Policy) -> PackedLM:
    """Another model, or an adapter on its base, as --ref_model_name_or_path names it."""
    adapter = Path(name, "adapter_config.json").exists()
    more = {"model_name_or_path": None, "adapter_name_or_path": name, "use_peft": True}
    cfg = replace(cfg, **more if adapter else {})
    base = base_of(cfg) if adapter else None
    for line in length_advice(cfg, base.name if adapter else name):
        print(one_line(f"advice: {line}"))
    if adapter:
        with redirect_stdout(StringIO()):  # it says what trains, and here nothing does
            lm = load_policy(cfg, base, Reader(policy.tokenizer, policy.template, [])).lm
        print(one_line(f"the reference is {base.name} with the adapter {name}"))
    else:
        lm = load_base(cfg, name)
        lm.model.set_attn_implementation(packed())
        shard_or_compile(cfg, lm)
    if len(lm.head().weight) < vocabulary(policy.tokenizer):
        raise InputError(f"{name}: has fewer tokens than the policy")
    return lm


def keys_of(examples: list[Example]) -> list[str]:
    """A digest of each completion, with its prompt and mask: what a log-prob is a function of. With
    the ids themselves a table would be larger than the data."""
    keys = []
    for e in examples:
        digests = [hashlib.sha256() for _ in range(e.count)]
        for _, ids, (_, mask), completion in e.paths():
            trained = [j for j, trains in enumerate(mask, len(e.prompt)) if trains]
            digests[completion].update(json.dumps([[*ids], trained]).encode())
        keys += [digest.hexdigest() for digest in digests]
    return keys


def table(
    reference: LogpsOf, examples: list[Example], cfg: ReferenceConfig, lm: PackedLM
) -> LogpsOf:
    """The same function, from a table: it knows prompts and completions by what they are."""
    once = {tuple(keys_of([example])): example for example in examples}
    rows = long_rows([*once.values()], cfg, lm)
    mine, known = ranks.level(ranks.share(rows, lambda row: sum(e.tokens for e in row))), {}
    for row in tqdm(mine, "reference log-probs", disable=None, leave=False):
        known |= zip(keys_of(row), reference([row])[0].tolist())
    known = {key: logp for part in ranks.gather(known) for key, logp in part.items()}
    print(f"{len(known)} reference log-probs computed before the first step")
    return lambda batches: [
        to_device([known[k] for k in keys_of(batch)], lm.device) for batch in batches
    ]
