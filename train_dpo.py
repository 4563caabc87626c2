"""Direct preference optimization: of two replies, prefer the chosen one.

    python train_dpo.py                                   # goes on from train_sft.py's result
    python train_dpo.py --model_name_or_path M --dataset_name pairs.jsonl

The policy is compared with a reference: itself, as it was at the start.
"""

import torch

from nanoalign.config import DPOConfig
from nanoalign.data import DPO, batches, epoch_order
from nanoalign.losses import dpo_loss
from nanoalign.metrics import reward_sums
from nanoalign.model import load_reference
from nanoalign.run import finish, main, start
from nanoalign.train import train


def run_dpo(cfg: DPOConfig) -> None:
    run = start(cfg, DPO)
    reference = load_reference(cfg, run.policy)

    def order(epoch):
        return epoch_order(run.examples, epoch, cfg.seed, cfg.shuffle_dataset)

    def weight(example):  # the loss is a mean over pairs
        return 1

    def pairs(batch):
        return [(e.prompt, e.completions) for e in batch]

    def prepare(groups):
        """Each batch's reference log-probs, (2 B,): chosen, rejected, chosen, rejected, ..."""
        if cfg.precompute_ref_log_probs:
            known = [[logp for e in batch for logp in e.reference] for batch in groups]
            return [torch.tensor(logps, device=run.policy.lm.device) for logps in known]
        return [reference(pairs(batch)) for batch in groups]

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

    if cfg.precompute_ref_log_probs:
        for batch in batches(run.examples + run.held_out, cfg.per_device_eval_batch_size):
            for example, both in zip(batch, reference(pairs(batch)).view(-1, 2).tolist()):
                example.reference = both

    train(cfg, run, order, weight, prepare, loss)
    finish(cfg, run)


if __name__ == "__main__":
    main("dpo", DPOConfig, run_dpo)
