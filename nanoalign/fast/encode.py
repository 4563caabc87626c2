"""The twin of chatml.each. It encodes each distinct text once, and in one call.

The definition calls the tokenizer for each piece, but texts repeat: a DPO prompt comes before both
replies, and "assistant\\n" before every reply.

It also takes two kinds of tokenizers that the definition refuses. Some read the name of a special
token in a text as that token: `_disarmed` prevents it. Some put a space before every text:
`_inside_after` finds out where the space belongs. For all other tokenizers the ids are the same.
"""

from collections.abc import Iterable

from nanoalign import InputError


def each(tokenizer, conversations: Iterable[list]) -> list[tuple[list[int], list[bool]]]:
    """Pieces of many conversations -> (ids, mask of trained tokens) of each."""
    conversations = list(conversations)
    markers = {p for pieces in conversations for p, _ in pieces if isinstance(p, int)}
    inside_after = _inside_after(tokenizer, markers)
    ids_of = {False: {}, True: {}}  # {is it inside of a longer text?: {text: its ids}}
    for pieces in conversations:
        before = None
        for piece, _ in pieces:
            if isinstance(piece, str):
                ids_of[type(before) in inside_after][piece] = []
            before = piece

    special = markers | special_ids(tokenizer)
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


def special_ids(tokenizer) -> set[int]:
    """The ids that a text must not contain: special tokens and added tokens, such as <tool_call>.
    Added tokens that are white space only do no harm."""
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.content.strip(" \n\t▁")}
    return special | set(tokenizer.all_special_ids)


def has_special(tokenizer, text: str, ids: list[int], special: set[int]) -> bool:
    """Do the ids of a text hold a special token?"""
    if tokenizer.unk_token_id is not None and tokenizer.unk_token not in text:
        special = special - {tokenizer.unk_token_id}  # here it is some unknown character
    return not special.isdisjoint(ids)


def puts_spaces(tokenizer) -> bool:
    """Does a text have other ids at a beginning than inside of a longer text?"""
    (alone,), (inside,) = _plain(tokenizer, ["a"]), _plain(tokenizer, ["a"], inside=True)
    return alone != inside


def _inside_after(tokenizer, markers: set[int]) -> set[type]:
    """After which pieces is a text encoded without a space before it: texts (str), markers (int)?

    Tokenizers of the SentencePiece family put a space before the beginning of a text. In a
    conversation a text after another text gets none. After a marker it depends on the tokenizer.
    Other tokenizers never add a space: the set is empty.
    """
    if not puts_spaces(tokenizer):
        return set()
    (alone,) = _plain(tokenizer, ["a"])
    for marker in tokenizer.convert_ids_to_tokens(list(markers)[:1]):
        _, *follows = tokenizer(marker + "a", add_special_tokens=False)["input_ids"]
        if follows != alone:
            return {str, int}
    return {str}


def _plain(tokenizer, texts: list[str], inside: bool = False) -> list[list[int]]:
    """The ids of texts. The names of special tokens are encoded as plain words.

    With `inside` each text is encoded after "a\\n", and the ids of "a\\n" are removed. So a space
    that the tokenizer adds comes before "a". If the text merges with the newline, this is not
    possible, and it is encoded alone.
    """
    if not texts:
        return []

    def read(texts):
        kind = dict(add_special_tokens=False, split_special_tokens=True)
        return tokenizer(texts, **kind, return_attention_mask=False)["input_ids"]

    if not inside:
        return read(texts)
    start, *longer = read(["a\n", *("a\n" + text for text in texts)])
    return [
        ids[len(start) :] if ids[: len(start)] == start else read([text])[0]
        for text, ids in zip(texts, longer)
    ]


def _disarmed(tokenizer, text: str, ids: list[int], special: set[int], inside: bool) -> list[int]:
    """Ids of a text without special tokens. `ids` are those that the tokenizer gave for it.

    A tokenizer may read an added token's name in plain text as that token, if the token is not
    declared special, or if merges lead to it. Then the text is cut in two halves, until no half
    contains a name.
    """
    if not has_special(tokenizer, text, ids, special):
        return ids
    if len(text) == 1:
        raise InputError(f"the tokenizer reads the character {text!r} as a special token")
    halves = [text[: len(text) // 2], text[len(text) // 2 :]]
    parts = zip(halves, _plain(tokenizer, halves, inside))
    return [i for half, ids in parts for i in _disarmed(tokenizer, half, ids, special, inside)]
