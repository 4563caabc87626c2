"""CPU seconds until the built-in world's model answers 99 % of its validation questions right.

    python benchmarks/speedrun.py                                   # the default, three seeds
    python benchmarks/speedrun.py max_steps=1500 hidden_size=128    # an idea

A setting is a flag of train_sft.py or an entry of the model's config.json. The clock is the CPU
time of this process, with one thread, from before the first step to after the last. Reading the
data and asking the questions are not part of it, and no training data may come from the held-out
sets. An idea is a record if it takes less time and the mean over the seeds is 99 % or more. A seed
draws initial weights and the order of the data. README.md beside this file has the records.
"""

import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train_sft
from experiments import lab
from nanoalign import world
from nanoalign.model import make_policy
from nanoalign.run.flags import SFTConfig, parse
from nanoalign.train import train

SEEDS = 42, 43, 44
FLAGS = vars(SFTConfig()).keys()


def attempt(flags: dict[str, str], shape: dict[str, str], seed: int) -> tuple[float, list[float]]:
    """-> CPU seconds of a training, and the share of right greedy answers of each kind."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    cfg = parse(SFTConfig, [*words, f"--seed={seed}"], train_sft.BUILT_IN)
    own = AutoConfig.from_pretrained(world.BASE).to_dict()
    own |= {name: type(own[name])(value) for name, value in shape.items()}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**own))
    policy = make_policy(model, AutoTokenizer.from_pretrained(world.BASE))
    rows, asked = lab.pairs("sft"), lab.pairs("validation")
    replies = [row["completion"] for row in rows]
    examples = lab.examples_of(policy, [row["prompt"] for row in rows], replies)

    start = time.process_time()
    for _ in train(cfg, policy, examples, lab.sft_method(policy)):
        pass
    seconds = time.process_time() - start

    replies = lab.replies_of(policy, asked, temperature=0.0)
    right = [reply in (row["terse"], row["sentence"]) for reply, row in zip(replies, asked)]
    kinds = range(0, len(right), world.HELD_OUT)
    return seconds, [sum(right[i : i + world.HELD_OUT]) / world.HELD_OUT for i in kinds]


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    world.build()
    settings = dict(word.split("=", 1) for word in words)
    flags = {name: value for name, value in settings.items() if name in FLAGS}
    shape = {name: value for name, value in settings.items() if name not in FLAGS}
    print("seed  CPU seconds  right   sort, capitals, backwards, pick, where")
    runs = []
    for seed in SEEDS:
        seconds, kinds = attempt(flags, shape, seed)
        runs.append((seconds, sum(kinds) / len(kinds)))
        each = ", ".join(f"{share:.0%}" for share in kinds)
        print(f"{seed:<6}{seconds:<13.1f}{runs[-1][1]:<8.1%}{each}", flush=True)
    seconds, right = (sum(column) / len(runs) for column in zip(*runs))
    print(f"mean  {seconds:<13.1f}{right:.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
