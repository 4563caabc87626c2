"""The training loop. It is the same for every method.

A method is a generator. It gets the examples of one optimizer step, in batches that fit in memory.
For each batch it yields sums, each with the number of things that were summed:

    def sft(batches):
        for batch in batches:
            scores = policy(batch)
            yield {"loss": (-scores.logps.sum(), sum(scores.tokens))}

The loop calls backward on the summed loss of each batch. At the end of the step it divides the
gradient by the number of things in all batches: trained tokens for SFT, pairs for DPO, examples for
KTO. So 8 x 1, 4 x 2 and 1 x 8 examples give the same gradient. A mean of the batches' means would
not, if some batches have more tokens than others.

Other names that a method yields are metrics, or "num_tokens", if it trained on other tokens than
those of its examples. A method has all batches of the step. So it can first compute what they
share: the reference's log-probs, KTO's z0.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanoalign.data import Examples, epoch_order
from nanoalign.fast import paged
from nanoalign.model import Policy
from nanoalign.packing import Example, in_rows

Batches = list[list[Example]]
Sums = dict[str, tuple[float | Tensor, int]]  # name -> (sum, number of things summed)
Method = Callable[[Batches], Iterator[Sums]]


def add(total: Sums, more: Sums) -> None:
    for name, (value, count) in more.items():
        old_value, old_count = total.get(name, (0.0, 0))
        total[name] = old_value + value, old_count + count


def means(sums: Sums) -> dict[str, float]:
    """Each sum divided by its count. KTO has no pairs; its margin is a difference of means."""
    out = {name: value / count for name, (value, count) in sums.items() if count}
    if "rewards/chosen" in out and "rewards/rejected" in out:
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
    return out


def learning_rate(cfg, step: int, total: int) -> float:
    """The rate at step 0, 1 ... of `total`: a warm-up from 0, then a schedule of transformers."""
    peak, kind, warmup = cfg.learning_rate, cfg.lr_scheduler_type, cfg.warmup_steps
    if warmup < 1:  # as a share of all steps
        warmup = math.ceil(total * (warmup or cfg.warmup_ratio))
    warmup = 0 if kind == "constant" else int(warmup)
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, total - warmup)  # from 0 to 1
    options = {"num_cycles": 1, "power": 1.0, "lr_end": 1e-7, **cfg.lr_scheduler_kwargs}
    cycle, end = options["num_cycles"] * done % 1, min(peak, options["lr_end"])
    slow = warmup or 10_000  # steps
    return {
        "constant": peak,
        "constant_with_warmup": peak,
        "linear": peak * (1 - done),
        "polynomial": end + (peak - end) * (1 - done) ** options["power"],
        "cosine": peak * (1 + math.cos(math.pi * done)) / 2,
        "cosine_with_restarts": peak * (1 + math.cos(math.pi * cycle)) / 2,
        "inverse_sqrt": peak * math.sqrt(slow / (step - warmup + slow)),
    }[kind]


def plan(cfg, examples: int) -> tuple[int, int]:
    """How many steps an epoch has, and the run. An epoch's last step may have fewer examples."""
    per_epoch = math.ceil(examples / cfg.per_step)
    steps = max(1, math.ceil(cfg.num_train_epochs * per_epoch))
    return per_epoch, cfg.max_steps if cfg.max_steps > 0 else steps


def make_optimizer(cfg, lm: nn.Module) -> torch.optim.Optimizer:
    """AdamW on all trained parameters. A group of parameters may have a multiple of the learning
    rate: {"params": [...], "times": 16}, as LoRA+ does with B."""
    trained = [p for p in lm.parameters() if p.requires_grad]
    rates = {"lr": cfg.learning_rate, "betas": (cfg.adam_beta1, cfg.adam_beta2)}
    rates |= {"eps": cfg.adam_epsilon, "weight_decay": cfg.weight_decay}
    kind = paged.AdamW if cfg.optim == "paged_adamw_32bit" else torch.optim.AdamW
    return kind(trained, fused=True, **rates)


def fitting(examples: Examples, size: int, tokens: int) -> Batches:
    """Batches of `size` examples, or fewer if their row would have more than `tokens` tokens."""
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    return [part for batch in batches for part in in_rows(batch, tokens)]


def alone(sums: Sums, parameters=()) -> Sums:
    """The total over all processes, where there is one. Several also add up gradients here."""
    return sums


@dataclass
class Machine:
    """What a step needs to know of the machine. The defaults are for a single process."""

    rows: Callable = fitting  # examples -> the batches that this process computes
    total: Callable = alone  # adds up what all processes have summed (run/ranks.py)
    scale: float = 1.0  # of the loss: float16 needs more, or small gradients become 0


@dataclass
class Step:
    """What came of an optimizer step."""

    number: int  # counted from 1
    examples: list[Example]  # that it trained on
    sums: Sums | None  # None: loss or gradient were not finite, and no weight has changed
    learning_rate: float
    grad_norm: float  # before clipping

    @property
    def metrics(self) -> dict[str, float]:
        return means(self.sums or {})


def train(
    cfg, policy: Policy, examples: Examples, method: Method, optimizer=None,
    first: int = 0, order: Callable = epoch_order, machine: Machine | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Train the policy in place, from step `first` on. Yields each step when it is done. `order`
    sorts the examples of an epoch."""
    machine = machine or Machine()
    optimizer = optimizer or make_optimizer(cfg, policy.lm)
    per_epoch, steps = plan(cfg, len(examples))
    longest = cfg.max_row_tokens or policy.lm.row_tokens
    ordered: Examples = []
    policy.lm.train()
    for done in range(first, steps):
        epoch, step = divmod(done, per_epoch)
        if step == 0 or not ordered:
            ordered = order(examples, epoch, cfg.seed, cfg.shuffle_dataset)
        drawn = ordered[step * cfg.per_step : (step + 1) * cfg.per_step]
        batches = method(machine.rows(drawn, cfg.per_device_train_batch_size, longest))
        rate, scale = learning_rate(cfg, done, steps), machine.scale / sum(map(len, drawn))
        sums, norm = optimizer_step(
            optimizer, rate, batches, cfg.max_grad_norm, scale, machine.total
        )
        yield Step(done + 1, drawn, sums, rate, norm)


def optimizer_step(
    optimizer, rate: float, batches: Iterable[Sums], max_grad_norm: float = 0.0,
    scale: float = 1.0, total: Callable = alone,
) -> tuple[Sums | None, float]:  # fmt: skip
    """An optimizer step on the mean over all that the method's `batches` count. Returns the sums of
    loss and metrics, and the gradient's norm. The sums are None if loss or gradient are not finite;
    then no weight has changed. The loss is multiplied by `scale` before backward, so that sums over
    a thousand tokens fit into float16; afterwards the gradient is divided by it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sums: Sums = {}
    for batch in batches:
        loss, count = batch["loss"]
        (loss * scale).backward()
        add(sums, {**batch, "loss": (loss.detach(), count)})

    sums = total(sums, parameters)
    for gradient in (p.grad for p in parameters if p.grad is not None):
        gradient /= sums["loss"][1] * scale
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    # tolist() waits for the device: once a step, and before a weight changes
    values = [torch.as_tensor(value, device=norm.device) for value, _ in sums.values()]
    norm, values = norm.item(), torch.stack(values).tolist()
    sums = {name: (value, count) for (name, (_, count)), value in zip(sums.items(), values)}
    finite = math.isfinite(norm) and math.isfinite(sums["loss"][0])
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("times", 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums if finite else None, norm


@torch.no_grad()
def evaluate(lm, batches: Iterable[Sums], total: Callable = alone) -> dict[str, float]:
    """Means of loss and metrics over all that the `batches` count, of any size."""
    lm.eval()
    sums: Sums = {}
    for batch in batches:
        add(sums, {name: (float(value), count) for name, (value, count) in batch.items()})
    lm.train()
    return means(total(sums))
