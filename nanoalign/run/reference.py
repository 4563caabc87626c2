"""The reference policy of DPO and KTO, as a function: examples -> log-probs.

It is the policy as it was at the start, in the same weights, so it costs no memory; or another
model; or, when all weights train and no copy of "then" is left, a table made before step 1.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from tqdm import tqdm

from nanoalign import InputError
from nanoalign.logps import PackedLM
from nanoalign.losses import compares
from nanoalign.model import Policy
from nanoalign.packing import Example, in_rows, packed, row_tokens
from nanoalign.run.advice import length_advice
from nanoalign.run.flags import ReferenceConfig
from nanoalign.run.policy import load_base

LogpsOf = Callable[[list[Example]], Tensor]  # examples -> (C,) log-probs of their completions


def reference_of(
    cfg: ReferenceConfig, policy: Policy, loss: Callable, all_requests: Callable[[], list[Example]]
) -> Callable[[list[list[Example]]], Sequence[Tensor]]:
    """The reference: another model (--ref_model_name_or_path), or the policy as it is now.

    A function: batches -> log-probs of each batch's completions. It is asked for all batches of a
    step at once, in rows of its own. With full fine-tuning there is no copy of "now", so the
    log-probs of `all_requests()`, all that the run will ask for, are computed here; with
    --precompute_ref_log_probs too. For a `loss` that compares with none
    nothing is loaded or computed, and the log-probs are 0.
    """

    def logps(examples: list[Example]) -> Tensor:
        return torch.zeros(sum(len(e.completions) for e in examples), device=policy.lm.device)

    if compares(loss):
        logps = _logps_of(cfg, policy)
        all_train = policy.reference is None and not cfg.ref_model_name_or_path
        if cfg.precompute_ref_log_probs or all_train:
            logps = _precomputed(logps, all_requests())

    def reference(batches):
        counts = [sum(len(e.completions) for e in batch) for batch in batches]
        return logps(sum(batches, [])).split(counts)

    return reference


def without_gradient(lm: PackedLM, cfg: ReferenceConfig) -> LogpsOf:
    """The log-probs of any number of examples, in rows twice as long as those of backward, which
    keeps all that a layer computes: larger products, and each weight is read (from 4 bits: decoded)
    for more tokens."""
    tokens = 2 * row_tokens(cfg.max_row_tokens, lm.device)

    @torch.no_grad()
    def logps(examples: list[Example]) -> Tensor:
        return torch.cat([lm(row).logps for row in in_rows(examples, tokens)])

    return logps


def _logps_of(cfg: ReferenceConfig, policy: Policy) -> LogpsOf:
    """The log-probs of another model, or of the policy as it was at the start."""
    lm, at_start = policy.lm, policy.reference or nullcontext
    if name := cfg.ref_model_name_or_path:
        for line in length_advice(cfg, name):
            print(f"advice: {line}")
        lm, at_start = load_base(cfg, name), nullcontext
        lm.model.set_attn_implementation(packed())
        if len(lm.head().weight) < len(policy.tokenizer):
            raise InputError(f"{name}: has fewer tokens than the policy")
    if at_start is nullcontext:
        lm.eval()  # where it is the policy, it is asked before training begins, and only then
    logps = without_gradient(lm, cfg)

    def reference(examples: list[Example]) -> Tensor:
        with at_start():
            return logps(examples)

    return reference


def _precomputed(logps_of: LogpsOf, examples: list[Example]) -> LogpsOf:
    """The same function, from a table: it knows prompts and completions by what they are."""

    def keys(examples):
        prompts = [(tuple(e.prompt), e) for e in examples]
        return [(p, tuple(ids), tuple(mask)) for p, e in prompts for ids, mask in e.completions]

    once = list({tuple(keys([example])): example for example in examples}.values())
    bar = tqdm(range(0, len(once), 64), "reference log-probs", disable=None, leave=False)
    logps = torch.cat([logps_of(once[i : i + 64]) for i in bar])
    known = dict(zip(keys(once), logps.tolist()))
    print(f"{len(known)} reference log-probs computed before the first step")
    return lambda examples: torch.tensor([known[k] for k in keys(examples)], device=logps.device)
