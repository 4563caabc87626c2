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

`NativeTemplate` gives the same guarantees for a tokenizer's own template, or refuses.
"""

import re
from collections.abc import Iterable, Iterator

from nanoalign import InputError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML_JINJA = (  # for the tools that read the tokenizer we save
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, str]  # {"role": one of ROLES, "content": text}
Piece = tuple[str | int, bool]  # text to encode or a special token's id; does it train?


class ChatML:
    """The ChatML template, for a tokenizer that has its two markers."""

    def __init__(self, tokenizer):
        self.start, self.end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
        self.stop_ids = [self.end]  # generation ends with one of these

    def pieces(self, messages: list[Message], first: int = 0) -> Iterator[Piece]:
        """The conversation in pieces; the replies among messages[first:] train."""
        for i, message in enumerate(messages):
            reply = message["role"] == "assistant"
            yield self.start, False
            if reply:
                yield "assistant\n", False
                yield message["content"], i >= first
            else:
                yield f"{message['role']}\n{message['content']}", False
            yield self.end, reply and i >= first
            yield "\n", False

    def prompt(self, messages: list[Message]) -> Iterator[Piece]:
        """The conversation so far and the header of the reply that generation is to write."""
        yield from self.pieces(messages, first=len(messages))
        yield self.start, False
        yield "assistant\n", False


class NativeTemplate:
    """The tokenizer's own chat template, for a model tuned on another format than ChatML.

    The template is rendered with a placeholder for each content. What it prints around them is its
    scaffold, where special tokens are meant; in the contents they are not. Where the mask would be
    a guess the template is refused with an InputError: when it drops, repeats, reorders or rewrites
    contents, does not close a reply with a special token, or shows what precedes a reply otherwise
    than generation would.
    """

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise InputError(
                "--chat_template native: the tokenizer has no chat template of its own"
            )
        self.tokenizer = tokenizer
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        longest_first = sorted(special, key=len, reverse=True)
        self.special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        reply = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        self.stop_ids = [p for p, trained in self.pieces(reply) if trained and p != "a"]

    def pieces(self, messages: list[Message], first: int = 0) -> Iterator[Piece]:
        """As ChatML.pieces."""
        contents = [message["content"] for message in messages]
        gaps = self._scaffold(messages)
        rendered = self._render(messages)
        if _interleave(gaps, contents) != rendered:
            contents = [content.strip() for content in contents]  # many templates do that
            if _interleave(gaps, contents) != rendered:
                raise self._refusal("rewrites the contents of messages")

        text = ""  # ordinary text since the last special token: encoded in one go
        closing = None  # the special token that has to come next, after a reply
        for i, gap in enumerate(gaps):
            for part in self.special.split(gap):
                if part and self.special.fullmatch(part):
                    if text:
                        yield text, False
                        text = ""
                    yield self.tokenizer.convert_tokens_to_ids(part), closing is True
                    closing = None
                elif part:
                    if closing is not None:
                        raise self._refusal("does not close a reply with a special token")
                    text += part
            if i == len(messages):
                break
            if messages[i]["role"] != "assistant":
                text += contents[i]
                continue
            if self._render(messages[:i], True) != _interleave(gaps[: i + 1], contents[:i]):
                raise self._refusal("shows a reply's prompt otherwise than generation would")
            if text:
                yield text, False
                text = ""
            yield contents[i], i >= first
            closing = i >= first
        if closing is not None:
            raise self._refusal("does not close a reply with a special token")
        if text:
            yield text, False

    def prompt(self, messages: list[Message]) -> Iterator[Piece]:
        """As ChatML.prompt: what precedes an empty reply."""
        reply = {"role": "assistant", "content": "\ue002"}
        for piece, trained in self.pieces([*messages, reply], first=len(messages)):
            if trained:
                return
            yield piece, False

    def _scaffold(self, messages: list[Message]) -> list[str]:
        """What the template prints before, between and after the contents."""
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]  # private-use characters
        text = self._render([{**m, "content": mark} for m, mark in zip(messages, marks)])
        if re.findall("\ue000[0-9]+\ue001", text) != marks:
            raise self._refusal("drops, repeats or reorders messages")
        return re.split("\ue000[0-9]+\ue001", text)

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program, and says no in its own words
            raise InputError(f"the tokenizer's chat template fails here: {error}") from None

    def _refusal(self, what: str) -> InputError:
        return InputError(f"--chat_template native: the tokenizer's template {what}; use chatml")


TEMPLATES = {"chatml": ChatML, "native": NativeTemplate}


def _interleave(gaps: list[str], contents: list[str]) -> str:
    return gaps[0] + "".join(c + gap for c, gap in zip(contents, gaps[1:]))


def encode(tokenizer, conversations: Iterable[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
    """Pieces of many conversations -> (ids, mask of trained tokens) of each.

    One batch call of the tokenizer encodes every distinct text; texts repeat a lot (a DPO prompt
    stands before both replies, "assistant\\n" before all).
    """
    conversations = list(conversations)
    texts = list({p: None for pieces in conversations for p, _ in pieces if isinstance(p, str)})
    plain = dict(add_special_tokens=False, split_special_tokens=True)
    ids_of = dict(zip(texts, tokenizer(texts, **plain)["input_ids"])) if texts else {}

    # split_special_tokens keeps special tokens from being read in text. A vocabulary can still hold
    # one as an ordinary or a non-special token: such a text goes character by character.
    special = set(tokenizer.all_special_ids)
    special |= {p for pieces in conversations for p, _ in pieces if isinstance(p, int)}
    for text, ids in ids_of.items():
        if not special.isdisjoint(ids):
            ids_of[text] = sum(tokenizer(list(text), **plain)["input_ids"], [])

    encoded = []
    for pieces in conversations:
        ids, mask = [], []
        for piece, trained in pieces:
            new = [piece] if isinstance(piece, int) else ids_of[piece]
            ids += new
            mask += [trained] * len(new)
        encoded.append((ids, mask))
    return encoded
