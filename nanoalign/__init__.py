"""nanoalign: SFT, DPO and KTO with LoRA and 4-bit NF4, small enough to read in an evening.

The street, in reading order; a file imports only from files above it:

    files     JSON, JSONL, CSV          -> rows, each with its file and line
    chatml    messages                  -> ids and the mask of trained tokens
    packing   prompts and completions   -> one row without padding, and who sees whom in it
    data      rows (through layouts)    -> examples, their order, batches
    nf4, lora                           -> a 4-bit base, and the few weights that train on it
    logps     row and hidden states     -> log-probs of the trained tokens, without the logits
    losses    log-probs                 -> SFT, DPO and KTO losses
    model     a directory (a probe)     -> a model ready to train; back to a directory (adapter)
    reference                           -> the log-probs that DPO and KTO compare with
    train     the loop, with checkpoint and metrics
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
