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
import operator
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nanoalign import InputError
from nanoalign.checkpoint import claim, fingerprint, prune, resume, save_state, write_whole
from nanoalign.config import Config
from nanoalign.data import Example, batches
from nanoalign.generate import generate_ids
from nanoalign.metrics import Log, Sums, add, means
from nanoalign.model import Policy, save_policy
from nanoalign.packing import in_rows, row_tokens
from nanoalign.run import Run

INITIAL_SCALE = 2.0**16  # of the loss, in float16


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


def step_batches(cfg: Config, order: list[Example], step: int, tokens: int) -> list[list[Example]]:
    """What step 0, 1, ... of an epoch sends through backward, part by part: its micro-batches, cut
    into rows of at most `tokens`. An epoch's last step takes what is left."""
    size = cfg.per_device_train_batch_size
    per_step = size * cfg.gradient_accumulation_steps
    return parts(batches(order[step * per_step : (step + 1) * per_step], size), tokens)


def parts(micro_batches: list[list[Example]], tokens: int) -> list[list[Example]]:
    """Micro-batches cut into rows of at most `tokens`."""
    key = operator.attrgetter("sequence")
    return [part for batch in micro_batches for part in in_rows(batch, tokens, key)]


def train(cfg: Config, run: Run, order, weight, prepare, loss) -> None:
    """Train run.policy in place as `cfg` says, with metrics, evaluations and checkpoints.

    A loss or gradient that is not finite ends the run before it changes a weight (InputError, with
    the step's rows), once `cfg.skip_nonfinite` such steps have been passed over. SIGINT and SIGTERM
    let the step finish and save it.
    """
    lm, directory = run.policy.lm, Path(cfg.output_dir)
    named = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        named.values(),
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    per_epoch = steps_per_epoch(cfg, len(run.examples))
    total = total_steps(cfg, len(run.examples))
    identity = fingerprint(vars(cfg), run.examples, lm)
    state = {"step": 0, "num_tokens": 0, "skipped": 0, "window": {}, "time": 0.0}
    state |= {"scale": INITIAL_SCALE if cfg.fp16 else 1.0, "since_overflow": 0}
    state |= resume(cfg.resume_from_checkpoint, directory, named, optimizer, identity)
    claim(directory, fresh=cfg.resume_from_checkpoint is None)
    prune(directory, cfg.save_total_limit, state["step"])

    def checkpoint() -> None:
        def write(beside):
            save_policy(run.policy, beside)
            save_state(beside, named, optimizer, {**state, "fingerprint": identity})

        state["time"] = log.seconds()
        write_whole(directory / f"checkpoint-{state['step']}", write)
        prune(directory, cfg.save_total_limit, state["step"])

    longest = row_tokens(cfg.max_row_tokens, lm.device)
    lm.train()
    with Log(directory, total, state, cfg.report_to) as log, stop_signals() as stopped:
        since = time.monotonic(), state["num_tokens"]
        for step in range(state["step"], total):
            epoch, place = divmod(step, per_epoch)
            if place == 0 or step == state["step"]:
                examples = order(epoch)
            micro_batches = step_batches(cfg, examples, place, longest)
            rate = learning_rate(cfg, step, total)
            numbers, sums = optimizer_step(
                optimizer,
                rate,
                cfg.max_grad_norm,
                micro_batches,
                weight,
                prepare,
                loss,
                state["scale"],
            )
            if sums is None:
                del numbers["grad_norm"]  # JSON knows no NaN
            if cfg.fp16 and (sums is not None or state["scale"] > 1):
                rescale(state, overflow=sums is None)
            elif sums is None:
                state["skipped"] += 1
                where = ", ".join(e.where for batch in micro_batches for e in batch)
                what = f"step {step + 1}: loss or gradient is not finite; its rows: {where}"
                if state["skipped"] > cfg.skip_nonfinite:
                    raise InputError(what)
                log.say(f"{what}; skipped, {state['skipped']} of {cfg.skip_nonfinite}")
            add(state["window"], sums or {})
            state["step"] = done = step + 1
            tokens = sum(len(e) for batch in micro_batches for e in batch)
            state["num_tokens"] += tokens
            log.advance(sums, tokens)

            if done % cfg.logging_steps == 0 or (done == 1 and cfg.logging_first_step):
                now = time.monotonic()
                speed = (state["num_tokens"] - since[1]) / max(1e-9, now - since[0])
                line = {
                    "step": done,
                    "epoch": done / per_epoch,
                    **means(state["window"]),
                    **numbers,
                }
                line |= {"num_tokens": state["num_tokens"], "tokens_per_second": round(speed, 1)}
                log.line(line)
                state["window"], since = {}, (now, state["num_tokens"])
            at_end, stop = done == total, bool(stopped)
            if run.held_out and (at_end or (cfg.eval_steps and done % cfg.eval_steps == 0)):
                started = time.monotonic()
                evaluation = evaluate(cfg, lm, run.held_out, weight, prepare, loss)
                named_so = {f"eval_{name}": value for name, value in evaluation.items()}
                log.line({"step": done, "epoch": done / per_epoch, **named_so})
                if cfg.generate_during_eval:
                    log.say(replies(run.policy, run.held_out[:3]))
                since = since[0] + time.monotonic() - started, since[1]  # training's clock
            if not at_end and (stop or (cfg.save_steps and done % cfg.save_steps == 0)):
                checkpoint()
            if stop and not at_end:
                log.say(f"stopped after step {done}; --resume_from_checkpoint goes on from there")
                raise SystemExit(128 + stopped[0])
    write_whole(directory, lambda beside: save_policy(run.policy, beside), replace=True)


def rescale(state: dict, overflow: bool) -> None:
    """Dynamic loss scaling for float16, whose smallest numbers gradients fall below (Micikevicius
    et al. 2017, arXiv 1710.03740): half the scale after a step that overflowed and so was left out,
    twice the scale after 2,000 that did not."""
    state["since_overflow"] = 0 if overflow else state["since_overflow"] + 1
    if overflow:
        state["scale"] /= 2
    elif state["since_overflow"] % 2000 == 0:
        state["scale"] *= 2


def replies(policy: Policy, examples: list[Example]) -> str:
    """The policy's greedy replies to held-out prompts, beside the reference's."""
    prompts = [example.prompt for example in examples]
    columns = {"policy": generate_ids(policy, prompts, max_new_tokens=64)}
    if policy.start is not None:
        with policy.start():
            columns["reference"] = generate_ids(policy, prompts, max_new_tokens=64)
    lines = []
    for i, prompt in enumerate(prompts):
        text = policy.tokenizer.decode(prompt[-64:], skip_special_tokens=True)
        lines.append(f"  prompt     {text!r:.100}")
        lines += [f"  {name:<10} {column[i]!r:.100}" for name, column in columns.items()]
    return "\n".join(lines)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The signals that have asked the run to stop. A second one stops it at once."""
    received: list[int] = []

    def note(number, frame):
        if received:
            raise SystemExit(128 + number)
        received.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def optimizer_step(
    optimizer, rate, max_grad_norm, micro_batches, weight, prepare, loss, scale=1.0
) -> tuple[dict[str, float], Sums | None]:
    """One step on the mean over all its micro-batches.

    `scale` multiplies the loss on its way through backward, and is taken out of the gradient.
    -> learning rate and gradient norm; sums of loss and metrics, or None when loss or gradient are
    not finite: then nothing has changed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors, counts = {}, {}
    for batch, known in zip(micro_batches, prepare(micro_batches)):
        value, metrics = loss(batch, known)
        (value * scale).backward()
        metrics = {"loss": (value.detach(), sum(map(weight, batch))), **metrics}
        for name, (summed, count) in metrics.items():
            tensors[name] = tensors.get(name, 0.0) + summed
            counts[name] = counts.get(name, 0) + count

    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_div_(gradients, counts["loss"] * scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    # one copy from the device a step: everything that was measured, before anything is changed
    host = torch.stack([norm, *(torch.as_tensor(t, device=norm.device) for t in tensors.values())])
    norm, *values = host.tolist()
    sums = {name: (value, counts[name]) for name, value in zip(tensors, values)}
    if math.isfinite(norm) and math.isfinite(sums["loss"][0]):
        for group in optimizer.param_groups:  # LoRA+ would give its B matrices "times" 16
            group["lr"] = rate * group.get("times", 1.0)
        optimizer.step()
    else:
        sums = None
    optimizer.zero_grad(set_to_none=True)
    return {"learning_rate": rate, "grad_norm": norm}, sums


@torch.no_grad()
def evaluate(cfg, lm, held_out, weight, prepare, loss) -> dict[str, float]:
    """Means over all held-out examples (SFT: tokens), whatever the batch size."""
    lm.eval()
    whole, sums = batches(held_out, cfg.per_device_eval_batch_size), {}
    groups = parts(whole, row_tokens(cfg.max_row_tokens, lm.device))
    for batch, known in zip(groups, prepare(groups)):
        value, metrics = loss(batch, known)
        add(sums, {"loss": (float(value), sum(map(weight, batch)))})
        add(sums, {name: (float(value), count) for name, (value, count) in metrics.items()})
    lm.train()
    return means(sums)
