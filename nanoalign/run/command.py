"""Run a script or a tool as a command: parse its flags, and end with one line on an error."""

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
    """Run a script: parse its flags into a `kind` and call `run`. `built_in`: its defaults if no
    model is given."""
    with command(Path(sys.argv[0]).name), ranks.job():
        cfg = parse(kind, sys.argv[1:], built_in)
        try:
            run(cfg)
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise InputError(need_less(cfg, cfg.gradient_checkpointing)) from None
            raise


def out_of_memory(error: Exception) -> bool:
    """Is it an error of memory? torch has a class for it on CUDA; elsewhere the text tells."""
    words = "out of memory", "can't allocate memory", "not enough memory"
    by_class = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return by_class or any(text in str(error) for text in words)


def need_less(cfg: Config, checkpointing: bool | None) -> str:
    """The error for a run that is out of memory, with the flags that need less."""
    less = [] if checkpointing else ["--gradient_checkpointing"]
    less.append("a lower --max_row_tokens" if cfg.max_row_tokens else "--max_row_tokens")
    if cfg.use_peft and not cfg.load_in_4bit:
        less.append("--load_in_4bit")
    return f"out of memory; try {' or '.join(less)}; checkpoints are kept"


@contextlib.contextmanager
def command(name: str) -> Iterator[None]:
    """End the command `name` with one line and exit code 2 on an error that the user can fix.
    Ctrl-C ends it with code 130; while a run trains, record.py handles it. A reader that closes the
    pipe, such as head, is no error. The libraries print nothing."""
    quiet()
    try:
        yield
    except BrokenPipeError:
        sys.exit(141)  # the code of a process that SIGPIPE ended
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            where = f"{str(error.filename):.200}: " if error.filename else ""
            error = InputError(where + (error.strerror or str(error)))
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print(f"{name}: interrupted before there was anything to save", file=sys.stderr)
        sys.exit(130)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # Python would flush again at exit, and print an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet() -> None:
    """Silence the libraries: loading bars, notes on configs, retries of the hub, warnings."""
    warnings.simplefilter("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper):  # not so in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # some terminals lack characters
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
