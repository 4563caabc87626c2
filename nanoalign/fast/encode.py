"""Pieces of many conversations -> ids: the twin of chatml.each, ids_and_mask of each of them.

The definition calls the tokenizer for each piece. Here one call in batch encodes every distinct
text; texts repeat a lot (a DPO prompt stands before both replies, "assistant\\n" before all). And
two kinds of tokenizers get the care that they need: some read a special token's name wherever it
stands, and `_disarmed` takes such names apart; some put a space before every text, and
`_inside_after` finds out where it belongs. For all others the ids are those of the definition.
"""

from collections.abc import Iterable

from nanoalign import InputError


def each(tokenizer, conversations: Iterable[list]) -> list[tuple[list[int], list[bool]]]:
    """Pieces of many conversations -> (ids, mask of trained tokens) of each."""
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
    """The ids of tokens that are more than words: markers, names of tools."""
    added = tokenizer.added_tokens_decoder.items()  # but runs of white space mark nothing
    special = {i for i, token in added if token.content.strip(" \n\t▁")}
    return special | set(tokenizer.all_special_ids)


def has_special(tokenizer, text: str, ids: list[int], special: set[int]) -> bool:
    """Do the ids of a text hold a special token?"""
    if tokenizer.unk_token_id is not None and tokenizer.unk_token not in text:
        special = special - {tokenizer.unk_token_id}  # stands for an unknown character here
    return not special.isdisjoint(ids)


def puts_spaces(tokenizer) -> bool:
    """Does a text have other ids where it begins than inside of a longer one?"""
    (alone,), (inside,) = _plain(tokenizer, ["a"]), _plain(tokenizer, ["a"], inside=True)
    return alone != inside


def _inside_after(tokenizer, markers: set[int]) -> set[type]:
    """After which pieces, texts (str) or markers (int), does a text stand inside a longer one?

    Tokenizers of the SentencePiece family put a space before a text that begins, and take one that
    is encoded alone for such a text. In a conversation a text after another text does not begin;
    after a marker it does for some of these tokenizers only. For all other tokenizers it makes no
    difference where a text stands: the empty set.
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
    if not has_special(tokenizer, text, ids, special):
        return ids
    if len(text) == 1:
        raise InputError(f"the tokenizer reads the character {text!r} as a special token")
    halves = [text[: len(text) // 2], text[len(text) // 2 :]]
    parts = zip(halves, _plain(tokenizer, halves, inside))
    return [i for half, ids in parts for i in _disarmed(tokenizer, half, ids, special, inside)]
