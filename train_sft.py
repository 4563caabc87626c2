"""Supervised fine-tuning: learn the assistant's replies of given conversations.

    python train_sft.py                                   # a tiny model of our own, from scratch
    python train_sft.py --model_name_or_path M --dataset_name conversations.jsonl

The loss is the cross-entropy of the replies' tokens; everything else is context.
"""

from nanoalign.config import SFTConfig
from nanoalign.data import epoch_order
from nanoalign.layouts import SFT
from nanoalign.losses import sft_loss
from nanoalign.run import Run, finish, main, start
from nanoalign.train import train


def run_sft(cfg: SFTConfig) -> Run:
    run = start(cfg, SFT)

    def order(epoch):
        return epoch_order(run.examples, epoch, cfg.seed, cfg.shuffle_dataset)

    def weight(example):  # the loss is a mean over trained tokens
        return sum(sum(mask) for _, mask in example.completions)

    def prepare(batches):
        return [None for _ in batches]

    def loss(batch, _):
        scores = run.policy.lm([e.sequence for e in batch], cfg.neftune_noise_alpha)
        return sft_loss(scores.logps).sum(), {}

    train(cfg, run, order, weight, prepare, loss)
    return finish(cfg, run)


if __name__ == "__main__":
    main("sft", SFTConfig, run_sft)
