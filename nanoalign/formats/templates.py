"""The templates there are: ChatML, the tokenizer's own, or one that you add.

What a template is stands in chatml.ChatML. The usual way with a tokenizer's own is to render a
conversation with and without its last reply, and to train on the difference whatever it is;
`NativeTemplate` gives the same guarantees as ChatML, or refuses.
"""

import re
from collections.abc import Iterator

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
        space = {True: r"\s*", False: ""}  # some tokens take the white space beside them
        names = [space[t.lstrip] + re.escape(t.content) + space[t.rstrip] for t in tokens]
        self.marker = re.compile(f"({'|'.join(names) or '(?!)'})")

        talk = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
        pieces = list(self.pieces(talk))
        self.stop_ids = sorted({p for p, trains in pieces if trains and isinstance(p, int)})
        ordinary = tokenizer(self._render(talk), add_special_tokens=False)["input_ids"]
        if encode(tokenizer, [pieces])[0][0] != ordinary:
            raise self._refusal("cannot be tokenized piece by piece")

    def pieces(self, messages: list[Message], first: int = 0) -> Iterator[Piece]:
        """As ChatML.pieces."""
        gaps = self._scaffold(messages)
        contents = self._contents(messages, gaps)
        text, closes = "", False  # text since the last marker; must a marker close a reply now?
        for i, gap in enumerate(gaps):
            if closes and not self.marker.match(gap):
                raise self._refusal("does not close a reply with a special token")
            for j, part in enumerate(self.marker.split(gap)):
                if j % 2 == 0:
                    text += part
                    continue
                if text:
                    yield text, False
                yield self.ids[part if part in self.ids else part.strip()], closes
                text, closes = "", False
            if i == len(messages):
                break
            if messages[i]["role"] != "assistant" or i < first:
                text += contents[i]
                continue
            space = self._space(messages[:i], text, _fill(gaps, contents, i))
            if len(text) > len(space):
                yield text[: len(text) - len(space)], False
            yield space + contents[i], True
            text, closes = "", True
        if text:
            yield text, False

    def prompt(self, messages: list[Message]) -> Iterator[Piece]:
        """As ChatML.prompt: what precedes a reply."""
        reply = {"role": "assistant", "content": "reply"}
        for piece, trains in self.pieces([*messages, reply], first=len(messages)):
            if trains:
                return
            yield piece, False

    def _scaffold(self, messages: list[Message]) -> list[str]:
        """What the template prints before, between and after the contents."""
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]  # private-use characters
        text = self._render([{**m, "content": mark} for m, mark in zip(messages, marks)])
        if re.findall("\ue000[0-9]+\ue001", text) != marks:
            raise self._refusal("drops, repeats or reorders messages")
        return re.split("\ue000[0-9]+\ue001", text)

    def _contents(self, messages: list[Message], gaps: list[str]) -> list[str]:
        """The contents as the template prints them: as they are, or stripped."""
        rendered, at, contents = self._render(messages), len(gaps[0]), []
        for message, gap in zip(messages, gaps[1:]):
            content = message["content"]
            if not rendered.startswith(content + gap, at):
                content = content.strip()
            contents.append(content)
            at += len(content + gap)
        if rendered != _fill(gaps, contents, len(messages)):
            raise self._refusal("rewrites the contents of messages")
        return contents

    def _space(self, before: list[Message], text: str, shown: str) -> str:
        """The white space between the prompt that generation gets and the reply."""
        prompt = self._render(before, add_generation_prompt=True)
        space = shown[len(prompt) :]
        if shown != prompt + space or space.strip() or not text.endswith(space):
            raise self._refusal("shows a reply's prompt otherwise than generation would")
        return space

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program, and says no in its own words
            why = " ".join(str(error).split())[:200]
            raise self._refusal(f"says: {why!r}") from None

    def _refusal(self, what: str) -> InputError:
        return InputError(f"--chat_template native: the tokenizer's template {what}; use chatml")


def _fill(gaps: list[str], contents: list[str], n: int) -> str:
    """What the template prints up to the n-th content."""
    return "".join(gap + c for gap, c in zip(gaps[:n], contents)) + gaps[n]


TEMPLATES = {"chatml": ChatML, "native": NativeTemplate}  # --chat_template
