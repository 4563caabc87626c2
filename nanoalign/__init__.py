"""nanoalign: SFT, DPO and KTO with LoRA and 4-bit NF4, small enough to read in an evening.

The lesson is nine files, of which each imports only those above it (and its twin in fast/):

    chatml    a conversation              -> ids and the mask of the tokens that train
    packing   a batch of examples         -> one row without padding, and who sees whom in it
    lora      a frozen layer              -> the same with a small change that trains
    nf4       a weight                    -> four bits, and a layer that trains through them
    logps     a row                       -> log-probs of the trained tokens
    losses    log-probs                   -> SFT, DPO and KTO losses
    data      conversations               -> examples that fit; the order of an epoch
    model     a model of transformers     -> a policy; and text out of it
    train     a method's sums             -> one optimizer step after another

Behind the doors: fast/, the same numbers, sooner; formats/, other people's files; run/, what keeps
a run alive; tools/, commands; world.py, the built-in model and data.
"""

__version__ = "0.1.0"
__path__.append(f"{__path__[0]}/tools")  # python -m nanoalign.chat finds tools/chat.py


class InputError(Exception):
    """A mistake in what the user gave us: data, flags, a directory.

    The message is one line that says where, what, and what was expected. The scripts print it on
    standard error and exit with code 2; a traceback means a fault of ours.
    """

    def __str__(self) -> str:
        """A file's name, or what stands in it, must not break the line nor colour the terminal."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())
