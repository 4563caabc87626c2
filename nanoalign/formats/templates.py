"""Chat templates: ChatML, the tokenizer's own (native), none, or one that you add.

chatml.ChatML says what members a template has. Other tools render a conversation with its last
reply and without it, and train on the difference, whatever that is. `NativeTemplate` checks the
difference, and gives the guarantees of ChatML or refuses the template.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from itertools import pairwise

from nanoalign import InputError
from nanoalign.chatml import ChatML, Message, Piece, encode

KWARGS, DATE = "nanoalign_template_kwargs", "nanoalign_date"  # in tokenizer_config.json
THOUGHT = "reasoning_content", "reasoning", "thinking"  # a template reads one of them
TYPES = {"object", "array", "string", "number", "integer", "boolean", "null", "function"}
BREAK = "\udfff"  # half of a surrogate pair, as Marked's stand-ins; no text holds one
DIRECTIVES = [f"%{letter}" for letter in "aAbBcdHIjmMpSUwWxXyY"]  # of strftime
STRFTIME_NOW = (  # a macro, because transformers passes no functions to a template
    "{%- macro strftime_now(format) -%}{%- set shown = namespace(text=format) -%}"
    "{%- for name in nanoalign_date -%}"
    "{%- set shown.text = shown.text.replace(name, nanoalign_date[name]) -%}"
    "{%- endfor -%}{{- shown.text -}}{%- endmacro %}\n"
)


class Marked:
    """Splits text at its markers, the names of added tokens, and hides them in other text. A token
    of white space is no marker; with `signs_only` a word ("tool") is none either."""

    def __init__(self, tokenizer, signs_only: bool = False):
        self.ids, space, sign = tokenizer.get_added_vocab(), r"\s*", r'[^\w\s"\\]'
        name = re.compile(rf"\s*{sign}(.*{sign})?\s*" if signs_only else ".*", re.DOTALL)
        tokens = [t for t in tokenizer.added_tokens_decoder.values() if t.content.strip(" \n\t▁")]
        tokens = [t for t in tokens if name.fullmatch(t.content)]
        tokens.sort(key=lambda t: len(t.content), reverse=True)
        # tokens with lstrip or rstrip include the white space beside them
        names = [space * t.lstrip + re.escape(t.content) + space * t.rstrip for t in tokens]
        self.marker = re.compile(f"({'|'.join(names) or '(?!)'})")
        self.names = "\n".join(t.content for t in tokens)
        signs = {sign for t in tokens for sign in (t.content.strip()[0], t.content.strip()[-1])}
        self.stand_ins = {ord(sign): 0xD800 + i for i, sign in enumerate(sorted(signs))}
        self.signs = {i: sign for sign, i in self.stand_ins.items()} | {ord(BREAK): None}

    def split(self, text: str) -> Iterator[str | int]:
        """Texts, and the ids of the markers between them."""
        for i, part in enumerate(self.marker.split(text)):
            if i % 2:
                yield self.ids[part if part in self.ids else part.strip()]
            elif part:
                yield part.translate(self.signs)

    def hide(self, value, schema: bool = False):
        """A copy of a value, in which no text can become a marker or a part of one when a template
        prints it. `split` undoes this.

        The first and last letters of markers get stand-ins. A text that is a part of a marker gets
        a BREAK ("end" would become a marker where a template prints "<|" and "|>" around it). In
        the `schema` of a tool, keys and types get none, because templates compare them.
        """
        if isinstance(value, str):
            text = value.strip()
            if text and text in self.names and not (schema and text in TYPES):
                value = re.sub(r"(?<=\S)", BREAK, value, count=1)
            return value.translate(self.stand_ins)
        if isinstance(value, dict):
            keys = [key.translate(self.stand_ins) if schema else self.hide(key) for key in value]
            return dict(zip(keys, (self.hide(v, schema) for v in value.values())))
        return [self.hide(v, schema) for v in value] if isinstance(value, list | tuple) else value


class NoTemplate:
    """For data that hold a template already. The names of added tokens in a string become these
    tokens, and nothing is added. All of a reply trains."""

    markers, jinja = (), None

    def __init__(self, tokenizer):
        self.marked = Marked(tokenizer)
        self.stop_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def pieces(self, messages: list[Message], tools: Sequence[dict] = ()) -> Iterator[Piece]:
        """As ChatML.pieces, for a reply, or a prompt and a reply."""
        *before, reply = messages
        if len(before) > 1 or tools or reply.keys() & {"reasoning_content", "tool_calls"}:
            fault = "takes a prompt and a reply as strings, and no turns, thoughts or tools"
            raise InputError(f"--chat_template none {fault}")
        yield from self.prompt(before)
        for piece in self.marked.split(reply["content"]):
            yield piece, True

    def prompt(self, messages: list[Message], tools: Sequence[dict] = ()) -> Iterator[Piece]:
        for message in messages:
            for piece in self.marked.split(message["content"]):
                yield piece, False


# Messages with which a template is tried.
ASK, ANSWER = ({"role": r, "content": c} for r, c in (("user", "Where?"), ("assistant", "Here.")))
CALL = {"name": "find_it", "arguments": {"city": "Paris."}}
CALL = {**ANSWER, "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "Somewhere."}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}}
FIND = {"name": "find_it", "description": "Finds it.", "parameters": {**CITY, "required": ["city"]}}
TOOLS = [{"type": "function", "function": FIND}]


def like(message: Message, i: int) -> Message:
    """A message of the same kind as the i-th of a conversation, with words that stand out."""
    calls = [
        {"name": f"call_{i}_{n}_", "arguments": {"city": f"city {i} {n}."}}
        for n in range(len(message.get("tool_calls", ())))
    ]
    return {
        "role": message["role"],
        "content": f"content {i}." if message["content"].strip() else "",
        **({"reasoning_content": f"thought {i}."} if "reasoning_content" in message else {}),
        **({"tool_calls": [{"type": "function", "function": c} for c in calls]} if calls else {}),
    }


class NativeTemplate:
    """The tokenizer's own chat template, for a model that was tuned on another format than ChatML.

    A reply is what the template writes after the prompt that generation gets, up to the marker that
    closes the reply. GLM's template writes no such marker; there the next turn's first one closes.
    Markers are the added tokens that the template itself writes. The strings of a conversation
    can't forge one. InputError for a template that leaves out what a conversation says, that closes
    no reply with a marker, or whose prompt in training differs from that in generation.

    --chat_template_kwargs and the date, which go to the template, are saved with the tokenizer.
    """

    markers, jinja = (), None  # the tokenizer has its own
    train_on_thoughts = True

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; use --chat_template chatml")
        self.tokenizer, self.marked = tokenizer, Marked(tokenizer, signs_only=True)
        self.rendered, self.checked = {}, set()  # caches: the same prompt is rendered several times
        self.kwargs = tokenizer.init_kwargs.get(KWARGS, {})
        day = date.fromisoformat(tokenizer.init_kwargs.get(DATE) or str(date.today()))
        self.date = {name: day.strftime(name) for name in DIRECTIVES}

        faults = []
        for answer in ANSWER, {**ANSWER, "reasoning_content": "A thought."}:
            talk = [ASK, answer, ASK, answer]
            try:
                self._check(talk, ())
                break
            except InputError as fault:
                faults.append(fault)
        else:
            raise faults[0]
        start, _, _ = self._written(talk, ()).rpartition(answer["content"])
        self.opening = start if answer is ANSWER else ""  # the template begins a reply with it

        # The marker that closes a reply; None if there is none. It is written at the end of a
        # conversation and before a next turn. Phi-3 adds another one at the end. gpt-oss writes
        # another one there, which is taken then.
        tails = map(self.marked.split, self._tails(answer, answer["content"], ASK))
        end, longer = ([piece for piece in tail if isinstance(piece, int)] for tail in tails)
        always = [marker for marker, other in zip(end, longer) if marker == other]
        self.stop = (always or end[:1] or [None])[-1]

        text = self._render(talk[:-1], (), prompt=True) + self._reply(talk, ())
        [(ids, _)] = encode(tokenizer, [[(piece, False) for piece in self.marked.split(text)]])
        if ids != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise refusal("cannot be tokenized piece by piece")

        ends = [list(self.pieces(talk))[-1][0]]
        for tools in (), TOOLS:
            with suppress(InputError):  # some templates know no calls
                ends.append(list(self.pieces([ASK, CALL], tools))[-1][0])
        self.stop_ids = list(dict.fromkeys(ends))

        # Other tools end a reply at eos_token. It stays if the template prints it elsewhere.
        shown, old = self._render([ASK, ANSWER], ()), tokenizer.eos_token
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.stop_ids[0])
        self.rendered.clear()
        if self._render([ASK, ANSWER], ()) != shown:
            tokenizer.eos_token = old
            self.rendered.clear()

    def pieces(self, messages: list[Message], tools: Sequence[dict] = ()) -> Iterator[Piece]:
        """As ChatML.pieces."""
        self._check(messages, tools)
        reply = self._reply(messages, tools)
        yield from self.prompt(messages[:-1], tools)
        start = 0 if self.train_on_thoughts else self._after_thought(reply, messages[-1])
        for piece in self.marked.split(reply[:start]):
            yield piece, False
        for piece in self.marked.split(reply[start:]):
            yield piece, True

    def prompt(self, messages: list[Message], tools: Sequence[dict] = ()) -> Iterator[Piece]:
        """As ChatML.prompt. The text is cut where earlier replies begin and each part is encoded by
        itself, as it was when that reply was generated."""
        text = self._render(messages, tools, prompt=True)
        earlier = [
            self._render(messages[:i], tools, prompt=True)
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and i
        ]
        ends = [len(prompt) for prompt in earlier if text.startswith(prompt)]
        for start, end in pairwise([0, *ends, len(text)]):
            for piece in self.marked.split(text[start:end]):
                yield piece, False

    def _reply(self, messages: list[Message], tools: Sequence[dict]) -> str:
        """The text that trains: the last turn up to the marker that closes it."""
        text, reply = self._written(messages, tools), messages[-1]
        if self.stop is None:
            text += self._next_turn("tool_calls" in reply)
        else:
            markers = list(self.marked.marker.finditer(text))
            closing = [m for m in markers if [*self.marked.split(m[0])] == [self.stop]] or markers
            text = text[: closing[-1].end()] if closing else ""
        for words in (reply["content"], reply.get("reasoning_content", "")):
            if self.marked.hide(words).strip() not in text:
                raise refusal("does not show a reply as it is, with a special token to close it")
        return text

    def _written(self, messages: list[Message], tools: Sequence[dict]) -> str:
        """What the template writes after the prompt of the last turn."""
        prompt = self._render(messages[:-1], tools, prompt=True)
        text = self._render(messages, tools)
        if not text.startswith(prompt):
            thinks, cure = "reasoning_content" in messages[-1], "--chat_template chatml"
            if "enable_thinking" in str(self.tokenizer.chat_template):
                switch = json.dumps({"enable_thinking": thinks})
                cure = f"--chat_template_kwargs '{switch}' or {cure}"
            raise refusal("shows a reply's prompt otherwise than generation would", cure)
        return text[len(prompt) :]

    def _after_thought(self, text: str, message: Message) -> int:
        """The index behind a reply's thought and the marker that closes the thought."""
        thought = self.marked.hide(message.get("reasoning_content", "")).strip()
        end = text.index(thought) + len(thought) if thought else 0
        closing = re.compile(rf"\s*{self.marked.marker.pattern}?\s*")
        return closing.match(text, end).end() if thought else 0

    def _tails(self, reply: Message, last: str, turn: Message) -> tuple[str, str]:
        """What the template writes after the `last` words of a reply: at the end of a conversation,
        and before a `turn`."""
        end, longer = (self._render(talk, ()) for talk in ([ASK, reply], [ASK, reply, turn]))
        return end.rpartition(last)[2], longer.rpartition(last)[2]

    def _next_turn(self, calls: bool) -> str:
        """The first marker of the turn after a reply. It closes a reply that no marker closes."""
        call, answer = (CALL, "Paris.", RESULT), (ANSWER, ANSWER["content"], ASK)
        end, longer = self._tails(*(call if calls else answer))
        start = longer.removeprefix(end)
        marker = self.marked.marker.search(start)
        if not marker or start[: marker.start()].strip():
            raise refusal("does not close a reply with a special token")
        return start[: marker.end()]

    def _check(self, messages: list[Message], tools: Sequence[dict]) -> None:
        """InputError if the template leaves out a part of a conversation of this kind. It may leave
        out earlier thoughts, and words beside earlier calls."""
        talk = [like(message, i) for i, message in enumerate(messages)]
        tools = TOOLS if tools else []
        if (kind := json.dumps([talk, tools])) in self.checked:
            return
        if len(self.checked) == 1024:
            self.checked.clear()
        prompt, reply = self._render(talk[:-1], tools, prompt=True), self._written(talk, tools)
        if tools and FIND["name"] not in prompt:
            raise refusal("does not show the tools")
        for i, message in enumerate(talk, 1):
            last = i == len(talk)
            calls = [call["function"] for call in message.get("tool_calls", ())]
            said = {
                "the tool calls": [w for c in calls for w in (c["name"], *c["arguments"].values())]
            }
            if last or not calls:
                said[f"what the {message['role']} says"] = [message["content"]]
            if last:
                said["the thought (reasoning_content)"] = [message.get("reasoning_content", "")]
            for what, words in said.items():
                if any(word not in (reply if last else prompt) for word in words):
                    raise refusal(f"does not show {what}")
        self.checked.add(kind)

    def _render(self, messages: list[Message], tools: Sequence[dict], prompt=False) -> str:
        """The text of a conversation; with `prompt`, as generation gets it: a reply comes next."""
        if prompt and not messages:
            raise refusal("has no prompt for a conversation that begins with the assistant")
        asked = json.dumps([messages, tools, prompt])
        if asked in self.rendered:
            return self.rendered[asked]
        if len(self.rendered) == 64:
            self.rendered.clear()
        kwargs = {"add_generation_prompt": prompt, **self.kwargs, "tokenize": False}
        hidden = list(map(self._hidden, messages))
        tools = self.marked.hide(list(tools), schema=True) or None
        try:
            kwargs["chat_template"] = template = self.tokenizer.get_chat_template(tools=tools)
            if "strftime_now" in template:
                kwargs |= {"chat_template": STRFTIME_NOW + template, "nanoalign_date": self.date}
            self.rendered[asked] = self.tokenizer.apply_chat_template(hidden, tools, **kwargs)
        except Exception as error:  # a template is a program, and may raise anything
            why = " ".join(str(error).split())[:200]
            raise refusal(f"says: {why!r}") from None
        return self.rendered[asked]

    def _hidden(self, message: Message) -> dict:
        """A message as the template gets it, without markers in its texts."""
        hide = self.marked.hide
        hidden = {"role": message["role"], "content": hide(message["content"])}
        if thought := message.get("reasoning_content"):
            hidden |= dict.fromkeys(THOUGHT, hide(thought))
        if calls := [call["function"] for call in message.get("tool_calls", ())]:
            calls = [{"name": hide(c["name"]), "arguments": hide(c["arguments"])} for c in calls]
            hidden["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return hidden


def refusal(what: str, cure: str = "--chat_template chatml") -> InputError:
    return InputError(f"the tokenizer's own chat template {what}; use {cure}")


TEMPLATES = {"chatml": ChatML, "native": NativeTemplate, "none": NoTemplate}  # --chat_template
