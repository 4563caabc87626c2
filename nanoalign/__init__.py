"""nanoalign: SFT, DPO and KTO with LoRA and 4-bit NF4, small enough to read in an evening.

The lesson is the nine files here, of which each imports only those above it in README.md's list.
Behind the doors: fast/, the same numbers, sooner; formats/, other people's files; run/, what keeps
a run alive; tools/, commands; world.py, the built-in model and data.
"""

from importlib import import_module

__version__ = "0.1.0"
__path__.append(f"{__path__[0]}/tools")  # python -m nanoalign.chat finds tools/chat.py


TWINS = {  # a definition of the lesson -> the file in fast/ with what runs in its place
    "chatml.ids_and_mask": "encode",
    "packing.attention": "attention",
    "lora.Dropout": "dropout",
    "nf4.quantize": "nf4",
    "nf4.dequantize": "nf4",
    "nf4.double_dequantize": "nf4",
    "logps.token_logps": "head",
}
_definitions: dict[str, object] = {}  # as the lesson has them


def plain(on: bool = True, **own) -> None:
    """Put all twins aside: from here on the lesson's definitions compute, slower, and can be
    stepped through. A function of your own may take the place of one: plain(attention=mine).
    plain(False) puts everything back. Unknown names raise InputError.
    """
    names = {path.rpartition(".")[2] for path in TWINS}
    if unknown := own.keys() - names:
        raise InputError(
            f"plain: no definition {min(unknown)}; there are {', '.join(sorted(names))}"
        )
    for path, twin in TWINS.items():
        lesson, _, name = path.rpartition(".")
        module = import_module(f"nanoalign.{lesson}")
        definition = _definitions.setdefault(path, getattr(module, name))
        setattr(module, name, own.get(name, definition))
        module.fast = module if on else import_module(f"nanoalign.fast.{twin}")


def one_line(text: str) -> str:
    """A text for the terminal: a file's name, or what stands in it, must not break the line, move
    the cursor or set colours."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class InputError(Exception):
    """A mistake in what the user gave us: data, flags, a directory.

    The message is one line that says where, what, and what was expected. The scripts print it on
    standard error and exit with code 2; a traceback means a fault of ours.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class Stopped(BaseException):
    """A run was stopped, and has said so: its command ends with the exit code `code`. It is no
    Exception, so that nothing in between goes on."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code
