"""The reference policy of DPO and KTO: a function from batches to log-probs.

With LoRA it is the policy as it was at the start. It uses the same base weights, so it takes no
memory. --ref_model_name_or_path loads another model. If all weights train, the weights of the start
are lost after step 1, so a table of log-probs is computed before.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanoalign import InputError, one_line
from nanoalign.fast.nf4 import decoding_once
from nanoalign.fast.transfer import to_device
from nanoalign.logps import PackedLM
from nanoalign.losses import compares
from nanoalign.model import Policy, vocabulary
from nanoalign.packing import Example, in_rows, packed
from nanoalign.run import ranks
from nanoalign.run.advice import length_advice
from nanoalign.run.device import checkpointed
from nanoalign.run.flags import ReferenceConfig
from nanoalign.run.policy import Reader, base_of, load_base, load_policy, shard_or_compile
from nanoalign.train import Batches

LogpsOf = Callable[[Batches], list[Tensor]]  # for each batch the (C,) log-probs of completions


def reference_of(
    cfg: ReferenceConfig, policy: Policy, loss: Callable, all_requests: Callable[[], list[Example]]
) -> LogpsOf:
    """The reference: another model (--ref_model_name_or_path), or the policy as it is now.

    It computes each batch as one row, as the policy does. Otherwise the two would not start equal
    in bfloat16: the last bits of a product depend on the number of tokens in it. The log-probs of a
    completion in two different rows differ by up to 3 nats.

    If all weights train, or with --precompute_ref_log_probs, a table is computed here. It has the
    log-probs of `all_requests()`: all examples that the run will ask for. (The table is not
    computed in the run's batches, so policy and reference start equal only in float32.)

    A `loss` without a reference gets log-probs of 0; nothing is loaded or computed.
    """
    lm, at_start, name = policy.lm, policy.reference or nullcontext, cfg.ref_model_name_or_path
    if not compares(loss):
        return lambda batches: [
            torch.zeros(sum(e.count for e in batch), device=lm.device) for batch in batches
        ]
    if name:
        lm, at_start = load_reference(cfg, name, policy), nullcontext
    if at_start is nullcontext:
        lm.eval()  # another model, or the policy itself, which computes the table before it trains

    def reference(batches):
        with at_start():
            return logps_of(lm, batches)

    all_train = policy.reference is None and not name
    if cfg.precompute_ref_log_probs or all_train:
        return table(reference, all_requests(), cfg, policy.lm)
    return reference


def long_rows(examples: list[Example], cfg: ReferenceConfig, lm: PackedLM) -> Batches:
    """Cut examples into batches for a pass without gradient. Their rows are twice as long as in
    training, because nothing is kept for backward. Longer rows make larger products, and 4-bit
    weights are decoded less often."""
    return ranks.level(in_rows(examples, 2 * (cfg.max_row_tokens or lm.row_tokens)))


@contextmanager
def without_gradient(lm: PackedLM) -> Iterator[None]:
    """Passes of the same weights, one after the other: in 4 bits they are decoded once."""
    with torch.no_grad(), decoding_once(not checkpointed(lm.model)):
        yield


def logps_of(lm: PackedLM, batches: Batches) -> list[Tensor]:
    """The log-probs of each batch under a model, without gradient."""
    with without_gradient(lm):
        return [lm(batch).logps for batch in batches]


def load_reference(cfg: ReferenceConfig, name: str, policy: Policy) -> PackedLM:
    """Load the model or adapter of --ref_model_name_or_path."""
    adapter = Path(name, "adapter_config.json").exists()
    more = {"model_name_or_path": None, "adapter_name_or_path": name, "use_peft": True}
    cfg = replace(cfg, **more if adapter else {})
    base = base_of(cfg) if adapter else None
    for line in length_advice(cfg, base.name if adapter else name):
        print(one_line(f"advice: {line}"))
    if adapter:
        with redirect_stdout(StringIO()):  # it prints what trains, but nothing of this model does
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
    """A digest for each completion, of all that its log-prob depends on: prompt, ids and mask. (A
    table with the ids themselves would be larger than the data.)"""
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
    """Compute the reference log-probs of all examples. -> a function that looks them up."""
    distinct = {tuple(keys_of([example])): example for example in examples}
    rows = long_rows([*distinct.values()], cfg, lm)
    mine, logps = ranks.level(ranks.share(rows, lambda row: sum(e.tokens for e in row))), {}
    with without_gradient(lm):
        for row in tqdm(mine, "reference log-probs", disable=None, leave=False):
            logps |= zip(keys_of(row), reference([row])[0].tolist())
    logps = {key: logp for of_rank in ranks.gather(logps) for key, logp in of_rank.items()}
    print(f"{len(logps)} reference log-probs computed before the first step")
    return lambda batches: [
        to_device([logps[key] for key in keys_of(batch)], lm.device) for batch in batches
    ]
