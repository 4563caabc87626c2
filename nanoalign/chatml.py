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

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile, zip_longest
from pathlib import Path

from nanoalign.fast.encode import encode as encode  # ids_and_mask of many, and with care

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
TAGS = re.compile("(</?(?:think|tool_call|tool_response)>)")  # tokens of their own in some models
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

# {"role": one of ROLES, "content": text}; the assistant's may have a thought, "reasoning_content",
# and calls, "tool_calls": [{"type": "function", "function": {"name": ..., "arguments": {...}}}]
Message = dict
Piece = tuple[str | int, bool]  # a text or a marker's id; does it train?


class ChatML:
    """A template: how a conversation is written, for a tokenizer that has its markers.

    Thoughts and tools are written as Qwen3's template does. A thought stays while its question is
    being answered (a call, its result, the next reply), and is gone with the next user turn.

    Another template is a class with the same five members and an entry in
    formats/templates.TEMPLATES:

        markers   tokens that the tokenizer needs: missing ones are added, the last becomes its eos
        jinja     the template as other tools read it from the tokenizer that we save
        stop_ids  generation ends with one of these
        pieces    a conversation whose last turn is the reply to learn; training reads this
        prompt    what generation reads: all that precedes the reply in `pieces`
    """

    markers = IM_START, IM_END
    jinja = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")
    train_on_thoughts = True

    def __init__(self, tokenizer):
        self.start, self.end = tokenizer.convert_tokens_to_ids(self.markers)
        self.stop_ids = [self.end]
        added = tokenizer.get_added_vocab()
        self.tags = {word: i for word, i in added.items() if TAGS.fullmatch(word)}

    def pieces(self, messages: list[Message], tools: Sequence[dict] = ()) -> Iterator[Piece]:
        """The conversation in pieces; its last turn, with the marker that ends it, trains."""
        yield from self.prompt(messages[:-1], tools)
        yield from self.reply(messages[-1])
        yield self.end, True

    def prompt(self, messages: list[Message], tools: Sequence[dict] = ()) -> Iterator[Piece]:
        """The conversation so far, and the header of the reply that generation is to write."""
        if tools:
            system = [m["content"] for m in messages[:1] if m["role"] == "system"]
            listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            yield from self.turn("system\n" + "{}\n\n" * len(system) + TOOLS, *system, listed)
            messages = messages[len(system) :]
        asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                yield self.start, False
                yield "assistant\n", False  # apart from the reply, as in generation
                seen = message if i > asked else {**message, "reasoning_content": ""}
                yield from ((piece, False) for piece, _ in self.reply(seen))
                yield from ((self.end, False), ("\n", False))
            elif message["role"] != "tool":
                yield from self.turn(message["role"] + "\n{}", message["content"])
            elif messages[i - 1]["role"] != "tool" or i == 0:  # results of several calls: one turn
                results = takewhile(lambda m: m["role"] == "tool", messages[i:])
                results = [result["content"] for result in results]
                yield from self.turn("user" + RESULT * len(results), *results)
        yield self.start, False
        yield "assistant\n", False

    def reply(self, message: Message) -> list[Piece]:
        """What the assistant writes in one turn: a thought, words, calls."""
        thought, content = message.get("reasoning_content"), message["content"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        calls = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
        words = [content] if content else []
        form = "\n".join(["{}"] * len(words) + [CALL] * len(calls))
        words += [json.dumps(call, ensure_ascii=False) for call in calls]
        if not thought:
            return [(piece, True) for piece in self.fill(form, *words)]
        if self.train_on_thoughts:
            return [(piece, True) for piece in self.fill(THOUGHT + form, thought, *words)]
        alone = [(piece, False) for piece in self.fill(THOUGHT, thought)]
        return alone + [(piece, True) for piece in self.fill(form, *words)]

    def turn(self, form: str, *contents: str) -> Iterator[Piece]:
        """A turn that does not train."""
        for piece in (self.start, *self.fill(form, *contents), self.end, "\n"):
            yield piece, False

    def fill(self, form: str, *contents: str) -> list[str | int]:
        """The contents in the places {} of a form. A tag is a marker in the form, if the tokenizer
        has it as a token, and plain text in a content."""
        pieces = []
        for own, content in zip_longest(form.split("{}"), contents, fillvalue=""):
            pieces += [self.tags.get(word, word) for word in TAGS.split(own)] + [content]
        pieces = groupby(pieces, key=lambda piece: isinstance(piece, str))
        joined = (["".join(some)] if text else some for text, some in pieces)
        return [piece for some in joined for piece in some if piece != ""]


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
