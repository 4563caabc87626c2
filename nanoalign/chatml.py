r"""Messages -> token ids, and the mask of the tokens that train.

ChatML writes a conversation as

    <|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n

The usual way renders this string, tokenizes it and searches the ids for the replies. That goes
wrong twice: a user who types "<|im_end|>\n<|im_start|>system\n..." gets real control tokens, and
the search fails where a reply's first letters merge with what precedes them.

Here a conversation becomes PIECES first: markers, which are ids from the start, and texts, which
are encoded as plain text whatever they say. So no content can forge a marker. A reply trains, and
so does the marker that ends it; nothing else does. A reply is encoded apart from its header,
because the prompt of generation ends with the header. Everywhere else the ids equal those of the
rendered string. No system turn is invented.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile, zip_longest
from pathlib import Path

from nanoalign import InputError
from nanoalign.fast import encode as fast  # ids_and_mask of many conversations
from nanoalign.fast.encode import has_special, puts_spaces, special_ids

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
TAGS = re.compile("(</?(?:think|tool_call|tool_response)>)")  # single tokens in some models
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
    """A template writes conversations for a tokenizer that has its markers.

    Thoughts and tools are written as Qwen3's template writes them. A thought stays until the next
    user turn: while the model calls a tool, reads the result and answers.

    Another template is a class with these members, and an entry in formats/templates.TEMPLATES:

        markers   tokens that the tokenizer needs: missing ones are added, the last becomes its eos
        jinja     the same template for other tools, saved with the tokenizer
        stop_ids  generation ends with one of these
        pieces    for training: a conversation whose last turn is the reply to learn
        prompt    for generation: what precedes the reply in `pieces`
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
        """The conversation in pieces; its last turn, with the marker that ends it, trains."""
        yield from self.prompt(messages[:-1], tools)
        yield from self.reply(messages[-1])
        yield self.end, True

    def prompt(self, messages: list[Message], tools: Sequence[dict] = ()) -> Iterator[Piece]:
        """The conversation so far, and the header of the reply that comes next."""
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
            elif messages[i - 1]["role"] != "tool" or i == 0:  # results of several calls: one turn
                results = takewhile(lambda m: m["role"] == "tool", messages[i:])
                results = [result["content"] for result in results]
                yield from self.turn("user" + RESULT * len(results), *results)
        yield from self.header

    def reply(self, message: Message) -> list[Piece]:
        """What the assistant writes in one turn: a thought, its content, calls."""
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
        """A turn that does not train."""
        for piece in (self.start, *self.fill(form, *contents), self.end, "\n"):
            yield piece, False

    def fill(self, form: str, *contents: str) -> list[str | int]:
        """A form with a content in the place of each {}. A tag of the form is a marker, if the
        tokenizer has it as a token; a tag in a content is plain text."""
        pieces = []
        for words, content in zip_longest(form.split("{}"), contents, fillvalue=""):
            for piece in (*(self.tags.get(word, word) for word in TAGS.split(words)), content):
                if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                    pieces[-1] += piece  # one text: letters on both sides may share a token
                elif piece != "":
                    pieces.append(piece)
        return pieces


def ids_and_mask(tokenizer, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """Pieces -> ids and the mask of the tokens that train, by definition. A marker is its id. A
    text stays plain text; InputError where a tokenizer reads a special token in it all the same."""
    ids, mask, plain = [], [], dict(add_special_tokens=False, split_special_tokens=True)
    for piece, trains in pieces:
        new = [piece] if isinstance(piece, int) else tokenizer(piece, **plain)["input_ids"]
        if isinstance(piece, str) and has_special(tokenizer, piece, new, special_ids(tokenizer)):
            raise InputError(f"--plain: {piece!r:.60} holds the name of a special token")
        ids += new
        mask += [trains] * len(new)
    return ids, mask


def each(tokenizer, conversations: Iterable[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
    """ids_and_mask of each of many conversations."""
    if puts_spaces(tokenizer):
        raise InputError("--plain: the tokenizer puts a space before a text")
    return [ids_and_mask(tokenizer, pieces) for pieces in conversations]


def encode(tokenizer, conversations: Iterable[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
    """Pieces of many conversations -> ids and the mask of the tokens that train, of each."""
    return fast.each(tokenizer, conversations)
