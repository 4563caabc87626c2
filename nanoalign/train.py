"""The loop: one optimizer step after another, the same for every method.

A step draws its micro-batches, lets each one's SUMMED loss through backward, and divides once by
what the whole step sums over (trained tokens for SFT, examples for DPO and KTO). So 8 x 1, 4 x 2
and 1 x 8 examples give the same gradient. The usual way averages within each micro-batch and then
the averages, which gives a token in a short batch more weight than one in a long batch.

The loop knows no method. A script gives it functions:

    order(epoch)             the examples in the order of that epoch, a function of the seed alone
    weight(example)          what the example counts in the mean: its trained tokens, or 1
    prepare(batches)         what the losses need to know of the whole step, one entry a batch
                             (KTO's z0, reference log-probs); without gradient
    loss(batch, prepared)    the batch's summed loss, and its metrics as {name: (sum, count)}
"""

import math
import time
from pathlib import Path

import torch

from nanoalign import InputError
from nanoalign.config import Config
from nanoalign.data import Example, batches
from nanoalign.metrics import Log, Sums, add, means
from nanoalign.model import save_policy
from nanoalign.run import Run


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


def step_batches(cfg: Config, order: list[Example], step: int) -> list[list[Example]]:
    """The micro-batches of step 0, 1, ... of an epoch; its last step takes what is left."""
    size = cfg.per_device_train_batch_size
    per_step = size * cfg.gradient_accumulation_steps
    return batches(order[step * per_step : (step + 1) * per_step], size)


def train(cfg: Config, run: Run, order, weight, prepare, loss) -> None:
    """Train run.policy in place as `cfg` says, with metrics, evaluations and checkpoints."""
    lm, held_out = run.policy.lm, run.held_out
    parameters = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    directory = Path(cfg.output_dir)
    examples = order(0)
    per_epoch, total = steps_per_epoch(cfg, len(examples)), total_steps(cfg, len(examples))
    num_tokens, window, since = 0, {}, (time.monotonic(), 0)

    with Log(directory, total, cfg.report_to) as log:
        lm.train()
        for step in range(total):
            epoch, place = divmod(step, per_epoch)
            if place == 0 and epoch > 0:
                examples = order(epoch)
            micro_batches = step_batches(cfg, examples, place)
            rate = learning_rate(cfg, step, total)
            numbers, sums = optimizer_step(
                parameters, optimizer, rate, cfg.max_grad_norm, micro_batches, weight, prepare, loss
            )
            add(window, sums)
            num_tokens += sum(len(example) for batch in micro_batches for example in batch)
            done = step + 1
            log.bar.update()

            if done % cfg.logging_steps == 0 or (done == 1 and cfg.logging_first_step):
                now = time.monotonic()
                speed = (num_tokens - since[1]) / max(1e-9, now - since[0])
                line = {"step": done, "epoch": done / per_epoch, **means(window), **numbers}
                log.line({**line, "num_tokens": num_tokens, "tokens_per_second": round(speed, 1)})
                window, since = {}, (now, num_tokens)
            if held_out and (done == total or (cfg.eval_steps and done % cfg.eval_steps == 0)):
                started = time.monotonic()
                evaluation = evaluate(cfg, lm, held_out, weight, prepare, loss)
                named = {f"eval_{name}": value for name, value in evaluation.items()}
                log.line({"step": done, "epoch": done / per_epoch, **named})
                since = (since[0] + time.monotonic() - started, since[1])  # training's clock
            if cfg.save_steps and done % cfg.save_steps == 0 and done < total:
                save_policy(run.policy, directory / f"checkpoint-{done}")
    save_policy(run.policy, directory)


def optimizer_step(
    parameters, optimizer, rate, max_grad_norm, micro_batches, weight, prepare, loss
) -> tuple[dict[str, float], Sums]:
    """One step on the mean over all its micro-batches. -> learning rate and gradient norm; sums."""
    prepared = prepare(micro_batches)
    tensors, counts = {}, {}
    for batch, known in zip(micro_batches, prepared):
        value, metrics = loss(batch, known)
        value.backward()
        total = sum(map(weight, batch))
        for name, (summed, count) in {"loss": (value.detach(), total), **metrics}.items():
            tensors[name] = tensors.get(name, 0.0) + summed
            counts[name] = counts.get(name, 0) + count

    total = counts["loss"]
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_div_(gradients, total)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    # one copy from the device a step: everything that was measured, before anything is changed
    host = torch.stack([norm, *(torch.as_tensor(t, device=norm.device) for t in tensors.values())])
    norm, *values = host.float().tolist()
    if not math.isfinite(norm) or not math.isfinite(values[0]):
        rows = ", ".join(example.where for batch in micro_batches for example in batch)
        raise InputError(
            f"loss {values[0]}, gradient norm {norm}: stopped; the step's rows: {rows}"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sums = {name: (value, counts[name]) for name, value in zip(tensors, values)}
    return {"learning_rate": rate, "grad_norm": norm}, sums


@torch.no_grad()
def evaluate(cfg, lm, held_out, weight, prepare, loss) -> dict[str, float]:
    """Means over all held-out examples (SFT: tokens), whatever the batch size."""
    lm.eval()
    groups, sums = batches(held_out, cfg.per_device_eval_batch_size), {}
    for batch, known in zip(groups, prepare(groups)):
        value, metrics = loss(batch, known)
        add(sums, {"loss": (float(value), sum(map(weight, batch)))})
        add(sums, {name: (float(value), count) for name, (value, count) in metrics.items()})
    lm.train()
    return means(sums)
