"""Write files and directories so that a crash leaves the old content or the new one, no mixture.

A run can be killed at any moment, and its disk can become full. So everything is written under
another name first, which begins with "tmp-", then flushed to the disk and renamed. A file system
renames in one step. A crash may leave something behind under the name with "tmp-".
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

Write = Callable[[Path], object]  # writes the file, or into the directory, at this path
NO_SYNC = errno.EINVAL, errno.ENOTSUP, errno.EBADF  # the file system can't flush directories
COMPLETE = "tmp-whole"  # a directory of complete files, which `install` moves to their places


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Raise InputError if the disk is full or not writable. safetensors and tokenizers raise errors
    of their own, with "(os error N)" in the text."""
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
    """Write a small file."""
    tmp = target.with_name(f"tmp-{target.name}")
    with saving(target):
        try:
            write(tmp)
            _flush(tmp)
            os.replace(tmp, target)
        finally:
            with suppress(OSError):
                tmp.unlink()


def write_text(target: Path, text: str) -> None:
    """Write a text. Names of files that are not UTF-8 get their bytes escaped."""
    content = text.encode("utf-8", errors="backslashreplace")
    write_file(target, lambda tmp: tmp.write_bytes(content))


def write_whole(target: Path, write: Write, into: bool = False, rescue: bool = False) -> None:
    """Write a directory: `target` exists only when it is complete. With `into` the files go into a
    `target` that exists already.

    Raises InputError if the disk is full or not writable; the old content stays. With `rescue` the
    weights are then kept elsewhere if possible, and the message says where.
    """
    tmp = target / "tmp-final" if into else target.with_name(f"tmp-{target.name}")
    try:
        with saving(target):
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
            write(tmp)
            for path in [*tmp.rglob("*"), tmp]:
                _flush(path)
            replace(target / COMPLETE if into else target, tmp)
            _flush(tmp.parent)
            if into:
                install(target)
    except Exception as error:
        where = rescued(tmp, write) if rescue else ""
        shutil.rmtree(tmp, ignore_errors=True)  # incomplete, and the disk may be full
        if isinstance(error, InputError):
            raise InputError(f"{error}{where}") from None
        if rescue:
            print(f"{target}: not saved{where}")
        raise


def rehearse(directory: Path, write: Write) -> None:
    """Write once into a directory inside `directory`, and delete it again. What can't be saved is
    found before hours of training. `write` leaves out large weights."""
    rehearsal = directory / "tmp-rehearsal"
    try:
        write_whole(rehearsal, write)
    except InputError:
        raise
    except Exception as error:  # a tokenizer, config or template is at fault
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{directory}: the result can't be saved there: {why[:300]}") from error
    finally:
        shutil.rmtree(rehearsal, ignore_errors=True)


def install(directory: Path) -> None:
    """Move the files in COMPLETE to their places: configs, then weights, then run.json, which marks
    the run as finished. If this is killed halfway, the next start moves the rest."""
    complete = directory / COMPLETE
    order = {".safetensors": 1, "run.json": 2}
    for path in sorted(complete.glob("*"), key=lambda p: order.get(p.name, order.get(p.suffix, 0))):
        if path.is_dir():  # os.replace can't replace an old directory of templates
            replace(directory / path.name)
        os.replace(path, directory / path.name)
    if complete.exists():
        _flush(directory)
        complete.rmdir()


def rescued(tmp: Path, write: Write) -> str:
    """Keep the weights of a save that failed. If they are complete in `tmp`, it gets another
    name. If not, they are written to the system's temporary directory. -> words that say where."""
    kept = tmp.with_name(tmp.name.replace("tmp", "rescued", 1))
    with suppress(Exception):
        if has_weights(tmp):
            replace(kept, tmp)
        else:
            shutil.rmtree(tmp, ignore_errors=True)
            kept = Path(tempfile.mkdtemp(prefix="nanoalign-"))
            with suppress(Exception):
                write(kept)
    if has_weights(kept):
        return f"; its weights are in {kept}; older checkpoints are kept"
    shutil.rmtree(kept, ignore_errors=True)
    return "; older checkpoints are kept"


def is_free(directory: Path) -> bool:
    """Is there no directory, or one that holds only what a crash has left incomplete?"""
    return not directory.exists() or all(p.name.startswith("tmp-") for p in directory.iterdir())


def has_weights(directory: Path) -> bool:
    """Does it hold an adapter's weights, or all weights of a model?"""
    adapter = directory / "adapter_model.safetensors"
    with suppress(InputError, OSError, SafetensorError):
        if not adapter.exists():
            return bool(stored_tensors(str(directory)))
        with safe_open(adapter, framework="pt"):
            return True
    return False


def replace(target: Path, new: Path | None = None) -> None:
    """Delete the directory `target`, if it exists, and rename `new` to it. The old one is renamed
    before it is deleted: a crash must not leave half of it under its name."""
    old = target.with_name(f"tmp-old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_symlink():
        target.unlink()  # the directory that it leads to may belong to somebody else
    elif target.exists():
        os.rename(target, old)
    if new:
        os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory. InputError if another run has locked it. The directory is
    created if it does not exist. The lock ends with its process, so a run that was killed blocks
    nobody. Where the system has no locks, nothing is locked."""
    path, old = directory / "tmp-lock", directory.exists()
    with saving(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = not os.fstat(file.fileno()).st_nlink  # the other run has just deleted it
        except OSError as error:
            busy = error.errno in (errno.EAGAIN, errno.EACCES)
        if busy:
            raise InputError(f"{directory}: another run is at work there")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                if not old and is_free(directory):  # the run has written nothing
                    shutil.rmtree(directory)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk. Not on Windows,
    which can neither open a directory nor flush a file that is open for reading."""
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
