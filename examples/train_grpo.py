"""Group relative policy optimization (GRPO): of the policy's replies, prefer the better ones.

    python train_sft.py && python examples/train_grpo.py

GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3) samples a group of replies to each prompt, gives
each a reward, and raises the log-probs of those whose reward is above the group's mean. Here the
replies of a step come from the policy as it is at this step. So the importance ratio is 1, and
nothing is clipped. Two parts of the paper's objective are left out: the KL term, and the division
by a reply's length. A prompt and its group are one example, so the prompt is computed once.

In the built-in world the reward is 1 for a right answer. It does not depend on the style. But full
sentences become more frequent, because the model gets them right more often.
"""

from array import array
from dataclasses import dataclass, replace

import torch

from nanoalign import InputError, world
from nanoalign.formats.layouts import DPO
from nanoalign.model import sample
from nanoalign.packing import Example
from nanoalign.run.command import main
from nanoalign.run.flags import POSITIVE, Config, flag
from nanoalign.run.record import fit
from nanoalign.run.report import finish
from nanoalign.run.session import Run, start

BUILT_IN = dict(
    model_name_or_path="runs/sft", dataset_name=[str(world.HOME / "dpo.jsonl")],
    output_dir="runs/grpo", learning_rate=1e-3, lr_scheduler_type="constant", lora_r=8,
    per_device_train_batch_size=32, max_steps=120, device="cpu",
)  # fmt: skip


@dataclass
class GRPOConfig(Config):
    num_generations: int = flag(8, "replies in a group", ("be more than 1", lambda n: n > 1))
    max_completion_length: int = flag(24, "tokens of a sampled reply", POSITIVE)
    temperature: float = flag(1.0, "of sampling", POSITIVE)


def reward(example: Example, reply: list[int]) -> float:
    """The reward of a reply: any function will do. In the built-in world `chosen` and `rejected` of
    a line are right answers in two styles, and a reply gets 1 if it equals one of them."""
    return float(reply in [list(ids) for ids, _ in example.texts])


def run_grpo(cfg: GRPOConfig) -> Run:
    if cfg.sharded:
        raise InputError("--fsdp: a model in parts can't generate, and GRPO samples from it")
    run, size = start(cfg, DPO), cfg.num_generations
    lm = run.policy.lm
    if cfg.temperature != 1 and lm.softcap:
        raise InputError("--temperature: must be 1 for a model that caps its logits")
    lm.scale /= cfg.temperature  # or it would train another policy than the one that samples

    def grpo(batches):
        """One step of GRPO. The loss is a mean over replies."""
        for batch in batches:
            prompts = [list(example.prompt) for example in batch for _ in range(size)]
            replies = sample(run.policy, prompts, cfg.max_completion_length, cfg.temperature)
            groups = [replies[i : i + size] for i in range(0, len(replies), size)]
            rewards = torch.tensor([[reward(e, y) for y in g] for e, g in zip(batch, groups)])
            spread = rewards.std(1, keepdim=True) + 1e-4  # not 0, if all rewards are equal
            advantages = (rewards - rewards.mean(1, keepdim=True)) / spread  # (prompts, size)

            texts = [[(array("i", ids), [True] * len(ids)) for ids in group] for group in groups]
            sampled = [replace(e, texts=t) for e, t in zip(batch, texts)]
            scores = run.policy(sampled)
            losses = -advantages.flatten().to(scores.logps.device) * scores.logps
            yield {
                "loss": (losses.sum(), len(replies)),
                "reward": (rewards.sum(), len(replies)),
                "num_tokens": (sum(map(len, sampled)), 0),  # not those of the data's replies
            }

    fit(cfg, run, grpo)
    return finish(cfg, run)


if __name__ == "__main__":
    main(GRPOConfig, run_grpo, BUILT_IN)
