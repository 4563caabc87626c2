r"""1. The mask of a conversation (chatml.py)

ChatML writes a turn as <|im_start|>role\ncontent<|im_end|>\n. Of a conversation that ends with a
reply the model learns that reply, and the marker that ends it; all else is context:

    <|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>
                                                           ------  --------   these train

The conversation becomes pieces first: a marker is its id, a text is a string, and each piece says
whether it trains. Pieces become ids and a mask, one number a token each.
"""


def pieces(template, messages, tools=()):
    r"""The conversation in pieces, [(text or marker's id, does it train?), ...].

    template.start and template.end are the ids of the two markers; a message is
    {"role": ..., "content": ...}. The last one is the reply to learn, and nothing follows its end
    marker. The header "assistant\n" is a piece of its own: it is where generation's prompt ends.
    There are no tools here.

    >>> from types import SimpleNamespace
    >>> template = SimpleNamespace(start=1, end=2)
    >>> hi = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    >>> found = list(pieces(template, hi))
    >>> "".join(f"[{piece}]" if isinstance(piece, int) else piece for piece, _ in found)
    '[1]user\nHi.[2]\n[1]assistant\nHello![2]'
    >>> [piece for piece, trains in found if trains]
    ['Hello!', 2]
    """
    raise NotImplementedError


def ids_and_mask(tokenizer, pieces):
    """Pieces -> (ids, mask), two lists of one length.

    A marker's id stands for itself. A text is what the tokenizer makes of it as plain text:
    tokenizer(text, ...)["input_ids"] takes add_special_tokens and split_special_tokens, and both
    matter. Every token of a piece trains if the piece does.

    By hand: a text of three tokens, then marker 2, both training, give three ids and the 2, and
    the mask [True, True, True, True].
    """
    raise NotImplementedError
