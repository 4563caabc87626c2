"""Group relative policy optimization: of the policy's own replies, prefer the better ones.

    python train_sft.py && python examples/train_grpo.py

GRPO (Shao et al. 2024, arXiv 2402.03300) samples a group of replies to each prompt, rewards each,
and raises the log-probs of those above their group's mean. Here every step trains on replies of
the very policy that it changes, so the paper's importance ratio is 1 and there is nothing to clip;
the gradient is REINFORCE's, and without a KL term. A prompt and its group are one example, so the
prompt is computed once, however many replies branch off it.

The reward is whatever code can say of a reply. In the built-in world an answer is right or wrong:
a row's `chosen` and `rejected` are both right, in two styles, and the reward is 1 for either.
"""

from dataclasses import dataclass, replace

import torch

from nanoalign import world
from nanoalign.formats.layouts import DPO
from nanoalign.model import sample
from nanoalign.run.flags import SFTConfig, flag
from nanoalign.run.record import fit
from nanoalign.run.session import Run, finish, main, start

BUILT_IN = dict(
    model_name_or_path="runs/sft", dataset_name=[str(world.HOME / "dpo.jsonl")],
    output_dir="runs/grpo", learning_rate=1e-3, lora_r=8, lora_alpha=16,
    per_device_train_batch_size=32, max_steps=60, logging_steps=5, device="cpu",
)  # fmt: skip


@dataclass
class GRPOConfig(SFTConfig):
    method_name = "GRPO"
    num_generations: int = flag(8, "replies in a group", above=1)
    max_completion_length: int = flag(24, "tokens of a sampled reply", above=0)
    temperature: float = flag(1.0, "of sampling", above=0)


def run_grpo(cfg: GRPOConfig) -> Run:
    run = start(cfg, DPO)

    def reward(example, reply) -> float:
        return float(reply in [ids for ids, _ in example.completions])

    def grpo(batches):
        """The loss is a mean over replies."""
        for batch in batches:
            prompts = [e.prompt for e in batch for _ in range(cfg.num_generations)]
            replies = sample(run.policy, prompts, cfg.max_completion_length, cfg.temperature)
            n = cfg.num_generations
            groups = [replies[i : i + n] for i in range(0, len(replies), n)]
            rewards = torch.tensor([[reward(e, y) for y in g] for e, g in zip(batch, groups)])
            advantages = (rewards - rewards.mean(1, keepdim=True)) / (
                rewards.std(1, keepdim=True) + 1e-4
            )
            scores = run.policy(
                [
                    replace(e, completions=[(y, [True] * len(y)) for y in g])
                    for e, g in zip(batch, groups)
                ]
            )
            losses = -advantages.flatten().to(scores.logps.device) * scores.logps
            yield {
                "loss": (losses.sum(), len(losses)),
                "reward": (rewards.sum(), len(losses)),
            }

    fit(cfg, run, grpo)
    return finish(cfg, run)


if __name__ == "__main__":
    main(GRPOConfig, run_grpo, BUILT_IN)
