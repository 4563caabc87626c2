"""Pieces of conversations -> ids, and the mask of the tokens that train.

A PIECE is a marker, which is an id already, or a text, which becomes the ids of plain text. Two
kinds of tokenizers need care. Some read a special token's name wherever it stands: `_disarmed`
takes such names apart. Some put a space before every text: `_leads` keeps it where it belongs.
"""

from collections.abc import Iterable

from nanoalign import InputError

Piece = tuple[str | int, bool]  # a text or a marker's id; does it train?


def encode(tokenizer, conversations: Iterable[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
    """Pieces of many conversations -> (ids, mask of trained tokens) of each.

    One batch call of the tokenizer encodes every distinct text; texts repeat a lot (a DPO prompt
    stands before both replies, "assistant\\n" before all).
    """
    conversations = list(conversations)
    markers = {p for pieces in conversations for p, _ in pieces if isinstance(p, int)}
    leads = _leads(tokenizer, markers)
    ids_of = {lead: {} for lead in leads.values()}  # lead -> text -> ids
    for pieces in conversations:
        before = None
        for piece, _ in pieces:
            if isinstance(piece, str):
                ids_of[leads[type(before)]][piece] = []
            before = piece

    special = markers | set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for lead, known in ids_of.items():
        for text, ids in zip(known, _plain(tokenizer, list(known), lead)):
            clean = special.isdisjoint(ids)
            known[text] = ids if clean else _disarmed(tokenizer, text, ids, special, leads[str])

    encoded = []
    for pieces in conversations:
        ids, mask, before = [], [], None
        for piece, trains in pieces:
            new = [piece] if isinstance(piece, int) else ids_of[leads[type(before)]][piece]
            ids += new
            mask += [trains] * len(new)
            before = piece
        encoded.append((ids, mask))
    return encoded


def _leads(tokenizer, markers: set[int]) -> dict[type, str]:
    """What to put before a text, and take off again, when it follows a text, a marker or nothing.

    For most tokenizers nothing. Those of the SentencePiece family put a space before what they take
    for a beginning: that is right at the real one only, and after a marker only with some of them.
    """
    lead, leads = "a\n", {type(None): "", int: "", str: ""}
    (alone,), (inside,) = _plain(tokenizer, ["a"]), _plain(tokenizer, ["a"], lead)
    if alone != inside:
        leads[str] = lead
        for name in tokenizer.convert_ids_to_tokens(list(markers)[:1]):
            _, *behind = tokenizer(name + "a", add_special_tokens=False)["input_ids"]
            leads[int] = "" if behind == alone else lead
    return leads


def _plain(tokenizer, texts: list[str], lead: str = "") -> list[list[int]]:
    """The ids of texts, the names of special tokens read like any other words."""
    if not texts:
        return []

    def read(texts):
        kind = dict(add_special_tokens=False, split_special_tokens=True)
        return tokenizer(texts, **kind, return_attention_mask=False)["input_ids"]

    if not lead:
        return read(texts)
    start, *whole = read([lead, *(lead + text for text in texts)])
    return [  # a text may merge with the lead, though hardly: then it goes without
        ids[len(start) :] if ids[: len(start)] == start else read([text])[0]
        for text, ids in zip(texts, whole)
    ]


def _disarmed(tokenizer, text: str, ids: list[int], special: set[int], lead: str) -> list[int]:
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
    parts = zip(halves, _plain(tokenizer, halves, lead))
    return [i for half, ids in parts for i in _disarmed(tokenizer, half, ids, special, lead)]
