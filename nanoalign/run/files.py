"""Files and directories that are written whole or not at all.

A run can be killed, and its disk can fill up, at any moment. So whatever it writes gets another
name first, with "tmp" in it, is flushed to the disk and then renamed, which a file system does in
one piece. A crash leaves the old content or the new, and at worst something with "tmp" in its name.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nanoalign import InputError


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """A disk that is full, or that may not be written to, is the user's to mend: InputError.

    safetensors and tokenizers raise errors of their own for it, with "(os error N)" in their text.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target}: not saved: {reason}; older checkpoints stand") from None


def write_text(target: Path, text: str) -> None:
    """Write a small file."""
    beside = target.with_name(f"tmp-{target.name}")
    with saving(target):
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)


def write_whole(target: Path, write: Callable[[Path], None], replace: bool = False) -> None:
    """`write` fills a directory; it appears as `target` when it is complete, or not at all.

    With `replace` its files move one by one into a `target` that exists, adapter or model last.
    Raises InputError when the disk is full or not writable; what was there before stands.
    """
    beside = target / "tmp-final" if replace else target.with_name(f"tmp-{target.name}")
    try:
        with saving(target):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            write(beside)
            files = [path for path in beside.rglob("*") if path.is_file()]
            for path in [*files, beside]:
                _flush(path)
            if replace:
                for path in sorted(files, key=lambda path: path.suffix == ".safetensors"):
                    os.replace(path, target / path.relative_to(beside))
            else:
                remove(target)
                os.rename(beside, target)
            _flush(beside.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def remove(directory: Path) -> None:
    """Delete a directory, if it is there; a crash in the midst of it must not leave half of it
    under its own name, where it would be taken for a whole one."""
    doomed = directory.with_name(f"tmp-old-{directory.name}")
    if directory.exists():
        os.rename(directory, doomed)
        shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """Wait until the disk holds a file's content, or a directory's list of names. Windows can open
    no directory, and wait for no file that is open for reading; there it is left to the system."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
