"""Direct preference optimization (DPO): of two replies, prefer the chosen one.

    python train_dpo.py                                   # goes on with the result of train_sft.py
    python train_dpo.py --model_name_or_path M --dataset_name pairs.jsonl

The policy is compared with a reference. By default this is the policy before the first step.
"""

from nanoalign import world
from nanoalign.formats.layouts import DPO
from nanoalign.logps import Scores
from nanoalign.losses import dpo_loss, flags_of
from nanoalign.packing import pairs_of
from nanoalign.run.command import main
from nanoalign.run.flags import DPOConfig
from nanoalign.run.log import reward_sums
from nanoalign.run.record import fit
from nanoalign.run.reference import reference_of
from nanoalign.run.report import finish
from nanoalign.run.session import Run, start


def run_dpo(cfg: DPOConfig) -> Run:
    run = start(cfg, DPO)
    flags = flags_of(cfg, dpo_loss, cfg.loss)
    reference = reference_of(cfg, run.policy, cfg.loss, lambda: [*run.examples, *run.held_out])

    def dpo(batches):
        """One step of DPO. The loss is a mean over pairs; K ranked replies make several pairs."""
        for batch, ref_logps in zip(batches, reference(batches)):
            scores = run.policy(batch)
            start = Scores(ref_logps, scores.tokens)
            (chosen, rejected), (ref_chosen, ref_rejected) = (
                map(s.take, pairs_of(batch)) for s in (scores, start)
            )
            losses, *rewards = dpo_loss(
                chosen.logps,
                rejected.logps,
                ref_chosen.logps,
                ref_rejected.logps,
                chosen.lengths,
                rejected.lengths,
                **flags,
            )
            won = (rewards[0] > rewards[1]).float().sum()
            yield {
                "loss": (losses.sum(), len(losses)),
                **reward_sums("chosen", rewards[0], chosen),
                **reward_sums("rejected", rewards[1], rejected),
                "rewards/accuracies": (won, len(losses)),
            }

    fit(cfg, run, dpo)
    return finish(cfg, run)


BUILT_IN = dict(  # the settings where no model is given: the built-in world (world.py)
    model_name_or_path="runs/sft", dataset_name=[str(world.HOME / "dpo.jsonl")],
    output_dir="runs/dpo", beta=0.5, learning_rate=1e-3, lora_alpha=32,
    per_device_train_batch_size=32, max_steps=40, logging_steps=5, device="cpu",
)  # fmt: skip

if __name__ == "__main__":
    main(DPOConfig, run_dpo, BUILT_IN)
