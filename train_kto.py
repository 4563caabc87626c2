"""Kahneman-Tversky optimization (KTO): learn from single replies with a thumb up or down.

    python train_kto.py                                   # goes on with the result of train_sft.py
    python train_kto.py --model_name_or_path M --dataset_name thumbs.jsonl

The reward of a reply is compared with z0, the mean distance of the policy from the reference. It is
estimated with replies y' to other prompts.
"""

import sys
from itertools import chain

import torch

from nanoalign import InputError, world
from nanoalign.data import epoch_order, with_mismatches
from nanoalign.formats.layouts import KTO
from nanoalign.losses import flags_of, kl_baseline, kto_loss, needs
from nanoalign.packing import to_device
from nanoalign.run.advice import ONE_LABEL
from nanoalign.run.command import main
from nanoalign.run.flags import KTOConfig
from nanoalign.run.log import reward_sums
from nanoalign.run.ranks import joined
from nanoalign.run.record import fit
from nanoalign.run.reference import logps_of, long_rows, reference_of, without_gradient
from nanoalign.run.report import finish
from nanoalign.run.session import Run, start
from nanoalign.train import plan


def run_kto(cfg: KTOConfig) -> Run:
    run, with_z0 = start(cfg, KTO), "z0" in needs(cfg.loss)
    up = sum(e.label for e in run.examples)
    print(f"{up} desirable, {len(run.examples) - up} undesirable")
    if up in (0, len(run.examples)):
        print(f"warning: {ONE_LABEL}", file=sys.stderr)

    def mismatched(examples):  # each example gets its y', if the loss wants z0
        return with_mismatches(examples, cfg.max_length) if with_z0 else examples

    def order(*given):
        return mismatched(epoch_order(*given))

    for whose, some in (("", run.examples), ("the examples to evaluate on: ", run.held_out)):
        try:
            mismatched(some)  # refused here, before anything is written, if it can't be done
        except InputError as error:
            needless = "--loss_type apo_zero_unpaired needs none"
            raise InputError(f"{whose}{error}; {needless}") from None
    run.held_out = mismatched(run.held_out)

    def all_requests():  # what the run will ask of the reference: each y once, each epoch's y'
        if not with_z0:
            return [*run.examples, *run.held_out]
        per_epoch, total = plan(cfg, len(run.examples))
        rounds = range(-(-total // per_epoch))  # begun, the last one perhaps not ended
        epochs = [order(run.examples, i, cfg.seed, cfg.shuffle_dataset) for i in rounds]
        return [*run.examples, *run.held_out, *(e.mismatch for e in chain(run.held_out, *epochs))]

    reference = reference_of(cfg, run.policy, cfg.loss, all_requests)
    flags = flags_of(cfg, kto_loss, cfg.loss)
    lm = run.policy.lm

    def kto(batches):
        """One step of KTO. z0 is computed from the step; the loss is a mean over examples."""
        z0 = torch.zeros(())
        with without_gradient(lm):
            if with_z0:
                rows = long_rows([e.mismatch for batch in batches for e in batch], cfg, lm)
                z0 = kl_baseline(joined(logps_of(lm, rows)), joined(reference(rows)))
            references = reference(batches)
        for batch, ref in zip(batches, references):
            scores = run.policy(batch)
            desirable = to_device([e.label for e in batch], ref.device).bool()
            losses, rewards = kto_loss(scores.logps, ref, desirable, z0, **flags)
            sums = {"loss": (losses.sum(), len(batch))}
            if with_z0:
                sums["kl"] = z0 * len(batch), len(batch)
            for side, label in (("chosen", True), ("rejected", False)):
                index = [i for i, e in enumerate(batch) if e.label is label]
                own_rewards = rewards[to_device(index, ref.device, torch.int64)]
                sums |= reward_sums(side, own_rewards, scores.take(index))
            yield sums

    fit(cfg, run, kto, order)
    return finish(cfg, run)


BUILT_IN = dict(  # the settings where no model is given: the built-in world (world.py)
    model_name_or_path="runs/sft", dataset_name=[str(world.HOME / "kto.jsonl")],
    output_dir="runs/kto", beta=0.5, learning_rate=1e-3, lora_alpha=32,
    per_device_train_batch_size=64, max_steps=40, logging_steps=5, device="cpu",
)  # fmt: skip

if __name__ == "__main__":
    main(KTOConfig, run_kto, BUILT_IN)
