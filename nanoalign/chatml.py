r"""Messages -> token ids, and the mask of the tokens that train.

ChatML writes a conversation as

    <|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n

and training wants two things of it: the ids, and which of them are the assistant's own words. The
usual way renders one string, tokenizes it and searches the result for the replies. That goes wrong
twice: a user who types "<|im_end|>\n<|im_start|>system\n..." gets real control tokens, and a search
for token patterns fails wherever a reply's first letters merge with what precedes them.

Here a conversation becomes PIECES first: markers, which are ids from the start, and text, which is
encoded as plain text whatever it says. No content can forge a marker, and the mask is known before
a single token is: a reply and the marker that ends it train, nothing else does. A reply is encoded
apart from its header, because at inference the prompt ends with the header: train on what
generation will see. Everywhere else the ids equal those of the rendered string, and no system turn
is invented.
"""

from collections.abc import Iterator

from nanoalign.fast.encode import encode as encode  # ids_and_mask of many, and with care

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, str]  # {"role": one of ROLES, "content": text}
Piece = tuple[str | int, bool]  # a text or a marker's id; does it train?


class ChatML:
    """A template: how a conversation is written, for a tokenizer that has its markers.

    Another template is a class with the same five members and an entry in
    formats/templates.TEMPLATES:

        markers   tokens that the tokenizer needs: missing ones are added, the last becomes its eos
        jinja     the template as other tools read it from the tokenizer that we save
        stop_ids  generation ends with one of these
        pieces    a conversation in pieces; training reads this
        prompt    what generation reads: all that precedes a reply in `pieces`

    The first trained piece of a conversation is where its first trained reply begins.
    """

    markers = IM_START, IM_END
    jinja = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def __init__(self, tokenizer):
        self.start, self.end = tokenizer.convert_tokens_to_ids(self.markers)
        self.stop_ids = [self.end]

    def pieces(self, messages: list[Message], first: int = 0) -> Iterator[Piece]:
        """The conversation in pieces; the replies among messages[first:] train."""
        for i, message in enumerate(messages):
            trains = message["role"] == "assistant" and i >= first
            yield self.start, False
            if message["role"] == "assistant":
                yield "assistant\n", False
                yield message["content"], trains
            else:
                yield f"{message['role']}\n{message['content']}", False
            yield self.end, trains
            yield "\n", False

    def prompt(self, messages: list[Message]) -> Iterator[Piece]:
        """The conversation so far and the header of the reply that generation is to write."""
        yield from self.pieces(messages, first=len(messages))
        yield self.start, False
        yield "assistant\n", False


def ids_and_mask(tokenizer, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """Pieces -> ids and the mask of the tokens that train, by definition: a marker is its id, and a
    text what the tokenizer makes of it, the names of special tokens read like any other words."""
    ids, mask = [], []
    for piece, trains in pieces:
        plain = dict(add_special_tokens=False, split_special_tokens=True)
        new = [piece] if isinstance(piece, int) else tokenizer(piece, **plain)["input_ids"]
        ids += new
        mask += [trains] * len(new)
    return ids, mask
