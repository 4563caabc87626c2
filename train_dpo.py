"""Direct preference optimization: of two replies, prefer the chosen one.

    python train_dpo.py                                   # goes on from train_sft.py's result
    python train_dpo.py --model_name_or_path M --dataset_name pairs.jsonl

The policy is compared with a reference: itself, as it was at the start.
"""

from nanoalign.config import DPOConfig
from nanoalign.data import epoch_order
from nanoalign.layouts import DPO
from nanoalign.losses import dpo_loss
from nanoalign.metrics import reward_sums
from nanoalign.reference import load_reference
from nanoalign.run import Run, finish, main, start
from nanoalign.train import train


def run_dpo(cfg: DPOConfig) -> Run:
    run = start(cfg, DPO)

    def order(epoch):
        return epoch_order(run.examples, epoch, cfg.seed, cfg.shuffle_dataset)

    def weight(example):  # the loss is a mean over pairs
        return 1

    def pairs(batch):
        return [e.sequence for e in batch]

    def everything():  # that the run asks the reference for
        return pairs(run.examples + run.held_out)

    reference = load_reference(cfg, run.policy, everything)

    def prepare(groups):
        """Each batch's reference log-probs, (2 B,): chosen, rejected, chosen, rejected, ..."""
        ref_logps = reference(pairs(sum(groups, [])))
        return ref_logps.split([2 * len(batch) for batch in groups])

    def loss(batch, ref_logps):
        scores = run.policy.lm(pairs(batch))
        first, second = range(0, 2 * len(batch), 2), range(1, 2 * len(batch), 2)
        chosen, rejected = scores.take(first), scores.take(second)
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            chosen.logps,
            rejected.logps,
            ref_logps[first],
            ref_logps[second],
            chosen.lengths,
            rejected.lengths,
            cfg.beta,
            cfg.loss_type,
            cfg.label_smoothing,
            cfg.rpo_alpha,
        )
        won = (chosen_rewards > rejected_rewards).float().sum()
        return losses.sum(), {
            **reward_sums("chosen", chosen_rewards, chosen),
            **reward_sums("rejected", rejected_rewards, rejected),
            "rewards/accuracies": (won, len(batch)),
        }

    train(cfg, run, order, weight, prepare, loss)
    return finish(cfg, run)


if __name__ == "__main__":
    main("dpo", DPOConfig, run_dpo)
