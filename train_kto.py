"""Kahneman-Tversky optimization: learn from single replies, thumbs up or thumbs down.

    python train_kto.py                                   # goes on from train_sft.py's result
    python train_kto.py --model_name_or_path M --dataset_name thumbs.jsonl

A reply's log-ratio to the reference is judged against z0: how far the policy has moved from the
reference on average, estimated with completions y' that belong to other prompts.
"""

import sys

import torch

from nanoalign import InputError
from nanoalign.config import KTOConfig
from nanoalign.data import epoch_order, with_mismatches
from nanoalign.layouts import KTO
from nanoalign.losses import NEEDS_Z0, kl_baseline, kto_loss
from nanoalign.metrics import reward_sums
from nanoalign.reference import load_reference, without_gradient
from nanoalign.run import Run, finish, main, start
from nanoalign.train import epochs, train


def run_kto(cfg: KTOConfig) -> Run:
    run = start(cfg, KTO)
    up = sum(e.label for e in run.examples)
    print(f"{up} desirable, {len(run.examples) - up} undesirable")
    if up in (0, len(run.examples)):
        print("warning: one label only; KTO weighs thumbs up against thumbs down", file=sys.stderr)
    with_z0 = cfg.loss_type in NEEDS_Z0
    pair = with_mismatches if with_z0 else list
    pair(run.examples)  # refused here, before anything is written, if it can't be done
    try:
        run.held_out = pair(run.held_out)
    except InputError as error:
        raise InputError(f"the examples to evaluate on: {error}") from None

    def order(epoch):
        return pair(epoch_order(run.examples, epoch, cfg.seed, cfg.shuffle_dataset))

    def weight(example):  # the loss is a mean over examples
        return 1

    def own(batch):
        return [e.sequence for e in batch]

    def mismatched(batch):
        return [(e.prompt, e.mismatch.completions) for e in batch]

    def both(batch):
        return [(e.prompt, e.completions + e.mismatch.completions) for e in batch]

    def everything():  # that the run asks the reference for: each y once, each epoch's y'
        if not with_z0:
            return own(run.examples + run.held_out)
        later = [order(epoch) for epoch in range(1, epochs(cfg, len(run.examples)))]
        return both(order(0) + run.held_out) + mismatched(sum(later, []))

    reference = load_reference(cfg, run.policy, everything)
    policy_now = without_gradient(run.policy.lm, cfg)

    def prepare(groups):
        """z0 of the whole step, and each batch's reference log-probs."""
        examples = sum(groups, [])
        if with_z0:
            ref_logps, ref_kl = reference(both(examples)).view(-1, 2).T
            z0 = kl_baseline(policy_now(mismatched(examples)), ref_kl)
        else:
            ref_logps, z0 = reference(own(examples)), torch.zeros(())
        return [(z0, logps) for logps in ref_logps.split([len(batch) for batch in groups])]

    def loss(batch, known):
        z0, ref_logps = known
        scores = run.policy.lm(own(batch))
        desirable = torch.tensor([e.label for e in batch], device=ref_logps.device)
        losses, rewards = kto_loss(
            scores.logps,
            ref_logps,
            desirable,
            z0,
            cfg.beta,
            cfg.loss_type,
            cfg.desirable_weight,
            cfg.undesirable_weight,
        )
        metrics = {"kl": (z0 * len(batch), len(batch))}
        for side, label in (("chosen", True), ("rejected", False)):
            index = [i for i, e in enumerate(batch) if e.label is label]
            metrics |= reward_sums(side, rewards[index], scores.take(index))
        return losses.sum(), metrics

    train(cfg, run, order, weight, prepare, loss)
    return finish(cfg, run)


if __name__ == "__main__":
    main("kto", KTOConfig, run_kto)
