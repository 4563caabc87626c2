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

from collections.abc import Iterable, Iterator

from nanoalign import InputError

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


def encode(tokenizer, conversations: Iterable[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
    """Pieces of many conversations -> (ids, mask of trained tokens) of each.

    One batch call of the tokenizer encodes every distinct text; texts repeat a lot (a DPO prompt
    stands before both replies, "assistant\\n" before all).
    """
    conversations = list(conversations)
    markers = {p for pieces in conversations for p, _ in pieces if isinstance(p, int)}
    inside_after = _inside_after(tokenizer, markers)
    ids_of = {False: {}, True: {}}  # does the text stand inside another? -> text -> its ids
    for pieces in conversations:
        before = None
        for piece, _ in pieces:
            if isinstance(piece, str):
                ids_of[type(before) in inside_after][piece] = []
            before = piece

    special = markers | set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for inside, known in ids_of.items():
        for text, ids in zip(known, _plain(tokenizer, list(known), inside)):
            if not special.isdisjoint(ids):
                ids = _disarmed(tokenizer, text, ids, special, str in inside_after)
            known[text] = ids

    encoded = []
    for pieces in conversations:
        ids, mask, before = [], [], None
        for piece, trains in pieces:
            new = [piece] if isinstance(piece, int) else ids_of[type(before) in inside_after][piece]
            ids += new
            mask += [trains] * len(new)
            before = piece
        encoded.append((ids, mask))
    return encoded


def _inside_after(tokenizer, markers: set[int]) -> set[type]:
    """After which pieces, texts (str) or markers (int), does a text stand inside a longer one?

    Tokenizers of the SentencePiece family put a space before a text that begins, and take one that
    is encoded alone for such a text. In a conversation a text after another text does not begin;
    after a marker it does for some of these tokenizers only. For all other tokenizers it makes no
    difference where a text stands: the empty set.
    """
    (alone,), (inside,) = _plain(tokenizer, ["a"]), _plain(tokenizer, ["a"], inside=True)
    if alone == inside:
        return set()
    for marker in tokenizer.convert_ids_to_tokens(list(markers)[:1]):
        _, *follows = tokenizer(marker + "a", add_special_tokens=False)["input_ids"]
        if follows != alone:
            return {str, int}
    return {str}


def _plain(tokenizer, texts: list[str], inside: bool = False) -> list[list[int]]:
    """The ids of texts, in which the names of special tokens are words like any other.

    With `inside` each is encoded behind "a\\n", whose ids are then taken off: if the tokenizer puts
    a space before a beginning, it goes there. (A text that merges with the newline goes without.)
    """
    if not texts:
        return []

    def read(texts):
        kind = dict(add_special_tokens=False, split_special_tokens=True)
        return tokenizer(texts, **kind, return_attention_mask=False)["input_ids"]

    if not inside:
        return read(texts)
    start, *whole = read(["a\n", *("a\n" + text for text in texts)])
    return [
        ids[len(start) :] if ids[: len(start)] == start else read([text])[0]
        for text, ids in zip(texts, whole)
    ]


def _disarmed(tokenizer, text: str, ids: list[int], special: set[int], inside: bool) -> list[int]:
    """The ids of a text that holds no special token, though its own `ids` do.

    The tokenizer matches added tokens that are not declared special even in plain text, and a
    vocabulary may reach one by merges. Half a name is no name: halve until no part has one.
    """
    if tokenizer.unk_token_id is not None and tokenizer.unk_token not in text:
        special = special - {tokenizer.unk_token_id}  # stands for an unknown character here
    if special.isdisjoint(ids):
        return ids
    if len(text) == 1:
        raise InputError(f"the tokenizer reads the character {text!r} as a special token")
    halves = [text[: len(text) // 2], text[len(text) // 2 :]]
    parts = zip(halves, _plain(tokenizer, halves, inside))
    return [i for half, ids in parts for i in _disarmed(tokenizer, half, ids, special, inside)]
