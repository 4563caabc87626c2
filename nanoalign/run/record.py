"""The record of a run: where it stands, what it says, how it stops and goes on.

train.py says what a step does; this file is about everything that can happen to a run meanwhile:
it logs, it is stopped and resumed, its disk fills up, a loss is not finite, float16 overflows.
"""

import contextlib
import json
import math
import signal
import time
import uuid
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch

from nanoalign import InputError, Stopped
from nanoalign.data import epoch_order
from nanoalign.formats.mixture import balanced
from nanoalign.run import ranks
from nanoalign.run.checkpoint import (
    clean_up,
    fingerprint,
    finished,
    lies_in,
    load_weights,
    prune,
    resume,
    save_state,
    state_tensors,
    take_over,
)
from nanoalign.run.command import need_less, out_of_memory
from nanoalign.run.device import advice_on_threads, computes_in
from nanoalign.run.files import locked, rehearse, replace, write_whole
from nanoalign.run.flags import Config, no_choice
from nanoalign.run.log import Log, best_of, keep_lines, metric_of, replies
from nanoalign.run.policy import load_saved, save_policy
from nanoalign.run.session import Run, facts
from nanoalign.train import Machine, Method, Step, add, evaluate, make_optimizer, means, plan, train

INITIAL_SCALE = 2.0**16  # of the loss, in float16


def fit(cfg: Config, run: Run, method: Method, order=epoch_order) -> None:
    """Train run.policy as `cfg` says, from where it stands to its end, and save it.

    A signal lets the step finish, saves a checkpoint and ends the run. Once the last weights are
    saved the run is finished: a signal in its last evaluation ends it without a checkpoint. But
    where the best step is to be kept, the last evaluation comes first.
    """
    method = balanced(method, run.policy.model, cfg.router_aux_loss_coef)
    lock = contextlib.nullcontext() if ranks.RANK else locked(Path(cfg.output_dir))
    with stop_signals() as signals, lock, begun(cfg, run, signals) as record:
        record.check_metric(method)
        record.evaluate(method)  # where the run was stopped before it could
        start = record.optimizer, record.step, order, record.machine
        steps = train(cfg, run.policy, run.examples, method, *start)
        while not record.ended:
            record.advance(next(steps))
            if record.ended:
                record.save_checkpoint() if cfg.load_best_model_at_end else record.save()
            record.evaluate(method)
            # Asked once a step: a signal after the save must not end the run without a checkpoint.
            stop = record.stopped
            if not record.ended and (stop or record.due(record.save_every)):
                record.save_checkpoint()
            if stop and not record.ended:
                record.stop(stop, f"stopped after step {record.step}")
        if record.left and (stop := record.stopped):
            record.stop(stop, "stopped in the last evaluation; the weights are saved")
        record.end()


@contextlib.contextmanager
def begun(cfg: Config, run: Run, signals: list[int]) -> Iterator["Record"]:
    """Where an error ends the run, what was done is saved: it happens before a step changes a
    weight (AdamW's own memory was taken in the first). Not so a fault of the device; nor on several
    ranks: it takes all of them to save, and those that had enough are waiting for this one."""
    record = Record(cfg, run, signals)
    with contextlib.closing(record.log):
        try:
            yield record
        except Exception as error:
            sound = not isinstance(error, RuntimeError) or out_of_memory(error)
            if sound and ranks.WORLD == 1:
                with contextlib.suppress(Exception):
                    record.save_what_is_done()
            if out_of_memory(error):
                settled = run.policy.model.is_gradient_checkpointing
                raise InputError(need_less(cfg, settled)) from None
            raise


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in a list; a second one ends the run at once. Not if torchrun
    started it: on Ctrl-C that sends another to all its processes; and kills them after 30 seconds.
    """
    noted: list[int] = []

    def note(number, frame):
        if noted and not ranks.LAUNCHED:
            raise Stopped(128 + number)
        noted.append(number)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Record:
    """Where a run stands; it is resumed here, if the flags say so, and the log opened. The list
    `signals` grows when one comes."""

    def __init__(self, cfg: Config, run: Run, signals: list[int]):
        self.cfg, self.run, self.directory = cfg, run, Path(cfg.output_dir)
        self.signals = signals
        self.evaluations: list[dict] = []  # their lines in metrics.jsonl
        ranks.own_dropout(cfg.seed)  # not before: what a script adds must start equal on all ranks
        self.per_epoch, self.total = plan(cfg, len(run.examples))
        # Steps from one evaluation, and from one checkpoint, to the next; 0: only at the end.
        evals = cfg.eval_steps or (cfg.logging_steps if cfg.eval_strategy == "steps" else 0)
        self.eval_every = self.per_epoch if cfg.eval_strategy == "epoch" else evals
        saves = {"no": 0, "steps": cfg.save_steps, "epoch": self.per_epoch}
        self.save_every = saves[cfg.save_strategy]
        ranks.settle(run.policy.lm)
        self.optimizer = make_optimizer(cfg, run.policy.lm)
        self.named = {n: p for n, p in run.policy.lm.named_parameters() if p.requires_grad}
        self.float16 = computes_in(run.policy.lm) == torch.float16
        data = run.examples, run.held_out
        this_run = fingerprint(cfg, *data, run.policy.lm, self.optimizer)
        self.facts = facts(cfg, run, this_run["data"])
        self.state = {  # what a checkpoint keeps of a run, beside weights and generators
            "step": 0,
            "num_tokens": 0,
            "skipped": 0,  # steps whose loss or gradient was not finite
            "window": {},  # sums since the last line of metrics
            "time": 0.0,
            "scale": INITIAL_SCALE if self.float16 else 1.0,
            "since_overflow": 0,
            "evaluated": -1,  # after this step, the last time
            "run_id": "",  # its name at Weights & Biases
            "fingerprint": this_run,
        }
        ranks.once(partial(clean_up, self.directory))
        found, self.done = None, finished(cfg, self.state)  # the end is saved
        if self.done:
            self.state["step"] = self.state["step"] or self.total
            load_saved(run.policy, self.directory, cfg.trust_remote_code)
        elif cfg.resume_from_checkpoint is not None:
            found = resume(cfg, self.named, self.optimizer, self.state)
        fresh = not self.done and (found is None or not lies_in(found, self.directory))
        if fresh:
            self.state["run_id"] = uuid.uuid4().hex

        self.start = time.monotonic() - self.state["time"]

        ranks.wait()  # all have read the checkpoint
        if ranks.RANK == 0:
            if not self.done:
                rehearse(self.directory, partial(self.write, whole={}))
                take_over(self.directory, fresh)
            lines = keep_lines(self.directory / "metrics.jsonl", until=0 if fresh else self.step)
            # They tell which step is the best so far, and whether patience is gone.
            self.evaluations = [n for n in lines if any(key.startswith("eval_") for key in n)]
            if not self.done:
                prune(self.directory, cfg.save_total_limit, self.step, self.best)
        self.evaluations = ranks.once(lambda: self.evaluations)
        known = [line["step"] for line in self.evaluations]
        self.state["evaluated"] = max([self.state["evaluated"], *known])
        if self.done:
            left = "its evaluation is left" if self.left else "nothing to do"
            print(f"{self.directory}, step {self.step}: this run is finished; {left}")
        self.machine = Machine(ranks.rows, ranks.total, self.state["scale"])
        self.log = Log(cfg, self.total, self.step, self.state["run_id"])
        self.state["threads"] = torch.get_num_threads()  # a resumed run takes as many
        self.since = self.seconds(), self.state["num_tokens"]  # at the last line of metrics
        self.saved, self.fastest = self.step, 0.0  # the newest checkpoint; tokens per second

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state["step"]

    @property
    def ended(self) -> bool:
        _, since = best_of(self.cfg, self.evaluations)
        impatient = since >= (self.cfg.early_stopping_patience or math.inf)
        return self.done or self.step == self.total or impatient

    @property
    def best(self) -> int:
        """The step whose evaluation was the best so far, if it is the one to keep."""
        line = best_of(self.cfg, self.evaluations)[0] if self.cfg.load_best_model_at_end else None
        return line["step"] if line else 0

    @property
    def stopped(self) -> int:
        """The signal that came, to this rank or another, 0 if none did; all ranks ask together."""
        came = sum(ranks.gather(self.signals), [])
        return came[0] if came else 0

    def stop(self, signal: int, where: str) -> None:
        self.log.say(f"{where}; --resume_from_checkpoint goes on from there")
        raise Stopped(128 + signal)

    @property
    def left(self) -> bool:
        """Is an evaluation due and not done?"""
        due = self.due(self.eval_every) if self.step else self.cfg.eval_on_start
        due = due and self.state["evaluated"] < self.step
        return due and bool(self.run.held_out) and self.cfg.eval_strategy != "no"

    def due(self, every: int) -> bool:
        """At the end, and each `every` steps before it."""
        return self.ended or (every > 0 and self.step % every == 0)

    def seconds(self) -> float:
        """That the run took until now, before it was resumed too."""
        return round(time.monotonic() - self.start, 3)

    def advance(self, step: Step) -> None:
        """A step was done, or left out because loss or gradient were not finite.

        That ends the run (InputError, with the step's rows), before it changed a weight, once
        `cfg.skip_nonfinite` such steps have been passed over; the steps before it are saved.
        float16 only lowers its scale.
        """
        cfg, state = self.cfg, self.state
        if self.float16 and (step.sums is not None or state["scale"] > 1):
            rescale(state, overflow=step.sums is None)
            self.machine.scale = state["scale"]
        elif step.sums is None:
            where = [example.where for example in step.examples]
            more = [f"and {len(where) - 8} more"] if len(where) > 8 else []
            rows = ", ".join(where[:8] + more)
            what = f"step {step.number}: loss or gradient is not finite; its rows: {rows}"
            if state["skipped"] >= cfg.skip_nonfinite:
                self.save_what_is_done()
                raise InputError(what)
            state["skipped"] += 1
            self.log.say(f"{what}; skipped, {state['skipped']} of {cfg.skip_nonfinite}")
        add(state["window"], step.sums or {})
        state["step"] = step.number
        made, _ = (step.sums or {}).get("num_tokens", (None, 0))  # by a method that samples
        state["num_tokens"] += sum(map(len, step.examples)) if made is None else round(made)
        now, tokens = self.seconds(), state["num_tokens"]
        speed = (tokens - self.since[1]) / max(1e-3, now - self.since[0])
        self.log.advance(step, speed)
        if self.due(cfg.logging_steps) or (self.step == 1 and cfg.logging_first_step):
            line = {**means(state["window"]), "learning_rate": step.learning_rate}
            if step.sums is not None:  # the norm may be NaN otherwise, which JSON does not know
                line["grad_norm"] = step.grad_norm
            self._line({**line, "num_tokens": tokens, "tokens_per_second": round(speed, 1)})
            state["window"], self.since = {}, (now, tokens)
            self.fastest = max(self.fastest, speed)
            if advice := advice_on_threads(self.run.policy.lm.device, speed, self.fastest):
                self.log.say(f"advice: step {self.step}: {advice}")
                self.fastest = 0.0  # said once

    def _line(self, metrics: dict[str, float]) -> dict[str, float]:
        place = {"step": self.step, "epoch": self.step / self.per_epoch}
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if lost := [name for name in metrics if name not in finite]:  # JSON has no NaN
            self.log.say(f"step {self.step}: not finite: {', '.join(lost)}")
        self.log.line(line := {**place, **finite, "time": self.seconds()})
        return line

    def check_metric(self, method: Method) -> None:
        """Is the metric that is to tell the best step one of those that are measured? Asked of one
        example of each label, before the run has cost anything."""
        name = metric_of(self.cfg)[0].removeprefix("eval_")
        if name == "loss" or not (self.run.held_out and not no_choice(self.cfg)):
            return
        few = list({example.label: example for example in self.run.held_out}.values())
        known = evaluate(self.run.policy.lm, method([few]), ranks.total)
        if name not in known:
            raise InputError(f"--metric_for_best_model {name}: expected one of {', '.join(known)}")

    def evaluate(self, method: Method) -> None:
        """Measure the held-out examples, if that is due. The time that takes does not count as
        training. A signal cuts it off, and leaves it to the run that goes on; but not on several
        ranks, which need not be at the same batch."""
        started, cfg, lm, state = self.seconds(), self.cfg, self.run.policy.lm, self.state
        if not self.left or self.stopped:
            return
        longest = cfg.max_row_tokens or lm.row_tokens
        batches = method(ranks.rows(self.run.held_out, cfg.per_device_eval_batch_size, longest))
        if ranks.WORLD == 1:
            batches = takewhile(lambda _: not self.stopped, batches)
        measured = evaluate(lm, batches, ranks.total)
        if self.stopped:
            return
        former, state["evaluated"] = self.best, self.step
        line = self._line({f"eval_{name}": value for name, value in measured.items()})
        self.evaluations.append(ranks.once(lambda: line))  # rank 0 decides for all
        if self.best != former:  # the best so far is saved, whatever save_steps says
            if self.saved < self.step:
                self.save_checkpoint()
            if former:
                self.drop_checkpoint(former)
        if cfg.generate_during_eval and ranks.RANK == 0:
            self.log.say(replies(self.run.policy, self.run.held_out[:3]))
        self.since = self.since[0] + self.seconds() - started, self.since[1]

    def write(self, directory: Path, whole: dict | None) -> None:
        """The adapter or model, and run.json: the run is finished where that is."""
        save_policy(self.run.policy, directory, whole)
        state = {**self.state, "time": self.seconds()}
        parts = {k: v for k, v in state.pop("fingerprint").items() if k != "data"}
        best = {"best_step": self.best} if self.best else {}
        text = json.dumps({**self.facts, **parts, **best, "state": state}, indent=2)
        (directory / "run.json").write_text(text + "\n", encoding="utf-8")

    def save(self) -> None:
        """The end, where the run's directory is."""
        whole, self.saved, self.done = ranks.whole_weights(self.run.policy.lm), self.step, True
        if ranks.RANK == 0:
            write_whole(self.directory, partial(self.write, whole=whole), into=True, rescue=True)
            clean_up(self.directory)
        ranks.wait()  # torchrun would kill rank 0 for another's fault

    def save_checkpoint(self) -> None:
        self.state["time"], self.saved = self.seconds(), self.step
        tensors = state_tensors(self.named, self.optimizer)  # of all ranks
        whole = ranks.whole_weights(self.run.policy.lm)

        def write(beside):
            save_policy(self.run.policy, beside, whole)
            save_state(beside, tensors, self.state)

        if ranks.RANK == 0:
            write_whole(self.directory / f"checkpoint-{self.step}", write, rescue=True)
            if not self.ended:  # else it stands until the end is saved
                prune(self.directory, self.cfg.save_total_limit, self.step, self.best)
        ranks.wait()

    def drop_checkpoint(self, step: int) -> None:
        """One that is not wanted any more, unless save_steps wants it."""
        wanted = self.save_every and step % self.save_every == 0 and step < self.total
        if ranks.RANK == 0 and not wanted:
            replace(self.directory / f"checkpoint-{step}")

    def end(self) -> None:
        """The last save, if it is still to be made: of the best step, if that is to be kept."""
        if self.done:
            return
        if self.step < self.total:
            self.log.say(f"no evaluation was better in the last {self.cfg.early_stopping_patience}")
        best, (name, greater) = best_of(self.cfg, self.evaluations)[0], metric_of(self.cfg)
        if self.cfg.load_best_model_at_end and best:
            if self.saved < self.step:
                self.save_checkpoint()  # where the run goes on, if it is killed before it has saved
            if best["step"] < self.step:
                load_weights(self.directory / f"checkpoint-{best['step']}", self.named)
            which = f"the {'highest' if greater else 'lowest'} of {len(self.evaluations)}"
            self.log.say(f"step {best['step']} is kept: {name} {best[name]:.4g} is {which}")
        self.save()
        if self.cfg.load_best_model_at_end and self.best != self.step:
            self.drop_checkpoint(self.step)

    def save_what_is_done(self) -> None:
        """Before the run ends with an error: the steps since the last checkpoint are good."""
        if self.saved < self.step:
            last = self.ended and not self.cfg.load_best_model_at_end
            self.save() if last else self.save_checkpoint()
            place = self.directory.name if last else f"checkpoint-{self.step}"
            self.log.say(f"saved in {place}; --resume_from_checkpoint goes on there")


def rescale(state: dict, overflow: bool) -> None:
    """Dynamic loss scaling for float16, whose smallest numbers gradients fall below (Micikevicius
    et al. 2017, arXiv 1710.03740): half the scale after a step that overflowed and so was left out,
    twice the scale after 2,000 that did not."""
    state["since_overflow"] = 0 if overflow else state["since_overflow"] + 1
    if overflow:
        state["scale"] /= 2
    elif state["since_overflow"] % 2000 == 0:
        state["scale"] *= 2
