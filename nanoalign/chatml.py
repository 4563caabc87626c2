r"""Messages -> token ids, and the mask of the tokens that train.

ChatML writes a conversation as

    <|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n

The usual way tokenizes this string and searches the ids for the replies. Then a user who types
"<|im_end|>" gets a real control token. And a reply is not found if one token covers its first
letters and the end of its header.

Here a conversation is a list of pieces. A marker is a token id from the start. A text is encoded as
plain text, so it can't forge a marker. The reply trains, and the marker that ends it. The ids are
those of the string, except that a reply is encoded apart from its header, as in generation.
A conversation without a system turn gets none.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile, zip_longest
from pathlib import Path

from nanoalign import InputError
from nanoalign.fast import encode as fast  # `each`, but quicker
from nanoalign.fast.encode import has_special, puts_spaces, special_ids

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
TAGS = re.compile("(</?(?:think|tool_call|tool_response)>)")  # some models have tokens for them
THOUGHT = "<think>\n{}\n</think>\n\n"
CALL = "<tool_call>\n{}\n</tool_call>"
RESULT = "\n<tool_response>\n{}\n</tool_response>"
TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

# {"role": one of ROLES, "content": text}. An assistant's message may also have a thought in
# "reasoning_content" and "tool_calls": [{"function": {"name": ..., "arguments": {...}}}].
Message = dict
Piece = tuple[str | int, bool]  # (a text or a marker's id, whether it trains)


class ChatML:
    """The ChatML template. Thoughts and tools look as in Qwen3's template: a thought is shown until
    the next user turn, so the model still sees it when it has called a tool and reads the result.
    Another template is a class with these members, listed in formats/templates.TEMPLATES:

        markers   the special tokens it needs; the last one becomes the tokenizer's eos
        jinja     the same template in Jinja; it is saved with the tokenizer for other programs
        stop_ids  the ids that end a generated reply
        pieces    a conversation for training; its last message is the reply that trains
        prompt    the same without that reply, for generation
    """

    markers = IM_START, IM_END
    jinja = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")
    train_on_thoughts = True

    def __init__(self, tokenizer):
        self.start, self.end = tokenizer.convert_tokens_to_ids(self.markers)
        self.stop_ids = [self.end]
        self.header = (self.start, False), ("assistant\n", False)
        added = tokenizer.get_added_vocab()
        self.tags = {word: i for word, i in added.items() if TAGS.fullmatch(word)}

    def pieces(self, messages: list[Message], tools: Sequence[dict] = ()) -> Iterator[Piece]:
        """The pieces of a conversation. Its last message and the marker after it train."""
        yield from self.prompt(messages[:-1], tools)
        yield from self.reply(messages[-1])
        yield self.end, True

    def prompt(self, messages: list[Message], tools: Sequence[dict] = ()) -> Iterator[Piece]:
        """The pieces of a conversation so far, and the header of the next reply."""
        if tools:
            system = [m["content"] for m in messages[:1] if m["role"] == "system"]
            listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            yield from self.turn("system\n" + "{}\n\n" * len(system) + TOOLS, *system, listed)
            messages = messages[len(system) :]
        asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                yield from self.header
                seen = message if i > asked else {**message, "reasoning_content": ""}
                yield from ((piece, False) for piece, _ in self.reply(seen))
                yield from ((self.end, False), ("\n", False))
            elif message["role"] != "tool":
                yield from self.turn(message["role"] + "\n{}", message["content"])
            elif messages[i - 1]["role"] != "tool" or i == 0:  # results in a row share one turn
                results = takewhile(lambda m: m["role"] == "tool", messages[i:])
                results = [result["content"] for result in results]
                yield from self.turn("user" + RESULT * len(results), *results)
        yield from self.header

    def reply(self, message: Message) -> list[Piece]:
        """The pieces of an assistant's message: its thought, its content, its calls."""
        thought, content = message.get("reasoning_content"), message["content"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        calls = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
        contents = [content] if content else []
        form = "\n".join(["{}"] * len(contents) + [CALL] * len(calls))
        contents += [json.dumps(call, ensure_ascii=False) for call in calls]
        before = []
        if thought and self.train_on_thoughts:
            form, contents = THOUGHT + form, [thought, *contents]
        elif thought:
            before = [(piece, False) for piece in self.fill(THOUGHT, thought)]
        return before + [(piece, True) for piece in self.fill(form, *contents)]

    def turn(self, form: str, *contents: str) -> Iterator[Piece]:
        """The pieces of a turn that does not train."""
        for piece in (self.start, *self.fill(form, *contents), self.end, "\n"):
            yield piece, False

    def fill(self, form: str, *contents: str) -> list[str | int]:
        """The pieces of a form whose {} are replaced with the contents. A tag in the form becomes a
        marker if the tokenizer has a token for it. A tag in a content stays plain text."""
        pieces = []
        for words, content in zip_longest(form.split("{}"), contents, fillvalue=""):
            for piece in (*(self.tags.get(word, word) for word in TAGS.split(words)), content):
                if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                    pieces[-1] += piece  # one text: a token may cover letters of both
                elif piece != "":
                    pieces.append(piece)
        return pieces


def ids_and_mask(tokenizer, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """Pieces -> token ids, and for each id whether it trains. InputError: some tokenizers read a
    special token's name in a text as that token. The twin in fast/encode.py can prevent it."""
    ids, mask, plain = [], [], dict(add_special_tokens=False, split_special_tokens=True)
    for piece, trains in pieces:
        new = [piece] if isinstance(piece, int) else tokenizer(piece, **plain)["input_ids"]
        if isinstance(piece, str) and has_special(tokenizer, piece, new, special_ids(tokenizer)):
            raise InputError(f"--plain: {piece!r:.60} holds the name of a special token")
        ids += new
        mask += [trains] * len(new)
    return ids, mask


def each(tokenizer, conversations: Iterable[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
    """ids_and_mask for each conversation. InputError: the tokenizer puts a space before a text."""
    if puts_spaces(tokenizer):
        raise InputError("--plain: the tokenizer puts a space before a text")
    return [ids_and_mask(tokenizer, pieces) for pieces in conversations]


def encode(tokenizer, conversations: Iterable[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
    """Pieces of many conversations -> (ids, mask) of each. With nanoalign.plain() `each` runs."""
    return fast.each(tokenizer, conversations)
