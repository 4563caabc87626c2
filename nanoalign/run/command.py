"""A script or a tool as a command: its flags, and the one line with which it ends when it can't."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import torch
import transformers

from nanoalign import InputError, Stopped
from nanoalign.run import ranks
from nanoalign.run.flags import Config, parse


def main(kind: type[Config], run: Callable[[Config], object], built_in: dict) -> None:
    """A script as a command: parse its flags, which are a `kind`, and run.

    `built_in` holds the settings of a run without a model of the user's; {} where there is none.
    """
    with command(Path(sys.argv[0]).name), ranks.job():
        cfg = parse(kind, sys.argv[1:], built_in)
        try:
            run(cfg)
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise InputError(need_less(cfg, cfg.gradient_checkpointing)) from None
            raise


def out_of_memory(error: Exception) -> bool:
    """torch has an error of its own for it on CUDA; elsewhere the text tells."""
    words = "out of memory", "can't allocate memory", "not enough memory"
    own = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return own or any(text in str(error) for text in words)


def need_less(cfg: Config, checkpointing: bool | None) -> str:
    """The flags with which a run that ran out of memory would need less of it."""
    less = [] if checkpointing else ["--gradient_checkpointing"]
    less.append("a lower --max_row_tokens" if cfg.max_row_tokens else "--max_row_tokens")
    if cfg.use_peft and not cfg.load_in_4bit:
        less.append("--load_in_4bit")
    return f"out of memory; less is needed with {' or '.join(less)}; checkpoints stand"


@contextlib.contextmanager
def command(name: str) -> Iterator[None]:
    """What the user can mend ends the command `name` with one line and exit code 2; so does Ctrl-C,
    outside the loop, which has its own way to stop, with code 130. A reader who has had enough, as
    head has after ten lines, is no error. The libraries are quiet."""
    quiet()
    try:
        yield
    except BrokenPipeError:
        sys.exit(141)  # as SIGPIPE would have it
    except (InputError, OSError) as error:
        why = error if isinstance(error, InputError) else InputError(os_error(error))
        print(f"{name}: error: {why}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print(f"{name}: interrupted before there was anything to save", file=sys.stderr)
        sys.exit(130)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # Python would try again, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def os_error(error: OSError) -> str:
    """The file, as far as its name can be shown, and what is wrong."""
    where = f"{str(error.filename):.200}: " if error.filename else ""
    return where + (error.strerror or str(error))


def quiet() -> None:
    """The libraries' chatter: loading bars, notes on configs, retries of the hub, warnings."""
    warnings.simplefilter("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook it is not
        sys.stdout.reconfigure(errors="backslashreplace")  # a name or reply that it can't show
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
