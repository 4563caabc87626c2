"""Files and directories that are written whole or not at all.

A run can be killed, and its disk can fill up, at any moment. So whatever it writes gets another
name first, with "tmp" in it, is flushed to the disk and then renamed, which a file system does in
one piece. A crash leaves the old content or the new, and at worst something with "tmp" in its name.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nanoalign import InputError
from nanoalign.formats.files import stored_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Write = Callable[[Path], object]  # fills the file or directory that it is given
NO_SYNC = errno.EINVAL, errno.ENOTSUP, errno.EBADF  # of a file system that can flush no directory
WHOLE = "tmp-whole"  # in a directory: complete files on their way into it


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """A disk that is full, or that may not be written to, is the user's to mend: InputError.

    safetensors and tokenizers raise errors of their own for it, with "(os error N)" in their text.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target}: not saved: {reason}") from None


def write_file(target: Path, write: Write) -> None:
    """`write` fills a small file."""
    beside = target.with_name(f"tmp-{target.name}")
    with saving(target):
        try:
            write(beside)
            _flush(beside)
            os.replace(beside, target)
        finally:
            with suppress(OSError):
                beside.unlink()


def write_text(target: Path, text: str) -> None:
    """A name that is no UTF-8 is written with its bytes escaped."""
    how = {"encoding": "utf-8", "errors": "backslashreplace"}
    write_file(target, lambda beside: beside.write_text(text, **how))


def write_whole(target: Path, write: Write, into: bool = False, rescue: bool = False) -> None:
    """`write` fills a directory. It appears as `target` when it is complete, or not at all; with
    `into` it is the files that appear in a `target` that exists.

    Raises InputError when the disk is full or not writable; what was there before stands. With
    `rescue` the weights that could not be saved are kept, and it is said where.
    """
    beside = target / "tmp-final" if into else target.with_name(f"tmp-{target.name}")
    try:
        with saving(target):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            write(beside)
            for path in [*beside.rglob("*"), beside]:
                _flush(path)
            replace(target / WHOLE if into else target, beside)
            _flush(beside.parent)
            if into:
                install(target)
    except Exception as error:
        where = rescued(beside, write) if rescue else ""
        shutil.rmtree(beside, ignore_errors=True)  # halves, and the disk may be full
        if isinstance(error, InputError):
            raise InputError(f"{error}{where}") from None
        if rescue:
            print(f"{target}: not saved{where}")
        raise


def rehearse(directory: Path, write: Write) -> None:
    """Before long work, write what its end will write into `directory`, but for large weights: what
    can't be saved shows now. After that only a disk that is full by then can be in the way."""
    place = directory / "tmp-rehearsal"
    try:
        write_whole(place, write)
    except InputError:
        raise
    except Exception as error:  # of a tokenizer, a config, a template
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{directory}: what is to be saved there can't be: {why[:300]}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def install(directory: Path) -> None:
    """Move the files in WHOLE, if there are any, to their places: weights after configs, and last
    run.json, which says that all are there. Who is killed here does the rest at the next start."""
    whole = directory / WHOLE
    order = {".safetensors": 1, "run.json": 2}
    for path in sorted(whole.glob("*"), key=lambda p: order.get(p.name, order.get(p.suffix, 0))):
        if path.is_dir():  # of templates: an old one would be in the way
            replace(directory / path.name)
        os.replace(path, directory / path.name)
    if whole.exists():
        _flush(directory)
        whole.rmdir()


def rescued(beside: Path, write: Write) -> str:
    """Keep the weights of a save that failed: in `beside` if they got there whole, or else among
    the system's temporary files, if there is room. -> where they are, in words."""
    place = beside.with_name(beside.name.replace("tmp", "rescued", 1))
    with suppress(Exception):
        if has_weights(beside):
            replace(place, beside)
        else:
            shutil.rmtree(beside, ignore_errors=True)
            place = Path(tempfile.mkdtemp(prefix="nanoalign-"))
            with suppress(Exception):
                write(place)
    if has_weights(place):
        return f"; its weights are in {place}; older checkpoints stand"
    shutil.rmtree(place, ignore_errors=True)
    return "; older checkpoints stand"


def is_free(directory: Path) -> bool:
    """Is nothing there but what a crash has left unfinished?"""
    return not directory.exists() or all(p.name.startswith("tmp-") for p in directory.iterdir())


def has_weights(directory: Path) -> bool:
    """Whole ones: an adapter's, or all those of a model."""
    adapter = directory / "adapter_model.safetensors"
    with suppress(InputError, OSError, SafetensorError):
        if not adapter.exists():
            return bool(stored_tensors(str(directory)))
        with safe_open(adapter, framework="pt"):
            return True
    return False


def replace(target: Path, new: Path | None = None) -> None:
    """`new` takes the place of a directory, which is deleted if it is there. A crash in the midst
    must not leave half of it under its own name, where it would be taken for a whole one."""
    old = target.with_name(f"tmp-old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_symlink():
        target.unlink()  # what it leads to is not ours
    elif target.exists():
        os.rename(target, old)
    if new:
        os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory, which is made if need be. The lock ends with the process
    that holds it, so a killed run blocks nobody. Some systems know no locks; there it is left out.
    """
    path, old = directory / "tmp-lock", directory.exists()
    with saving(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = not os.fstat(file.fileno()).st_nlink  # its holder has just deleted it
        except OSError as error:
            busy = error.errno in (errno.EAGAIN, errno.EACCES)
        if busy:
            raise InputError(f"{directory}: another run is at work there")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                if not old and is_free(directory):  # nothing came of it
                    shutil.rmtree(directory)


def _flush(path: Path) -> None:
    """Wait until the disk holds a file's content, or a directory's list of names. Windows can open
    no directory, and wait for no file that is open for reading; there it is left to the system."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SYNC):
            raise
    finally:
        os.close(handle)
