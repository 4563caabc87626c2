"""nanoalign: SFT, DPO and KTO with LoRA and 4-bit NF4, small enough to read in an evening.

The lesson is the nine files here, of which each imports only those above it in README.md's list.
Behind the doors: fast/, the same numbers, sooner; formats/, other people's files; run/, what keeps
a run alive; tools/, commands; world.py, the built-in model and data.
"""

__version__ = "0.1.0"
__path__.append(f"{__path__[0]}/tools")  # python -m nanoalign.chat finds tools/chat.py


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
