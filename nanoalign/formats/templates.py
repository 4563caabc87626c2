"""The templates there are: ChatML, the tokenizer's own, or one that you add.

What a template is stands in chatml.ChatML. The usual way with a tokenizer's own is to render a
conversation with and without its last reply, and to train on the difference whatever it is;
`NativeTemplate` gives the same guarantees as ChatML, or refuses.
"""

import re
from collections.abc import Iterator
from itertools import takewhile

from nanoalign import InputError
from nanoalign.chatml import ChatML, Message, Piece, encode


class NativeTemplate:
    """The tokenizer's own chat template, for a model tuned on another format than ChatML.

    The template is rendered with a placeholder for each content. What it prints around them is its
    scaffold: added tokens are markers there, and plain text in the contents. White space that
    generation would have to write before a reply (Mistral's) is part of the reply. Where the mask
    would be a guess the template is refused with an InputError: when it drops, repeats, reorders or
    rewrites contents (stripping them is fine), does not close a reply with a marker, or shows what
    precedes a reply otherwise than generation would.
    """

    markers, jinja = (), None  # the tokenizer has its own

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise InputError("--chat_template native: the tokenizer has no template; use chatml")
        self.tokenizer, self.ids = tokenizer, tokenizer.get_added_vocab()
        tokens = [t for t in tokenizer.added_tokens_decoder.values() if t.content.strip(" \n\t▁")]
        tokens.sort(key=lambda t: len(t.content), reverse=True)
        space = r"\s*"  # some tokens take the white space beside them
        names = [space * t.lstrip + re.escape(t.content) + space * t.rstrip for t in tokens]
        self.marker = re.compile(f"({'|'.join(names) or '(?!)'})")

        talk = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
        pieces = list(self.pieces(talk))
        self.stop_ids = sorted({p for p, trains in pieces if trains and isinstance(p, int)})
        ordinary = tokenizer(self._render(talk), add_special_tokens=False)["input_ids"]
        ids = encode(tokenizer, [pieces])[0][0]
        if ids != ordinary[: len(ids)]:
            raise self._refusal("cannot be tokenized piece by piece")

    def pieces(self, messages: list[Message], tools=()) -> Iterator[Piece]:
        """As ChatML.pieces."""
        gaps, contents = self._shown(messages)
        shown = text = ""  # all so far, and what of it follows the last marker or reply
        closes = False  # must a marker close a reply now?
        for i, (gap, content) in enumerate(zip(gaps, contents)):
            if closes and not self.marker.match(gap):
                raise self._refusal("does not close a reply with a special token")
            before, *parts = self.marker.split(gap)
            text += before
            for marker, after in zip(parts[::2], parts[1::2]):
                if text:
                    yield text, False
                trains = closes and i == len(messages)  # the gap after the last content
                yield self.ids[marker if marker in self.ids else marker.strip()], trains
                if trains:
                    return
                text, closes = after, False
            shown += gap
            if i < len(messages) and messages[i]["role"] == "assistant":
                space = self._space(messages[:i], text, shown)
                if text := text.removesuffix(space):
                    yield text, False
                yield space + content, i == len(messages) - 1
                text, closes = "", True
            else:
                text += content
            shown += content

    def prompt(self, messages: list[Message], tools=()) -> Iterator[Piece]:
        """As ChatML.prompt: what precedes a reply."""
        reply = {"role": "assistant", "content": "reply"}
        return takewhile(lambda piece: not piece[1], self.pieces([*messages, reply]))

    def _shown(self, messages: list[Message]) -> tuple[list[str], list[str]]:
        """What the template prints before each content and after the last, and the contents as it
        prints them: as they are, or stripped; the last is the end's, ""."""
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]  # private-use characters
        scaffold = self._render([{**m, "content": mark} for m, mark in zip(messages, marks)])
        if re.findall("\ue000[0-9]+\ue001", scaffold) != marks:
            raise self._refusal("drops, repeats or reorders messages")
        gaps = re.split("\ue000[0-9]+\ue001", scaffold)
        whole, shown, contents = self._render(messages), gaps[0], []
        for message, gap in zip(messages, gaps[1:]):
            content = message["content"]
            if not whole.startswith(content + gap, len(shown)):
                content = content.strip()
            contents.append(content)
            shown += content + gap
        if whole != shown:
            raise self._refusal("rewrites the contents of messages")
        return gaps, [*contents, ""]

    def _space(self, before: list[Message], text: str, shown: str) -> str:
        """The white space between the prompt that generation gets and the reply."""
        prompt = self._render(before, add_generation_prompt=True)
        space = shown[len(prompt) :]
        if shown != prompt + space or space.strip() or not text.endswith(space):
            raise self._refusal("shows a reply's prompt otherwise than generation would")
        return space

    def _render(self, messages: list[Message], **how) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **how)
        except Exception as error:  # a template is a program, and says no in its own words
            why = " ".join(str(error).split())[:200]
            raise self._refusal(f"says: {why!r}") from None

    def _refusal(self, what: str) -> InputError:
        return InputError(f"--chat_template native: the tokenizer's template {what}; use chatml")


TEMPLATES = {"chatml": ChatML, "native": NativeTemplate}  # --chat_template
