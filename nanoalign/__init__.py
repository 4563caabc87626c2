"""nanoalign: SFT, DPO and KTO with LoRA and 4-bit NF4, small enough to read in an evening.

The lesson is nine files in this folder. Each imports only those above it in README.md's list. The
other folders: fast/ has faster twins of definitions, formats/ reads and writes other people's
files, run/ has the rest of a training run, tools/ has commands. world.py is the built-in model.
"""

from importlib import import_module

__version__ = "0.1.0"
__path__.append(f"{__path__[0]}/tools")  # python -m nanoalign.chat finds tools/chat.py


TWINS = {  # {definition of the lesson: the file in fast/ that replaces it in training}
    "chatml.ids_and_mask": "encode",
    "packing.attention": "attention",
    "lora.Dropout": "dropout",
    "nf4.quantize": "nf4",
    "nf4.dequantize": "nf4",
    "nf4.double_dequantize": "nf4",
    "logps.token_logps": "head",
}
_definitions: dict[str, object] = {}  # the lesson's, which `plain` may have replaced


def plain(on: bool = True, **replacements) -> None:
    """Use the lesson's definitions instead of their twins. They are slower, and a debugger can step
    through them. Your own function can replace a definition: plain(attention=mine). plain(False)
    goes back to the twins. InputError: there is no such definition.
    """
    names = {path.rpartition(".")[2] for path in TWINS}
    if unknown := replacements.keys() - names:
        raise InputError(
            f"plain: no definition {min(unknown)}; there are {', '.join(sorted(names))}"
        )
    for path, twin in TWINS.items():
        lesson, _, name = path.rpartition(".")
        module = import_module(f"nanoalign.{lesson}")
        definition = _definitions.setdefault(path, getattr(module, name))
        setattr(module, name, replacements.get(name, definition))
        module.fast = module if on else import_module(f"nanoalign.fast.{twin}")


def one_line(text: str) -> str:
    """A text for the terminal, with control characters escaped. Otherwise a file's name or content
    could break the line, move the cursor or set colours."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class InputError(Exception):
    """A mistake in the user's data, flags or directories.

    The message is one line that says where, what, and what was expected. The scripts print it on
    standard error and exit with code 2. (A traceback is a bug of this program.)
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class Stopped(BaseException):
    """A run was stopped and has printed a message. Its command ends with exit code `code`. It is a
    BaseException, or an `except Exception` on the way would catch it."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code
