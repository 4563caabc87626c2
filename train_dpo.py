"""Direct preference optimization: of two replies, prefer the chosen one.

    python train_dpo.py                                   # goes on from train_sft.py's result
    python train_dpo.py --model_name_or_path M --dataset_name pairs.jsonl

The policy is compared with a reference: itself, as it was at the start.
"""

from nanoalign.formats.layouts import DPO
from nanoalign.losses import DPO_LOSSES, dpo_loss, numbers
from nanoalign.run.flags import DPOConfig
from nanoalign.run.record import fit
from nanoalign.run.reference import reference_of
from nanoalign.run.session import Run, finish, main, start
from nanoalign.train import reward_sums


def run_dpo(cfg: DPOConfig) -> Run:
    run, loss = start(cfg, DPO), DPO_LOSSES[cfg.loss_type]
    reference = reference_of(cfg, run.policy, loss, lambda: run.examples + run.held_out)

    def dpo(batches):
        """The loss is a mean over pairs; a batch's completions are chosen, rejected, chosen, ..."""
        for batch, ref_logps in zip(batches, reference(batches)):
            scores = run.policy(batch)
            chosen, rejected = (scores.take(range(i, 2 * len(batch), 2)) for i in (0, 1))
            losses, *rewards = dpo_loss(
                chosen.logps,
                rejected.logps,
                ref_logps[0::2],
                ref_logps[1::2],
                chosen.lengths,
                rejected.lengths,
                **numbers(cfg, dpo_loss, loss),
            )
            won = (rewards[0] > rewards[1]).float().sum()
            yield {
                "loss": (losses.sum(), len(batch)),
                **reward_sums("chosen", rewards[0], chosen),
                **reward_sums("rejected", rewards[1], rejected),
                "rewards/accuracies": (won, len(batch)),
            }

    fit(cfg, run, dpo)
    return finish(cfg, run)


if __name__ == "__main__":
    main("dpo", DPOConfig, run_dpo)
