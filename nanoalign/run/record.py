"""A run from its first step to its last: logging, evaluating, saving, stopping and resuming.

train.py makes the steps. This file handles what else can happen: a signal, a full disk, a loss that
is not finite, an overflow in float16, an evaluation that is better than all before it.
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
    is_finished,
    lies_in,
    load_weights,
    prune,
    resume,
    save_state,
    state_tensors,
    take_over,
)
from nanoalign.run.command import need_less, out_of_memory
from nanoalign.run.device import advice_on_threads, checkpointed, computes_in
from nanoalign.run.files import locked, rehearse, replace, write_whole
from nanoalign.run.flags import Config, no_choice
from nanoalign.run.log import Log, best_of, keep_lines, metric_of, replies
from nanoalign.run.policy import load_saved, save_policy
from nanoalign.run.session import Run, facts
from nanoalign.train import Machine, Method, Step, add, evaluate, make_optimizer, means, plan, train

INITIAL_SCALE = 2.0**16  # of the loss, in float16


def fit(cfg: Config, run: Run, method: Method, order=epoch_order) -> None:
    """Train run.policy to its last step and save it. A resumed run begins at its checkpoint.

    At a signal the run finishes its step, saves a checkpoint and ends. The last weights are saved
    before the last evaluation, so a signal during that evaluation needs no checkpoint. With
    --load_best_model_at_end the last evaluation comes first: it may choose another step.
    """
    method = balanced(method, run.policy.model, cfg.router_aux_loss_coef)
    lock = contextlib.nullcontext() if ranks.RANK else locked(Path(cfg.output_dir))
    with stop_signals() as signals, lock, begun(cfg, run, signals) as record:
        record.check_metric(method)
        record.evaluate(method)  # a signal may have interrupted the evaluation of this step
        more = {"first": record.step, "order": order, "machine": record.machine}
        steps = train(cfg, run.policy, run.examples, method, record.optimizer, **more)
        while not record.ended:
            record.advance(next(steps))
            if record.ended:
                record.save_checkpoint() if cfg.load_best_model_at_end else record.save()
            record.evaluate(method)
            # Read once a step: a signal that comes during the save must wait for the next one.
            received = record.signal
            if not record.ended and (received or record.due(record.save_every)):
                record.save_checkpoint()
            if received and not record.ended:
                record.stop(received, f"stopped after step {record.step}")
        if record.must_evaluate and (received := record.signal):
            record.stop(received, "stopped in the last evaluation; the weights are saved")
        record.end()


@contextlib.contextmanager
def begun(cfg: Config, run: Run, signals: list[int]) -> Iterator["Record"]:
    """A Record of the run. If an error ends the run, the steps that are done are saved first.

    An error comes before its step changes a weight: AdamW takes its memory in the first step. After
    a fault of the device (RuntimeError) nothing is saved, because the weights may be wrong; nor on
    several ranks, because a save needs all of them.
    """
    record = Record(cfg, run, signals)
    with contextlib.closing(record.log):
        try:
            yield record
        except Exception as error:
            weights_are_good = not isinstance(error, RuntimeError) or out_of_memory(error)
            if weights_are_good and ranks.WORLD == 1:
                with contextlib.suppress(Exception):
                    record.save_steps_done()
            if out_of_memory(error):
                checkpointing = checkpointed(run.policy.model)
                raise InputError(need_less(cfg, checkpointing)) from None
            raise


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of each SIGINT and SIGTERM. A second signal ends the run at once.
    Under torchrun it does not: on Ctrl-C torchrun sends a second signal by itself. It kills its
    processes after 30 seconds."""
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
    """The state of a run, and its log. To make one resumes the run if the flags ask for that.
    `signals` is the list of `stop_signals`."""

    def __init__(self, cfg: Config, run: Run, signals: list[int]):
        self.cfg, self.run, self.signals = cfg, run, signals
        self.directory, lm = Path(cfg.output_dir), run.policy.lm
        self.evaluations: list[dict] = []  # their lines in metrics.jsonl
        if ranks.RANK:  # for dropout; earlier, the ranks would begin with different weights
            torch.manual_seed(cfg.seed + ranks.RANK)
        self.per_epoch, self.total = plan(cfg, len(run.examples))
        # Steps between two evaluations, and between two checkpoints. 0: only at the end.
        evals = cfg.eval_steps or (cfg.logging_steps if cfg.eval_strategy == "steps" else 0)
        self.eval_every = self.per_epoch if cfg.eval_strategy == "epoch" else evals
        saves = {"no": 0, "steps": cfg.save_steps, "epoch": self.per_epoch}
        self.save_every = saves[cfg.save_strategy]

        if lm in ranks.SHARDED:  # a pass without gradient leaves whole weights in lm.parameters()
            lm.reshard()
        self.optimizer = make_optimizer(cfg, lm)
        self.trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
        self.float16 = computes_in(lm) == torch.float16
        this_run = fingerprint(cfg, run.examples, run.held_out, lm, self.optimizer)
        self.facts = facts(cfg, run, this_run["data"])
        self.state = {  # what state.json of a checkpoint holds
            "step": 0,
            "num_tokens": 0,
            "skipped": 0,  # steps whose loss or gradient was not finite
            "window": {},  # sums since the last line of metrics
            "time": 0.0,  # seconds of training
            "scale": INITIAL_SCALE if self.float16 else 1.0,  # of the loss
            "since_overflow": 0,  # steps
            "evaluated": -1,  # the step of the last evaluation
            "run_id": "",  # of Weights & Biases
            "fingerprint": this_run,
        }

        ranks.once(partial(clean_up, self.directory))
        found, self.finished = None, is_finished(cfg, self.state)  # finished: its end is saved
        if self.finished:
            self.state["step"] = self.state["step"] or self.total
            load_saved(run.policy, self.directory, cfg.trust_remote_code)
        elif cfg.resume_from_checkpoint is not None:
            found = resume(cfg, self.trained, self.optimizer, self.state)
        fresh = not self.finished and (found is None or not lies_in(found, self.directory))
        if fresh:
            self.state["run_id"] = uuid.uuid4().hex
        self.start = time.monotonic() - self.state["time"]

        ranks.wait()  # rank 0 may delete checkpoints only when all ranks have read theirs
        if ranks.RANK == 0:
            if not self.finished:
                rehearse(self.directory, partial(self.write, state_dict={}))
                take_over(self.directory, fresh)
            lines = keep_lines(self.directory / "metrics.jsonl", until=0 if fresh else self.step)
            self.evaluations = [n for n in lines if any(key.startswith("eval_") for key in n)]
            if not self.finished:
                prune(self.directory, cfg.save_total_limit, self.step, self.best)
        self.evaluations = ranks.once(lambda: self.evaluations)
        steps = [line["step"] for line in self.evaluations]
        self.state["evaluated"] = max([self.state["evaluated"], *steps])
        if self.finished:
            left = "its evaluation is left" if self.must_evaluate else "nothing to do"
            print(f"{self.directory}, step {self.step}: this run is finished; {left}")

        self.machine = Machine(ranks.rows, ranks.total, self.state["scale"])
        self.log = Log(cfg, self.total, self.step, self.state["run_id"])
        self.state["threads"] = torch.get_num_threads()  # a resumed run takes as many
        self.last_line = self.seconds(), self.state["num_tokens"]  # at the last line of metrics
        self.saved_step = self.step  # of the newest checkpoint
        self.fastest = 0.0  # tokens per second

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.state["step"]

    @property
    def ended(self) -> bool:
        """No step is left: all are done, or --early_stopping_patience is used up."""
        _, since = best_of(self.cfg, self.evaluations)
        impatient = since >= (self.cfg.early_stopping_patience or math.inf)
        return self.finished or self.step == self.total or impatient

    @property
    def best(self) -> int:
        """With --load_best_model_at_end: the step of the best evaluation so far. Else 0."""
        line = best_of(self.cfg, self.evaluations)[0] if self.cfg.load_best_model_at_end else None
        return line["step"] if line else 0

    @property
    def signal(self) -> int:
        """The first signal that any rank has received, or 0. All ranks must ask together."""
        received = sum(ranks.gather(self.signals), [])
        return received[0] if received else 0

    def stop(self, signal: int, where: str) -> None:
        self.log.say(f"{where}; --resume_from_checkpoint goes on from there")
        raise Stopped(128 + signal)

    @property
    def must_evaluate(self) -> bool:
        """Is an evaluation of this step due, and not done yet?"""
        due = self.due(self.eval_every) if self.step else self.cfg.eval_on_start
        due = due and self.state["evaluated"] < self.step
        return due and bool(self.run.held_out) and self.cfg.eval_strategy != "no"

    def due(self, every: int) -> bool:
        """Is it the end, or a multiple of `every` steps? (0: at the end only.)"""
        return self.ended or (every > 0 and self.step % every == 0)

    def seconds(self) -> float:
        """How long the run has taken, with the time before it was resumed."""
        return round(time.monotonic() - self.start, 3)

    def advance(self, step: Step) -> None:
        """Count a step, and log a line if one is due.

        A step whose loss or gradient was not finite has changed no weight. In float16 it lowers the
        loss scale. Otherwise up to `cfg.skip_nonfinite` such steps are skipped; the next one saves
        the steps before it and raises InputError, which names its data.
        """
        cfg, state = self.cfg, self.state
        if self.float16 and (step.sums is not None or state["scale"] > 1):
            rescale(state, overflow=step.sums is None)
            self.machine.scale = state["scale"]
        elif step.sums is None:
            where = [example.where for example in step.examples]
            more = [f"and {len(where) - 8} more"] if len(where) > 8 else []
            lines = ", ".join(where[:8] + more)
            what = f"step {step.number}: loss or gradient is not finite; its rows: {lines}"
            if state["skipped"] >= cfg.skip_nonfinite:
                self.save_steps_done()
                raise InputError(what)
            state["skipped"] += 1
            self.log.say(f"{what}; skipped, {state['skipped']} of {cfg.skip_nonfinite}")
        add(state["window"], step.sums or {})
        state["step"] = step.number
        sampled, _ = (step.sums or {}).get("num_tokens", (None, 0))  # if the method counts them
        state["num_tokens"] += sum(map(len, step.examples)) if sampled is None else round(sampled)
        now, tokens = self.seconds(), state["num_tokens"]
        speed = (tokens - self.last_line[1]) / max(1e-3, now - self.last_line[0])
        self.log.advance(step, speed)
        if self.due(cfg.logging_steps) or (self.step == 1 and cfg.logging_first_step):
            line = {**means(state["window"]), "learning_rate": step.learning_rate}
            if step.sums is not None:  # else the norm may be NaN
                line["grad_norm"] = step.grad_norm
            self.log_line({**line, "num_tokens": tokens, "tokens_per_second": round(speed, 1)})
            state["window"], self.last_line = {}, (now, tokens)
            self.fastest = max(self.fastest, speed)
            if advice := advice_on_threads(self.run.policy.lm.device, speed, self.fastest):
                self.log.say(f"advice: step {self.step}: {advice}")
                self.fastest = 0.0  # said once

    def log_line(self, metrics: dict[str, float]) -> dict[str, float]:
        when = {"step": self.step, "epoch": self.step / self.per_epoch}
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if dropped := [name for name in metrics if name not in finite]:  # JSON has no NaN
            self.log.say(f"step {self.step}: not finite: {', '.join(dropped)}")
        self.log.line(line := {**when, **finite, "time": self.seconds()})
        return line

    def check_metric(self, method: Method) -> None:
        """InputError if evaluations do not measure --metric_for_best_model. One example of each
        label is evaluated to find out, before the first step."""
        name = metric_of(self.cfg)[0].removeprefix("eval_")
        if name == "loss" or not (self.run.held_out and not no_choice(self.cfg)):
            return
        few = list({example.label: example for example in self.run.held_out}.values())
        known = evaluate(self.run.policy.lm, method([few]), ranks.total)
        if name not in known:
            raise InputError(f"--metric_for_best_model {name}: expected one of {', '.join(known)}")

    def evaluate(self, method: Method) -> None:
        """Evaluate the held-out examples, if that is due. The time is not counted in tokens per
        second. A signal interrupts the evaluation; the resumed run does it again. On several ranks
        it is not interrupted: they may be at different batches."""
        started, cfg, lm, state = self.seconds(), self.cfg, self.run.policy.lm, self.state
        if not self.must_evaluate or self.signal:
            return
        longest = cfg.max_row_tokens or lm.row_tokens
        batches = method(ranks.rows(self.run.held_out, cfg.per_device_eval_batch_size, longest))
        if ranks.WORLD == 1:
            batches = takewhile(lambda _: not self.signal, batches)
        measured = evaluate(lm, batches, ranks.total)
        if self.signal:
            return
        old_best, state["evaluated"] = self.best, self.step
        line = self.log_line({f"eval_{name}": value for name, value in measured.items()})
        self.evaluations.append(ranks.once(lambda: line))  # all ranks must agree
        if self.best != old_best:  # the new best step needs a checkpoint, whatever save_steps says
            if self.saved_step < self.step:
                self.save_checkpoint()
            if old_best:
                self.drop_checkpoint(old_best)
        if cfg.generate_during_eval and ranks.RANK == 0:
            self.log.say(replies(self.run.policy, self.run.held_out[:3]))
        self.last_line = self.last_line[0] + self.seconds() - started, self.last_line[1]

    def write(self, directory: Path, state_dict: dict | None) -> None:
        """Write the adapter or model, and run.json, which marks the run as finished."""
        save_policy(self.run.policy, directory, state_dict)
        state = {**self.state, "time": self.seconds()}
        parts = {k: v for k, v in state.pop("fingerprint").items() if k != "data"}
        best = {"best_step": self.best} if self.best else {}
        text = json.dumps({**self.facts, **parts, **best, "state": state}, indent=2)
        (directory / "run.json").write_text(text + "\n", encoding="utf-8")

    def save(self) -> None:
        """Save the last weights in the run's directory."""
        write = partial(self.write, state_dict=ranks.whole_weights(self.run.policy.lm))
        self.saved_step, self.finished = self.step, True
        if ranks.RANK == 0:
            write_whole(self.directory, write, into=True, rescue=True)
            clean_up(self.directory)
        ranks.wait()  # if another rank failed meanwhile, torchrun would kill rank 0 in its save

    def save_checkpoint(self) -> None:
        self.state["time"], self.saved_step = self.seconds(), self.step
        tensors = state_tensors(self.trained, self.optimizer)
        state_dict = ranks.whole_weights(self.run.policy.lm)

        def write(directory):
            save_policy(self.run.policy, directory, state_dict)
            save_state(directory, tensors, self.state)

        if ranks.RANK == 0:
            write_whole(self.directory / f"checkpoint-{self.step}", write, rescue=True)
            if not self.ended:  # at the end the older ones stay until the last weights are saved
                prune(self.directory, self.cfg.save_total_limit, self.step, self.best)
        ranks.wait()

    def drop_checkpoint(self, step: int) -> None:
        """Delete the checkpoint of `step`, unless save_steps asks for it."""
        asked_for = self.save_every and step % self.save_every == 0 and step < self.total
        if ranks.RANK == 0 and not asked_for:
            replace(self.directory / f"checkpoint-{step}")

    def end(self) -> None:
        """Make the last save, if it is not made yet. With --load_best_model_at_end it saves the
        weights of the best step."""
        if self.finished:
            return
        if self.step < self.total:
            self.log.say(f"no evaluation was better in the last {self.cfg.early_stopping_patience}")
        best, (name, greater) = best_of(self.cfg, self.evaluations)[0], metric_of(self.cfg)
        if self.cfg.load_best_model_at_end and best:
            if self.saved_step < self.step:
                self.save_checkpoint()  # a run that is killed before the last save resumes here
            if best["step"] < self.step:
                load_weights(self.directory / f"checkpoint-{best['step']}", self.trained)
            which = f"the {'highest' if greater else 'lowest'} of {len(self.evaluations)}"
            self.log.say(f"step {best['step']} is kept: {name} {best[name]:.4g} is {which}")
        self.save()
        if self.cfg.load_best_model_at_end and self.best != self.step:
            self.drop_checkpoint(self.step)

    def save_steps_done(self) -> None:
        """Save the steps since the last checkpoint before an error ends the run."""
        if self.saved_step < self.step:
            last = self.ended and not self.cfg.load_best_model_at_end
            self.save() if last else self.save_checkpoint()
            where = self.directory.name if last else f"checkpoint-{self.step}"
            self.log.say(f"saved in {where}; --resume_from_checkpoint goes on there")


def rescale(state: dict, overflow: bool) -> None:
    """Dynamic loss scaling (Micikevicius et al. 2017, arXiv 1710.03740).

    Many gradients are too small for float16, so the loss is multiplied by a scale. A step that
    overflows changes no weight and halves the scale. 2,000 steps without overflow double it.
    """
    state["since_overflow"] = 0 if overflow else state["since_overflow"] + 1
    if overflow:
        state["scale"] /= 2
    elif state["since_overflow"] % 2000 == 0:
        state["scale"] *= 2
