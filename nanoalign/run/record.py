"""The record of a run: where it stands, what it says, how it stops and goes on.

train.py says what a step does; this file is about everything that can happen to a run meanwhile:
it logs, it is stopped and resumed, its disk fills up, a loss is not finite, float16 overflows.
"""

import signal
import time
from pathlib import Path

from nanoalign import InputError
from nanoalign.data import epoch_order
from nanoalign.model import Policy, sample
from nanoalign.packing import Example, row_tokens
from nanoalign.run.checkpoint import fingerprint, prune, resume, save_state, take_over
from nanoalign.run.files import write_whole
from nanoalign.run.flags import Config
from nanoalign.run.log import Log
from nanoalign.run.policy import save_policy
from nanoalign.run.session import Run
from nanoalign.train import (
    Method,
    Step,
    add,
    evaluate,
    fitting,
    make_optimizer,
    means,
    plan,
    train,
)

INITIAL_SCALE = 2.0**16  # of the loss, in float16


def fit(cfg: Config, run: Run, method: Method, order=epoch_order) -> None:
    """Train run.policy as `cfg` says, from where it stands to its end, and save it."""
    with Record(cfg, run) as record:
        start = record.optimizer, record.step, order, lambda: record.scale
        for step in train(cfg, run.policy, run.examples, method, *start):
            record.advance(step)
            if run.held_out and (record.ended or record.due(cfg.eval_steps)):
                record.evaluate(method)
            record.save_if_due()


class Record:
    """Use it in a `with` statement: SIGINT and SIGTERM then let the step finish and save it; a
    second signal ends the run at once.

    A loss or gradient that is not finite ends the run before it changes a weight (InputError, with
    the step's rows), once `cfg.skip_nonfinite` such steps have been passed over.
    """

    def __init__(self, cfg: Config, run: Run):
        self.cfg, self.run, self.directory = cfg, run, Path(cfg.output_dir)
        self.per_epoch, self.total = plan(cfg, len(run.examples))
        self.optimizer = make_optimizer(cfg, run.policy.lm)
        self.named = {n: p for n, p in run.policy.lm.named_parameters() if p.requires_grad}
        self.identity = fingerprint(vars(cfg), run.examples, run.policy.lm)
        # what a checkpoint keeps of a run, beside weights and generators
        self.state = {"step": 0, "num_tokens": 0, "skipped": 0, "window": {}, "time": 0.0}
        self.state |= {"scale": INITIAL_SCALE if cfg.fp16 else 1.0, "since_overflow": 0}
        which = cfg.resume_from_checkpoint
        self.state |= resume(which, self.directory, self.named, self.optimizer, self.identity)
        take_over(self.directory, fresh=which is None)
        prune(self.directory, cfg.save_total_limit, self.step)

    def __enter__(self) -> "Record":
        self.log = Log(self.directory, self.total, self.state, self.cfg.report_to)
        self.since = time.monotonic(), self.state["num_tokens"]  # of the last line of metrics
        self.signals: list[int] = []
        stops = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, self._note) for number in stops}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.log.close()

    def _note(self, number, frame) -> None:
        if self.signals:
            raise SystemExit(128 + number)
        self.signals.append(number)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state["step"]

    @property
    def scale(self) -> float:
        return self.state["scale"]

    @property
    def ended(self) -> bool:
        return self.step == self.total

    def due(self, every: int | None) -> bool:
        return bool(every) and self.step % every == 0

    def advance(self, step: Step) -> None:
        """A step was done, or left out because loss or gradient were not finite."""
        cfg, state = self.cfg, self.state
        if cfg.fp16 and (step.sums is not None or state["scale"] > 1):
            rescale(state, overflow=step.sums is None)
        elif step.sums is None:
            state["skipped"] += 1
            where = ", ".join(example.where for example in step.examples)
            what = f"step {step.number}: loss or gradient is not finite; its rows: {where}"
            if state["skipped"] > cfg.skip_nonfinite:
                raise InputError(what)
            self.log.say(f"{what}; skipped, {state['skipped']} of {cfg.skip_nonfinite}")
        add(state["window"], step.sums or {})
        tokens = sum(map(len, step.examples))
        state["step"] = step.number
        state["num_tokens"] += tokens
        self.log.advance(step.sums, tokens)
        if self.ended or self.due(cfg.logging_steps) or (self.step == 1 and cfg.logging_first_step):
            self._line(step)

    def _line(self, step: Step) -> None:
        """A line of metrics: means over the steps since the last one."""
        state, now = self.state, time.monotonic()
        speed = (state["num_tokens"] - self.since[1]) / max(1e-9, now - self.since[0])
        line = {"step": self.step, "epoch": self.step / self.per_epoch, **means(state["window"])}
        line["learning_rate"] = step.learning_rate
        if step.sums is not None:  # the norm may be NaN otherwise, which JSON does not know
            line["grad_norm"] = step.grad_norm
        line["num_tokens"] = state["num_tokens"]
        self.log.line({**line, "tokens_per_second": round(speed, 1)})
        state["window"], self.since = {}, (now, state["num_tokens"])

    def evaluate(self, method: Method) -> None:
        """Measure the held-out examples. The time that takes does not count as training."""
        started, cfg, lm = time.monotonic(), self.cfg, self.run.policy.lm
        longest = row_tokens(cfg.max_row_tokens, lm.device)
        held_out = fitting(self.run.held_out, cfg.per_device_eval_batch_size, longest)
        named = {f"eval_{name}": value for name, value in evaluate(lm, method(held_out)).items()}
        self.log.line({"step": self.step, "epoch": self.step / self.per_epoch, **named})
        if cfg.generate_during_eval:
            self.log.say(replies(self.run.policy, self.run.held_out[:3]))
        self.since = self.since[0] + time.monotonic() - started, self.since[1]

    def save_if_due(self) -> None:
        """The result at the end; before it a checkpoint, every so many steps or when a signal asked
        the run to stop, which it then does."""
        policy, stop = self.run.policy, bool(self.signals)
        if self.ended:
            write_whole(self.directory, lambda beside: save_policy(policy, beside), replace=True)
        elif stop or self.due(self.cfg.save_steps):
            self._checkpoint()
            if stop:
                hint = "--resume_from_checkpoint goes on from there"
                self.log.say(f"stopped after step {self.step}; {hint}")
                raise SystemExit(128 + self.signals[0])

    def _checkpoint(self) -> None:
        self.state["time"] = self.log.seconds()

        def write(beside):
            save_policy(self.run.policy, beside)
            state = {**self.state, "fingerprint": self.identity}
            save_state(beside, self.named, self.optimizer, state)

        write_whole(self.directory / f"checkpoint-{self.step}", write)
        prune(self.directory, self.cfg.save_total_limit, self.step)


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
    prompts, decode = [example.prompt for example in examples], policy.tokenizer.batch_decode
    columns = {"policy": sample(policy, prompts, max_new_tokens=64)}
    if policy.reference is not None:
        with policy.reference():
            columns["reference"] = sample(policy, prompts, max_new_tokens=64)
    columns = {"prompt": [prompt[-64:] for prompt in prompts], **columns}
    texts = {name: decode(ids, skip_special_tokens=True) for name, ids in columns.items()}
    lines = [
        f"  {n:<10} {text[i]!r:.100}" for i in range(len(prompts)) for n, text in texts.items()
    ]
    return "\n".join(lines)
