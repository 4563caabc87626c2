"""The loop: one optimizer step after another, the same for every method.

A METHOD is a generator. It is given the examples of one optimizer step, in batches that fit in
memory, and yields for each batch what it summed and how many things that were:

    def sft(batches):
        for batch in batches:
            scores = policy(batch)
            yield {"loss": (-scores.logps.sum(), sum(scores.tokens))}

The loop lets each batch's summed loss through backward as it comes, and divides once, by what the
whole step counted (trained tokens for SFT, examples for DPO and KTO). So 8 x 1, 4 x 2 and 1 x 8
examples give the same gradient. The usual way averages within each batch and then the averages,
which gives a token in a short batch more weight than one in a long batch.

Whatever else a method yields under a name ("rewards/chosen") is a metric. Since it has the whole
step before it, it can ask first for what the batches share: the reference's log-probs, KTO's z0.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from nanoalign.data import batches, epoch_order
from nanoalign.packing import Example, in_rows, row_tokens
from nanoalign.run.flags import Config
from nanoalign.run.log import Sums, add, means
from nanoalign.run.record import Record
from nanoalign.run.session import Run

Batches = list[list[Example]]
Method = Callable[[Batches], Iterator[Sums]]


def learning_rate(cfg: Config, step: int, total: int) -> float:
    """At step 0, 1, ... of `total`: linear warm-up from 0, then linear, cosine or constant."""
    warmup = cfg.warmup_steps or math.ceil(total * cfg.warmup_ratio)
    if step < warmup:
        return cfg.learning_rate * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    shape = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return cfg.learning_rate * shape[cfg.lr_scheduler_type]


def steps_per_epoch(cfg: Config, examples: int) -> int:
    per_step = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps
    return math.ceil(examples / per_step)


def total_steps(cfg: Config, examples: int) -> int:
    if cfg.max_steps > 0:
        return cfg.max_steps
    return max(1, math.ceil(cfg.num_train_epochs * steps_per_epoch(cfg, examples)))


def epochs(cfg: Config, examples: int) -> int:
    """The epochs that the run begins."""
    return math.ceil(total_steps(cfg, examples) / steps_per_epoch(cfg, examples))


def fitting(examples: list[Example], size: int, tokens: int) -> Batches:
    """Micro-batches of `size` examples, cut where they would be rows of more than `tokens`."""
    return [part for batch in batches(examples, size) for part in in_rows(batch, tokens)]


def make_optimizer(cfg: Config, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )


def train(cfg: Config, run: Run, method: Method, order=epoch_order) -> None:
    """Train run.policy in place as `cfg` says; `order` gives the examples of an epoch.

    Metrics, checkpoints, what happens at Ctrl-C or after a loss that is not finite: record.py.
    """
    lm = run.policy.lm
    optimizer = make_optimizer(cfg, [p for p in lm.parameters() if p.requires_grad])
    total = total_steps(cfg, len(run.examples))
    per_epoch = steps_per_epoch(cfg, len(run.examples))
    per_step = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps
    longest = row_tokens(cfg.max_row_tokens, lm.device)
    lm.train()
    with Record(cfg, run, optimizer, total, per_epoch) as record:
        examples = None
        for step in range(record.step, total):
            epoch, place = divmod(step, per_epoch)
            if examples is None or place == 0:
                examples = order(run.examples, epoch, cfg.seed, cfg.shuffle_dataset)
            drawn = examples[place * per_step : (place + 1) * per_step]  # the last: what is left
            micro_batches = fitting(drawn, cfg.per_device_train_batch_size, longest)
            rate = learning_rate(cfg, step, total)
            sums, norm = optimizer_step(
                optimizer, rate, method(micro_batches), cfg.max_grad_norm, record.scale
            )
            record.advance(drawn, sums, {"learning_rate": rate, "grad_norm": norm})
            if run.held_out and (record.ended or record.due(cfg.eval_steps)):
                held_out = fitting(run.held_out, cfg.per_device_eval_batch_size, longest)
                with record.evaluation() as metrics:
                    metrics |= evaluate(lm, method(held_out))
            record.save_if_due()


def optimizer_step(
    optimizer, rate: float, batches: Iterable[Sums], max_grad_norm: float = 0.0, scale: float = 1.0
) -> tuple[Sums | None, float]:
    """One step on the mean over all that the method's `batches` yield.

    `scale` multiplies the loss on its way through backward, and is taken out of the gradient.
    -> sums of loss and metrics, or None when loss or gradient are not finite (then nothing has
    changed); the gradient's norm.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sums: Sums = {}
    for batch in batches:
        loss, count = batch["loss"]
        (loss * scale).backward()
        add(sums, {**batch, "loss": (loss.detach(), count)})

    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_div_(gradients, sums["loss"][1] * scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    # one copy from the device a step: everything that was measured, before anything is changed
    values = [torch.as_tensor(value, device=norm.device) for value, _ in sums.values()]
    norm, *values = torch.stack([norm, *values]).tolist()
    sums = {name: (value, count) for (name, (_, count)), value in zip(sums.items(), values)}
    if math.isfinite(norm) and math.isfinite(sums["loss"][0]):
        for group in optimizer.param_groups:  # LoRA+ would give its B matrices "times" 16
            group["lr"] = rate * group.get("times", 1.0)
        optimizer.step()
    else:
        sums = None
    optimizer.zero_grad(set_to_none=True)
    return sums, norm


@torch.no_grad()
def evaluate(lm, batches: Iterable[Sums]) -> dict[str, float]:
    """Means over all held-out examples (SFT: tokens), whatever the batch size."""
    lm.eval()
    sums: Sums = {}
    for batch in batches:
        add(sums, {name: (float(value), count) for name, (value, count) in batch.items()})
    lm.train()
    return means(sums)
