"""The tokenizer's own template, none, and one that is added: ids, replies, and no forged turn."""

import importlib.util
import json
import re
import shutil
from datetime import date
from pathlib import Path

import pytest
import torch
from conftest import TEXT, make_tokenizer, tiny
from hypothesis import given
from hypothesis import strategies as st
from scripts import call, metrics, tensors, write_rows
from test_chatml import FUZZ, ORDINARY, content, decoded, make_bpe, sentencepiece, spans, talk
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nanoalign import InputError
from nanoalign.chatml import IM_END, IM_START, ChatML, encode
from nanoalign.formats.layouts import DPO, SFT, read_examples
from nanoalign.formats.templates import DATE, KWARGS, TEMPLATES, NativeTemplate, NoTemplate
from nanoalign.run.policy import load_tokenizer


def ids_and_mask(tokenizer, template, messages, tools=()):
    """Of the text in which the last turn trains."""
    [(ids, mask)] = encode(tokenizer, [list(template.pieces(messages, tools))])
    assert len(ids) == len(mask)
    return ids, mask


def trained(tokenizer, template, messages, tools=()):
    """The text that trains: one run at the end."""
    ids, mask = ids_and_mask(tokenizer, template, messages, tools)
    [run] = spans(ids, mask)
    assert mask[-1] and ids[-1] in template.stop_ids
    return decoded(tokenizer, run)


def rendered(tokenizer, messages, tools=(), **how):
    """The ids that the tokenizer's own template gives. Some read a thought by another name."""
    shown = [
        {**m, "thinking": m["reasoning_content"]} if "reasoning_content" in m else m
        for m in messages
    ]
    return tokenizer.apply_chat_template(shown, tools=list(tools) or None, return_dict=False, **how)


def turn(role, content, thought=None, calls=()):
    made = {"role": role, "content": content}
    if thought is not None:
        made["reasoning_content"] = thought
    if calls:
        functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
        made["tool_calls"] = [{"type": "function", "function": f} for f in functions]
    return made


def texts(messages):
    """Of each reply: the conversation up to it."""
    return [messages[: i + 1] for i, m in enumerate(messages) if i and m["role"] == "assistant"]


# --------------------------------------------------------------------------------- native templates

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role\n not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (  # v0.1: no space before a reply; v0.3 has one, and strips
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ SPACE + eos_token }}{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MERGES_SYSTEM = (  # into the first user turn
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + (s if loop.first else '') + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DEFAULT_SYSTEM = (  # SmolLM2's: a system turn where there is none
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}" + ChatML.jinja
)
OPEN = (  # GLM's kind: a reply is closed by the turn that follows
    "[gMASK]{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% set ns = namespace(u=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.u = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>\n<think>' }}"
    "{% if loop.index0 > ns.u %}{{ m.reasoning_content }}{% endif %}{{ '</think>\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}"
    "{{ '<arg_key>' + k + '</arg_key><arg_value>' }}{{ v if v is string else v | tojson }}"
    "{{ '</arg_value>' }}{% endfor %}{{ '</tool_call>' }}{% endfor %}"
    "{% else %}{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\n' + m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>' }}"
    "{% endif %}{% endif %}"
)
CHANNELS = (  # gpt-oss's kind: a header belongs to a reply, and the last one closes otherwise
    "{{ '<|start|>system<|message|>' + strftime_now('%Y-%m-%d') }}"
    "{% for t in tools or [] %}{{ t.function.name + t.function.description }}"
    "{% for k, v in t.function.parameters.properties.items() %}"
    "{{ k + (': string' if v.type == 'string' else ': any') }}{% endfor %}{% endfor %}"
    "{{ '<|end|>' }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and (loop.last or m.tool_calls) %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}"
    "{{ '<|start|>assistant to=' + c.name + '<|channel|>commentary<|message|>' + "
    "c.arguments | tojson + '<|call|>' }}{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' }}"
    "{{ m.content | tojson if m.role == 'tool' else m.content }}{{ '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
THINKS = ChatML.jinja  # Qwen3's kind
WRITES_SPACE = MISTRAL.replace("SPACE", "' ' + m['content'] | trim")
GOOD = {
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL.replace("SPACE", "m['content']"),
    "mistral v0.3": WRITES_SPACE,
    "zephyr": ZEPHYR,
    "system into user": MERGES_SYSTEM,
    "chatml": ChatML.jinja,
    "default system": DEFAULT_SYSTEM,
}
SPECIALS = ["<s>", "</s>", IM_START, IM_END, "<|start_header_id|>", "<|end_header_id|>"]
SPECIALS += ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>"]
SPECIALS += ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "[gMASK]"]
SPECIALS += [f"<{end}{name}>" for name in ("arg_key", "arg_value") for end in ("", "/")]
NAMES = "assistant user system observation start message end channel call return string_type"
SPECIALS += [f"<|{name}|>" for name in NAMES.split()]


def native_tokenizer(template, special=True):
    tokens = [AddedToken(name, special=special, normalized=False) for name in SPECIALS]
    bpe = make_bpe(TEXT, tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def refused(function, *args):
    """The message of the refusal: one line that says what to do instead."""
    with pytest.raises(InputError) as caught:
        function(*args)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 330
    assert message.startswith("the tokenizer") and message.endswith("--chat_template chatml")
    return message


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("special", [True, False])
def test_native_ids_and_mask(name, special):
    """Ids are apply_chat_template's, and the last reply trains with the marker that closes it."""
    tokenizer = native_tokenizer(GOOD[name], special)
    template = NativeTemplate(tokenizer)
    for messages in ORDINARY[:2] + [talk("漢字 🙂", "été"), talk("two\n\nlines", "one\n\ntwo")]:
        usual = rendered(tokenizer, messages)
        for text in texts(messages):
            ids, mask = ids_and_mask(tokenizer, template, text)
            assert ids == usual[: len(ids)]
            space = " " if name == "mistral v0.3" else ""
            [run] = spans(ids, mask)
            assert decoded(tokenizer, run[:-1]) == space + text[-1]["content"]
            assert run[-1:] == template.stop_ids and mask[-1]
        assert set(decoded(tokenizer, usual[len(ids) :])) <= {"\n"}


@pytest.mark.parametrize("name", GOOD)
def test_native_prompt_is_what_generation_gets(name):
    tokenizer = native_tokenizer(GOOD[name])
    template, messages = NativeTemplate(tokenizer), talk("Hello!", "Bye.", "How are you?")
    [(ids, mask)] = encode(tokenizer, [list(template.prompt(messages))])
    assert ids == rendered(tokenizer, messages, add_generation_prompt=True) and not any(mask)


@pytest.mark.parametrize("reply", ["\nnewline", "\n\n", "  spaces", "\t", " one"])
def test_a_native_reply_begins_where_generation_begins(reply):
    """Whatever it starts with, and when it is an earlier one, too."""
    for source in (ChatML.jinja, ZEPHYR):
        tokenizer = native_tokenizer(source)
        template, messages = NativeTemplate(tokenizer), talk("Hello!", reply, "Why?", "So.")
        ids, mask = ids_and_mask(tokenizer, template, messages[:2])
        start = mask.index(True)
        assert ids[:start] == rendered(tokenizer, messages[:1], add_generation_prompt=True)
        assert ids_and_mask(tokenizer, template, messages)[0][: len(ids)] == ids


def test_a_prompt_that_ends_within_a_token():
    """ ": " is the prompt's end and " B" one token: what generation reads comes first."""
    tokenizer = native_tokenizer(ZEPHYR.replace("|>\n", "|>: "))
    messages = talk("A", "capital")
    ids, mask = ids_and_mask(tokenizer, NativeTemplate(tokenizer), messages)
    start = mask.index(True)
    assert ids[:start] == rendered(tokenizer, messages[:1], add_generation_prompt=True)
    assert ids != rendered(tokenizer, messages)[: len(ids)]
    assert decoded(tokenizer, ids[start:]) == "capital</s>"


def test_native_stop_ids():
    """They are the saved tokenizer's end of a text too."""
    for name, *stops in (
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("mistral", "</s>"),
        ("open", "<|user|>", "<|observation|>"),
        ("channels", "<|return|>", "<|call|>"),
    ):
        tokenizer = native_tokenizer(GOOD.get(name) or {"open": OPEN, "channels": CHANNELS}[name])
        template = NativeTemplate(tokenizer)
        assert tokenizer.convert_ids_to_tokens(template.stop_ids) == stops
        assert tokenizer.eos_token == stops[0]


def test_an_end_that_the_template_prints_elsewhere_keeps_its_name():
    """Phi-3's prints eos_token after a conversation, and closes a reply with another marker."""
    source = GOOD["llama3"].replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    tokenizer = native_tokenizer(source)
    template = NativeTemplate(tokenizer)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.convert_ids_to_tokens(template.stop_ids) == ["<|eot_id|>"]
    assert trained(tokenizer, template, talk("Hello!", "Bye.")) == "Bye.<|eot_id|>"


@pytest.mark.parametrize("name", ["llama3", "zephyr", "system into user", "chatml"])
def test_native_system_turns(name):
    tokenizer = native_tokenizer(GOOD[name])
    messages = talk("Hello!", "Bye.", system="Be brief.")
    ids, mask = ids_and_mask(tokenizer, NativeTemplate(tokenizer), messages)
    assert ids == rendered(tokenizer, messages)[: len(ids)]
    assert "Be brief." in decoded(tokenizer, ids)
    assert [decoded(tokenizer, run[:-1]) for run in spans(ids, mask)] == ["Bye."]


def test_native_templates_may_strip_some_contents():
    """Llama 3 strips all, Mistral v0.3 only the replies: the ids show what the template shows."""
    messages = talk(" q \n", "\n a ", " r ", "b")
    for name, replies in (("llama3", ["a", "b"]), ("mistral v0.3", [" a", " b"])):
        tokenizer = native_tokenizer(GOOD[name])
        template = NativeTemplate(tokenizer)
        shown = tokenizer.apply_chat_template(messages, tokenize=False)
        for text, reply in zip(texts(messages), replies):
            ids, mask = ids_and_mask(tokenizer, template, text)
            assert [decoded(tokenizer, run[:-1]) for run in spans(ids, mask)] == [reply]
            assert shown.startswith(decoded(tokenizer, ids))


def test_native_sentencepiece():
    """Llama's tokenizer and Mistral's template: the space of "[/INST] a" belongs to the reply."""
    for scheme in ("always", "first"):
        tokenizer = sentencepiece(scheme)
        for source in (WRITES_SPACE, MISTRAL.replace("SPACE", "m['content']")):
            tokenizer.chat_template = source.replace("{{ bos_token }}", "")
            messages = talk("Why is the sky blue?", "Light is scattered.", "Hello!", "Bye.")
            template = NativeTemplate(tokenizer)
            for text in texts(messages):
                ids, mask = ids_and_mask(tokenizer, template, text)
                assert ids == rendered(tokenizer, text)
                reply = " " * (source == WRITES_SPACE) + text[-1]["content"]
                assert [decoded(tokenizer, run[:-1]) for run in spans(ids, mask)] == [reply]


# ------------------------------------------------------------------------------ thoughts and tools

WEATHER = {
    "name": "weather",
    "description": "How warm a city is.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
CALLS = [("weather", {"city": "Paris", "days": 2})]
TOLD = [  # two rounds; the thought of the first is forgotten in the second
    turn("user", "Is it warm?"),
    turn("assistant", "", "Look it up.", CALLS),
    turn("tool", "22 degrees"),
    turn("assistant", "It is.", "22 is warm."),
    turn("user", "Thank you."),
    turn("assistant", "Bye.", "He is polite."),
]
KINDS = {"thinks": THINKS, "open": OPEN, "channels": CHANNELS}
REPLIES = {
    "thinks": [
        "<think>\nLook it up.\n</think>\n\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call><|im_end|>',
        "<think>\n22 is warm.\n</think>\n\nIt is.<|im_end|>",
        "<think>\nHe is polite.\n</think>\n\nBye.<|im_end|>",
    ],
    "open": [
        "\n<think>Look it up.</think>\n<tool_call>weather<arg_key>city</arg_key><arg_value>Paris"
        "</arg_value><arg_key>days</arg_key><arg_value>2</arg_value></tool_call><|observation|>",
        "\n<think>22 is warm.</think>\nIt is.<|user|>",
        "\n<think>He is polite.</think>\nBye.<|user|>",
    ],
    "channels": [
        "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant to=weather<|channel|>"
        'commentary<|message|>{"city": "Paris", "days": 2}<|call|>',
        "<|channel|>analysis<|message|>22 is warm.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is.<|return|>",
        "<|channel|>analysis<|message|>He is polite.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Bye.<|return|>",
    ],
}


@pytest.mark.parametrize("name", KINDS)
def test_thoughts_and_calls_train_where_generation_would_write_them(name):
    tokenizer = native_tokenizer(KINDS[name])
    template = NativeTemplate(tokenizer)
    for text, reply in zip(texts(TOLD), REPLIES[name], strict=True):
        ids, mask = ids_and_mask(tokenizer, template, text, TOOLS)
        start, usual = mask.index(True), rendered(tokenizer, text, TOOLS)
        assert ids[:start] == rendered(tokenizer, text[:-1], TOOLS, add_generation_prompt=True)
        assert decoded(tokenizer, ids[start:]) == reply
        assert all(mask[start:]) and ids[-1] in template.stop_ids
        closed = ids[:-1] if name == "open" else ids  # by the turn that follows, which is not there
        assert closed == usual[: len(closed)]


@pytest.mark.parametrize("name", [*KINDS, *GOOD])
def test_a_shorter_conversation_begins_a_longer_one(name):
    """Piece by piece, where the template writes the earlier turns alike; a reply from its start to
    its end, but for one that another marker closes when it is the last."""
    tokenizer = native_tokenizer({**KINDS, **GOOD}[name])
    template = NativeTemplate(tokenizer)
    short, long = ([p for p, _ in template.pieces(talk(*"abcd"[:n]))] for n in (2, 4))
    assert (
        short == long[: len(short)] or name == "channels" and short[:-1] == long[: len(short) - 1]
    )


def test_native_thoughts_that_do_not_train():
    """All that follows a thought, and the marker that closes it, trains still."""
    rest = {
        "thinks": ["It is.<|im_end|>", "Bye.<|im_end|>"],
        "open": ["It is.<|user|>", "Bye.<|user|>"],
        "channels": [
            f"<|start|>assistant<|channel|>final<|message|>{said}<|return|>"
            for said in ("It is.", "Bye.")
        ],
    }
    for name, replies in rest.items():
        template = NativeTemplate(tokenizer := native_tokenizer(KINDS[name]))
        whole = [ids_and_mask(tokenizer, template, text, TOOLS)[0] for text in texts(TOLD)]
        template.train_on_thoughts = False
        found = [ids_and_mask(tokenizer, template, text, TOOLS) for text in texts(TOLD)]
        assert [ids for ids, _ in found] == whole
        shown = [decoded(tokenizer, run) for ids, mask in found for run in spans(ids, mask)]
        assert shown[1:] == replies and "Look" not in shown[0] and "weather" in shown[0]
        assert trained(tokenizer, template, talk("q", "a")).count("a") >= 1


def test_an_empty_thought_that_the_template_writes_is_part_of_the_reply():
    template = NativeTemplate(tokenizer := native_tokenizer(OPEN))
    assert template.opening == "\n<think></think>\n"
    assert trained(tokenizer, template, talk("q", "a")) == "\n<think></think>\na<|user|>"
    assert NativeTemplate(native_tokenizer(THINKS)).opening == ""


def test_chat_template_kwargs_and_the_date_are_the_templates():
    tokenizer = native_tokenizer(OPEN)
    tokenizer.init_kwargs[KWARGS] = {"enable_thinking": False}
    template = NativeTemplate(tokenizer)
    assert trained(tokenizer, template, talk("q", "a")) == "\na<|user|>"
    said = refused(list, template.pieces([turn("user", "q"), turn("assistant", "a", "hm")]))
    assert "--chat_template_kwargs '{\"enable_thinking\": true}' or --chat" in said

    tokenizer = native_tokenizer(CHANNELS)
    assert (
        rendered(tokenizer, talk("q", "a"))[:40]
        == ids_and_mask(tokenizer, NativeTemplate(tokenizer), talk("q", "a"))[0][:40]
    )  # today
    tokenizer.init_kwargs[DATE] = "2024-02-29"
    for form, shown in (
        ("%Y-%m-%d", "2024-02-29"),
        ("%d %B %Y", "29 February 2024"),
        ("%a %j", "Thu 060"),
    ):
        tokenizer.chat_template = "\n" + CHANNELS.replace("%Y-%m-%d", form)
        text = list(NativeTemplate(tokenizer).prompt([turn("user", "q")]))
        plain = tokenizer.apply_chat_template([turn("user", "q")], tokenize=False)
        today = date.today().strftime(form)
        assert "".join(p for p, _ in text if isinstance(p, str)).startswith(f"\nsystem{shown}user")
        assert plain.startswith(f"\n<|start|>system<|message|>{today}")


def test_a_template_that_shows_no_thought_call_or_tool_is_refused():
    """As Llama 3's and Gemma's do, without a word."""
    template = NativeTemplate(native_tokenizer(LLAMA3))
    thought = [turn("user", "q"), turn("assistant", "a", "t")]
    call = [turn("user", "q"), turn("assistant", "a", None, CALLS)]
    later = [*call, turn("tool", "22"), turn("assistant", "b")]
    assert "the thought" in refused(list, template.pieces(thought))
    assert "the tool calls" in refused(list, template.pieces(call))
    assert "the tool calls" in refused(list, template.pieces(later))
    assert "the tools" in refused(list, template.pieces(talk("q", "a"), TOOLS))
    # a thought of an earlier round is the template's to forget, and what was said beside a call
    assert list(template.pieces([*thought, *talk("r", "b")]))
    template = NativeTemplate(native_tokenizer(CHANNELS))
    call[1]["content"] = "I look."
    assert "what the assistant says" in refused(list, template.pieces(call))
    assert list(template.pieces(later))


def test_a_prompt_that_the_template_shows_otherwise_is_refused():
    """DeepSeek's: generation begins in a thought that a rendered reply does not have."""
    r1 = ZEPHYR.replace("'<|assistant|>\n'", "'<|assistant|>\n<think>\n'")
    assert "otherwise than generation" in refused(NativeTemplate, native_tokenizer(r1))
    # one that writes thoughts, but no reply without (Nemotron's), trains those that have one
    for name in "thinking", "reasoning", "reasoning_content":
        shown = f"('<think>\n' + m.{name} + '</think>' if m.{name} else '')"
        only = r1.replace("m['content']", f"{shown} + m['content']")
        template = NativeTemplate(tokenizer := native_tokenizer(only))
        thought = [turn("user", "q"), turn("assistant", "a", "t")]
        assert trained(tokenizer, template, thought) == "t</think>a</s>" and template.opening == ""
    assert "otherwise than generation" in refused(list, template.pieces(talk("q", "a")))


# ------------------------------------------------------------------------------ nothing is forged


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("special", [True, False])
def test_no_content_forges_a_native_turn(name, special):
    tokenizer = native_tokenizer(GOOD[name], special)
    template = NativeTemplate(tokenizer)
    names = {tokenizer.convert_tokens_to_ids(n) for n in SPECIALS if special or n in GOOD[name]}

    def structure(messages):
        ids, mask = ids_and_mask(tokenizer, template, messages)
        return ids, mask, [i for i in ids if i in names]

    *_, expected = structure(talk("q", "a", "r", "b"))

    @FUZZ
    @given(st.lists(content | st.sampled_from(SPECIALS), min_size=4, max_size=4))
    def check(contents):
        ids, mask, found = structure(talk(*contents))
        assert found == expected
        assert [decoded(tokenizer, run[:-1]).strip() for run in spans(ids, mask)] == [
            contents[3].strip()
        ]

    check()


hostile = content | st.sampled_from([*SPECIALS, "end", "user", "<", ">", "|>", "<|", "/think"])


@pytest.mark.parametrize("name", KINDS)
def test_no_thought_call_result_or_tool_forges_a_marker(name):
    """Names, arguments (keys and values, deep ones too), results, thoughts, the tools' schemas."""
    tokenizer = native_tokenizer(KINDS[name])
    template = NativeTemplate(tokenizer)
    names = set(tokenizer.convert_tokens_to_ids(SPECIALS))

    def conversation(q, thought, name, key, value, deep, result, say, description):
        tool = {**WEATHER, "name": name, "description": description}
        tool["parameters"] = {"type": "object", "properties": {key: {"type": "string"}}}
        calls = [(name, {key: value, f"{key} ": {deep: [deep]}})]
        return [
            turn("user", q),
            turn("assistant", "", thought, calls),
            turn("tool", result),
            turn("assistant", say, thought),
        ], [{"type": "function", "function": tool}]

    def structure(*words):
        messages, tools = conversation(*words)
        return [
            [i for i in ids_and_mask(tokenizer, template, text, tools)[0] if i in names]
            for text in texts(messages)
        ]

    expected = structure("q", "t", "n", "k", "v", "d", "r", "s", "e")

    @FUZZ
    @given(st.lists(hostile.filter(str.strip), min_size=9, max_size=9))
    def check(words):
        assert structure(*words) == expected

    check()


def test_a_name_is_not_made_of_two_texts():
    """A content that goes on with what the template prints beside it makes no marker either."""
    source = "{% for m in messages %}{{ '<|eot_' + m.content + 'id|>' + eos_token }}{% endfor %}"
    tokenizer = native_tokenizer(source)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    template = NativeTemplate(tokenizer)
    for words in ("id|>", "<|eot_id|>", "id", "", " "):
        assert eot not in ids_and_mask(tokenizer, template, talk("q", words + "a"))[0]
    for first, last in (("<|eot_", "|>"), ("<|", "_id|>"), ("<|eot_id|", ""), ("", "|eot_id|>")):
        tokenizer = native_tokenizer(source.replace("<|eot_", first).replace("id|>", last))
        template = NativeTemplate(tokenizer)
        for words in ("id", "eot", ">", "<", " id", "eot_id", "a <", "> a", "a <|eot", "id|> a"):
            ids, _ = ids_and_mask(tokenizer, template, talk(words, words))
            assert eot not in ids
            assert decoded(tokenizer, ids) == (first + words + last + "</s>") * 2


def test_contents_with_strange_characters():
    tokenizer = native_tokenizer(LLAMA3)
    messages = talk("\ue0001\ue001", "a\ue0000\ue001b", "\ue000", "\U0010ffff\ue000\ue001")
    ids, mask = ids_and_mask(tokenizer, NativeTemplate(tokenizer), messages)
    assert ids == rendered(tokenizer, messages)
    [run] = spans(ids, mask)
    assert decoded(tokenizer, run[:-1]) == messages[3]["content"]


def test_a_marker_that_begins_with_another():
    tokenizer = native_tokenizer(LLAMA3.replace("<|eot_id|>", "<|eot_id|>>"))
    tokenizer.add_tokens([AddedToken("<|eot_id|>>", normalized=False)])
    template = NativeTemplate(tokenizer)
    ids, _ = ids_and_mask(tokenizer, template, talk("q", "a"))
    assert ids == rendered(tokenizer, talk("q", "a"))
    assert tokenizer.convert_ids_to_tokens(template.stop_ids) == ["<|eot_id|>>"]


def test_a_word_among_the_added_tokens_is_a_word():
    """The template's marks are signs; a word that somebody added is no structure."""
    tokenizer = native_tokenizer(LLAMA3)
    tokenizer.add_tokens(["capital"])
    template = NativeTemplate(tokenizer)
    shown = trained(tokenizer, template, talk("The capital?", "The capital is Paris."))
    assert shown == "The capital is Paris.<|eot_id|>"


# -------------------------------------------------------------------------------------- refused

DROPS = "{% for m in messages if m['role'] != 'system' %}" + ZEPHYR.split("%}", 1)[1]
REFUSED = {
    "drops users": (DROPS.replace("system", "user"), "does not show what the user says"),
    "drops replies": (ZEPHYR.replace("m['content']", "(m.content if m.role == 'user' else '')"),
                      "does not show what the assistant says"),
    "reorders": (ZEPHYR.replace("in messages", "in messages | reverse"), "otherwise"),
    "upper": (ZEPHYR.replace("m['content']", "m['content'] | upper"), "does not show"),
    "plain text": ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
                   "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
                   "does not close a reply"),
    "thinks": (ZEPHYR.replace("<|assistant|>\n", "<|assistant|>\n<think>\n"), "than generation"),
    "no header": (ZEPHYR.replace("<|assistant|>\n", "<|bot|>\n"), "otherwise than generation"),
    "fails": ("{{ messages[0].content.nothing() }}", "says: "),
    "no jinja": ("{% for m in", "says: "),
    "always raises": ("{{ raise_exception('a\nb' * 400) }}", "says: "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_are_refused(name):
    source, why = REFUSED[name]
    assert why in refused(NativeTemplate, native_tokenizer(source))


def test_no_template_of_its_own(tokenizer):
    bare = make_tokenizer()
    assert bare.chat_template is None
    assert "no chat template" in refused(NativeTemplate, bare)


def test_refused_for_this_conversation_only():
    """A template that serves most conversations says no to the others."""
    drops = NativeTemplate(native_tokenizer(DROPS))
    list(drops.pieces(talk("q", "a")))
    assert "what the system says" in refused(list, drops.pieces(talk("q", "a", system="s")))
    gemma = NativeTemplate(native_tokenizer(GEMMA))
    assert "System role not supported" in refused(list, gemma.pieces(talk("q", "a", system="s")))
    assert "alternate" in refused(list, gemma.pieces([*talk("q", "a"), *talk("q", "a")[1:]]))
    assert "begins with the assistant" in refused(list, gemma.pieces(talk("q", "a")[1:]))
    cut = ZEPHYR.replace("m['content']", "m['content'].split('###')[-1]")
    cuts = NativeTemplate(native_tokenizer(cut))
    assert "a reply as it is" in refused(list, cuts.pieces(talk("q", "x###a")))


def test_words_in_a_template_are_not_a_contents_to_say():
    """What a template looks for in contents to take it out is plain text in a conversation."""
    cut = ZEPHYR.replace("m['content']", "m['content'].split('</think>')[-1]")
    template = NativeTemplate(tokenizer := native_tokenizer(cut))
    assert trained(tokenizer, template, talk("q", "<think>x</think>a")) == "<think>x</think>a</s>"
    switch = ZEPHYR.replace("{% for", "{{ 'brief' if '/short' in messages[0].content }}{% for", 1)
    template = NativeTemplate(tokenizer := native_tokenizer(switch))
    ids, _ = ids_and_mask(tokenizer, template, talk("q /short", "a"))
    assert ids == rendered(tokenizer, talk("q /short", "a"))[: len(ids)]
    assert decoded(tokenizer, ids).startswith("brief")


def replies_train(tokenizer, template, messages, end):
    """The ids are those that the tokenizer renders, and each reply trains with its end marker."""
    for text in texts(messages):
        ids, mask = ids_and_mask(tokenizer, template, text)
        assert ids == rendered(tokenizer, messages)[: len(ids)]
        reply = text[-1]["content"] + end
        assert [decoded(tokenizer, run) for run in spans(ids, mask)] == [reply]


def test_a_marker_that_takes_the_space_behind_it():
    """Phi-3's <|assistant|> swallows the newline after it; the ids are the tokenizer's."""
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokens = [AddedToken(name, special=True, rstrip=True) for name in names]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_bpe(TEXT, tokens))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    template, messages = NativeTemplate(tokenizer), talk("Hello!", "Bye.", "Why?", "Fine.")
    replies_train(tokenizer, template, messages, "<|end|>")


def test_a_marker_that_takes_the_space_before_it():
    """As Llama 2's </s> may, where "content </s>" is printed; and runs of space are no markers."""
    tokens = [AddedToken("<s>"), AddedToken("</s>", lstrip=True), AddedToken("  ", special=False)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_bpe(TEXT, tokens), eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + ':  ' + m['content'] + ' </s>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant:  ' }}{% endif %}"
    )
    template, messages = NativeTemplate(tokenizer), talk("Hello!", "Bye  bye.", "Why?", "Fine.")
    replies_train(tokenizer, template, messages, "</s>")


def test_the_default_system_turn_is_the_templates_own():
    """native shows it because the model was tuned with it; chatml never invents one."""
    tokenizer = native_tokenizer(DEFAULT_SYSTEM)
    native = ids_and_mask(tokenizer, NativeTemplate(tokenizer), talk("q", "a"))[0]
    plain = ids_and_mask(tokenizer, ChatML(tokenizer), talk("q", "a"))[0]
    assert "Be kind." in decoded(tokenizer, native)
    assert not re.search("system|kind", decoded(tokenizer, plain))


# --------------------------------------------------------------------------- the saved ChatML

words = st.sampled_from(["Why?", "It is 42.", "été 漢字 🙂", 'say "hi"\nor\\n', "a b  c", "7"])
values = words | st.integers() | st.none() | st.booleans() | st.lists(words, max_size=2)
calls = st.lists(
    st.tuples(st.sampled_from(["look", "f_2"]), st.dictionaries(words, values, max_size=2)),
    max_size=2,
)
answers = st.builds(turn, st.just("assistant"), words | st.just(""), st.none() | words, calls)
rounds = st.tuples(
    st.builds(turn, st.just("user"), words),
    st.lists(
        st.tuples(answers, st.lists(st.builds(turn, st.just("tool"), words), max_size=2)),
        max_size=2,
    ),
    answers,
).map(lambda r: [r[0], *(m for answer, results in r[1] for m in (answer, *results)), r[2]])
conversations = st.tuples(
    st.lists(st.builds(turn, st.just("system"), words), max_size=1),
    st.lists(rounds, min_size=1, max_size=3),
).map(lambda c: [*c[0], *(message for some in c[1] for message in some)])


@pytest.mark.parametrize("tags", [True, False])
def test_the_jinja_that_is_saved_writes_what_chatml_writes(tags):
    """Thoughts, calls, results and tools, whether their tags are tokens or text."""
    tokenizer = native_tokenizer(ChatML.jinja) if tags else make_tokenizer()
    tokenizer.chat_template = ChatML.jinja
    template = ChatML(tokenizer)

    @FUZZ
    @given(conversations, st.sampled_from([(), TOOLS, [*TOOLS, {"name": "ü", "of": [1, None]}]]))
    def check(messages, tools):
        for text in texts(messages):
            ids, mask = ids_and_mask(tokenizer, template, text, tools)
            start, usual = mask.index(True), rendered(tokenizer, text, tools)
            assert ids[:start] == rendered(tokenizer, text[:-1], tools, add_generation_prompt=True)
            assert ids == usual[: len(ids)] and decoded(tokenizer, usual[len(ids) :]) == "\n"

    check()


def test_other_forms_of_a_message_in_the_saved_jinja():
    """What servers hand to a template: a thought within the content, arguments that are a string,
    a content that is null."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ChatML.jinja
    call = {"name": "look", "arguments": '{"at": 1}'}
    told = [
        turn("user", "q"),
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "a", "thinking": "hm"},
    ]
    shown = "".join(
        f"{IM_START}{role}\n{content}{IM_END}\n"
        for role, content in (
            ("user", "q"),
            ("assistant", "<think>\nhm\n</think>\n\na"),
            ("assistant", '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call>'),
            ("assistant", "<think>\nhm\n</think>\n\na"),
        )
    )
    assert tokenizer.apply_chat_template(told, tokenize=False) == shown
    forgotten = shown.replace("<think>\nhm\n</think>\n\n", "")
    again = tokenizer.apply_chat_template([*told, turn("user", "r")], tokenize=False)
    assert again == f"{forgotten}{IM_START}user\nr{IM_END}\n"


# ------------------------------------------------------------------------------------ the forty


trl = importlib.util.find_spec("trl")  # which ships the chat templates of forty model families
FORTY = sorted(Path(trl.origin).parent.glob("chat_templates/*.jinja")) if trl else []
NAME = re.compile(r"<\|?[/\w▁｜]+\|?>|<\|\"\|>|<｜[^｜]+｜>|\[[A-Z_/]+\]")
ASKED = turn("user", "Is it warm?")
SAID = {
    "a reply": (talk("Hello!", "Bye."), ()),
    "rounds": (talk("Hello!", "Bye.", "Why?", "Fine."), ()),
    "a system turn": (talk("Hello!", "Bye.", system="Be brief."), ()),
    "thoughts": ([*TOLD[:1], turn("assistant", "No.", "Ice."), *TOLD[4:]], ()),
    "a call": ([ASKED, turn("assistant", "", None, CALLS)], TOOLS),
    "a call with words": ([ASKED, turn("assistant", "I look.", None, CALLS)], TOOLS),
    "a call with a thought": (TOLD[:2], TOOLS),
    "its result": ([ASKED, turn("assistant", "", None, CALLS), TOLD[2], turn("assistant", "So.")],
                   TOOLS),
    "all": (TOLD, TOOLS),
}  # fmt: skip
TRAINS = {  # what each trains; for the others, whatever is not refused must be right
    **dict.fromkeys(["qwen3", "qwen3_5_think", "qwen3_6", "glm4moe", "gemma4_v5"], set(SAID)),
    "gptoss": set(SAID) - {"all"},  # a call forgets its thought once there is an answer
    "qwen2_5": set(SAID) - {"thoughts", "a call with a thought", "all"},
    "llama3": {"a reply", "rounds", "a system turn"},
    "gemma": {"a reply", "rounds"},
    "phi3": {"a reply", "rounds", "a system turn"},
    **dict.fromkeys(["deepseekv3", "deepseek_r1_distill"], set()),
}


@pytest.mark.parametrize("path", FORTY, ids=lambda path: path.stem)
def test_each_template_of_forty_families_is_exact_or_refused(path):
    """Ids are apply_chat_template's: what generation gets, and what it renders of the reply."""
    source = path.read_text(encoding="utf-8")
    names = dict.fromkeys(["<s>", "</s>", *NAME.findall(source)])
    tokens = [AddedToken(name, special=False, normalized=False) for name in names]
    bpe = make_bpe(TEXT, tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = source
    trains = set()
    try:
        template = NativeTemplate(tokenizer)
    except InputError as error:
        assert str(error).endswith("--chat_template chatml")
        assert not TRAINS.get(path.stem)
        return
    for name, (messages, tools) in SAID.items():
        try:
            for text in texts(messages):
                ids, mask = ids_and_mask(tokenizer, template, text, tools)
                start, usual = mask.index(True), rendered(tokenizer, text, tools)
                prompt = rendered(tokenizer, text[:-1], tools, add_generation_prompt=True)
                assert ids[:start] == prompt and all(mask[start:])
                shown, reply = decoded(tokenizer, ids[start:]), text[-1]
                words = [reply["content"], reply.get("reasoning_content", "")]
                assert all(word in shown for word in words)
                assert "tool_calls" not in reply or "Paris" in shown
                # the marker of a turn that follows is not rendered where none does
                closed = ids if ids == usual[: len(ids)] else ids[:-1]
                assert closed == usual[: len(closed)] and ids[-1] in template.stop_ids
                assert not decoded(tokenizer, usual[len(ids) :]).strip() or "phi3" in path.stem
            trains.add(name)
        except InputError as error:
            assert str(error).endswith("--chat_template chatml")
    assert trains and trains == TRAINS.get(path.stem, trains)


@pytest.mark.skipif(not FORTY, reason="needs trl")
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_chatml_writes_what_qwens_templates_write(name):
    """Qwen2.5's given a system turn and no thoughts, Qwen3's of replies with a thought."""
    source = next(path for path in FORTY if path.stem == name).read_text(encoding="utf-8")
    tokenizer = native_tokenizer(source)
    told = [m for m in SAID["all"][0]]
    if name == "qwen2_5":
        told = [{k: m[k] for k in m if k != "reasoning_content"} for m in told]
    for system in [turn("system", "Be brief.")], []:
        if not system and name == "qwen2_5":
            continue  # it invents one
        for text in texts([*system, *told]):
            ids, _ = ids_and_mask(tokenizer, ChatML(tokenizer), text, TOOLS)
            assert ids == rendered(tokenizer, text, TOOLS)[: len(ids)]


# ---------------------------------------------------------------------------------- no template


def test_strings_as_they_are():
    """Special tokens in them are read as such; ids are the tokenizer's own."""
    tokenizer = native_tokenizer(None)
    tokenizer.add_tokens([AddedToken("   ", normalized=False)])  # as some have: no marker
    template = NoTemplate(tokenizer)
    prompt, reply = f"{IM_START}user\nHello!   So.{IM_END}\n{IM_START}assistant\n", f"Bye.{IM_END}"
    for messages in (talk(prompt, reply), [turn("assistant", prompt + reply)]):
        ids, mask = ids_and_mask(tokenizer, template, messages)
        assert ids == tokenizer(prompt + reply, add_special_tokens=False)["input_ids"]
        assert [decoded(tokenizer, run) for run in spans(ids, mask)] == [messages[-1]["content"]]
    [(ids, mask)] = encode(tokenizer, [list(template.prompt(talk(prompt)))])
    assert ids == tokenizer(prompt, add_special_tokens=False)["input_ids"] and not any(mask)
    assert template.stop_ids == [tokenizer.eos_token_id]
    for odd in (talk("a", "b", "c", "d"), [turn("assistant", "b", "thought")], TOLD[:2]):
        with pytest.raises(InputError, match="a prompt and a reply as strings"):
            list(template.pieces(odd))


# ------------------------------------------------------------------------------ in the commands

DATED = "{{ strftime_now('%d %B %Y') + '\n' }}" + ChatML.jinja  # as SmolLM3's


@pytest.fixture
def dated(model_dir, data, tmp_path):
    """Flags of four steps on a model whose own template prints the date."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(model)
    return {
        "model_name_or_path": model, "dataset_name": data / "sft.jsonl", "max_steps": 4,
        "save_steps": 2, "output_dir": tmp_path / "run", "device": "cpu",
    }  # fmt: skip


def on(monkeypatch, day):
    """Runs begin on that day."""

    class Day(date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr("nanoalign.run.policy.date", Day)


@pytest.mark.usefixtures("no_curves")
def test_a_run_is_resumed_after_midnight(dated, monkeypatch, tmp_path, capsys):
    """Its data are those of its first day, and a run that is not resumed has the new day's."""
    on(monkeypatch, "2024-02-29")
    call("sft", dated)
    said = capsys.readouterr().out.splitlines()
    assert (
        "template: native (the tokenizer's own; --chat_template chatml writes ChatML instead)"
        in said
    )
    on(monkeypatch, "2024-03-01")
    again = {
        "output_dir": tmp_path / "again",
        "resume_from_checkpoint": tmp_path / "run/checkpoint-2",
    }
    call("sft", dated | again)
    assert tensors(tmp_path / "run") == tensors(tmp_path / "again")
    assert "template: native (it was trained with that)" in capsys.readouterr().out
    _, template, _ = load_tokenizer(str(tmp_path / "again"))
    text = [p for p, _ in template.prompt([turn("user", "q")])]
    assert text[0] == "01 March 2024\n"
    call("sft", dated | {"output_dir": tmp_path / "new"})
    assert tensors(tmp_path / "run") != tensors(tmp_path / "new")


@pytest.mark.usefixtures("no_curves")
def test_a_resumed_run_takes_its_template_from_the_checkpoint(dated, tmp_path, capsys):
    """Not from the model, which may have got one by then."""
    template = tmp_path / "model" / "chat_template.jinja"
    template.unlink()
    call("sft", dated)
    assert "template: chatml (the tokenizer has none of its own)" in capsys.readouterr().out
    template.write_text(DATED)
    which = tmp_path / "run" / "checkpoint-2"
    call("sft", dated | {"output_dir": tmp_path / "again", "resume_from_checkpoint": which})
    assert "template: chatml (it was trained with that)" in capsys.readouterr().out
    assert tensors(tmp_path / "run") == tensors(tmp_path / "again")


@pytest.mark.usefixtures("no_curves")
def test_kwargs_go_to_the_template_and_are_kept(model_dir, data, tmp_path, capsys):
    model, kwargs = shutil.copytree(model_dir, tmp_path / "model"), {"enable_thinking": False}
    tokenizer = native_tokenizer(OPEN)
    model_of(tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    given = {
        "model_name_or_path": model, "dataset_name": data / "sft.jsonl", "max_steps": 1,
        "output_dir": tmp_path / "run", "device": "cpu", "use_peft": "false",
    }  # fmt: skip
    call("sft", given)
    assert "begins a reply with '\\n<think></think>\\n'" in capsys.readouterr().out
    given["output_dir"] = tmp_path / "kept"
    call("sft", given | {"chat_template_kwargs": json.dumps(kwargs)})
    assert "begins a reply" not in capsys.readouterr().out
    tokenizer, template, _ = load_tokenizer(str(tmp_path / "kept"))
    assert trained(tokenizer, template, talk("q", "a")) == "\na<|user|>"
    # generation ends with what ends a reply
    saved = json.loads((tmp_path / "kept" / "generation_config.json").read_text())
    assert set(template.stop_ids) <= set(saved["eos_token_id"])
    assert tokenizer.eos_token == "<|user|>"
    with pytest.raises(InputError, match="chat_template_kwargs.*expected a JSON object"):
        call("sft", given | {"chat_template_kwargs": "[1]"})
    _, _, _ = load_tokenizer(str(model_dir), "chatml", chat_template_kwargs=kwargs)
    assert "--chat_template_kwargs has nothing to do in this run" in capsys.readouterr().out


@pytest.mark.usefixtures("no_curves")
def test_thoughts_that_are_left_out(model_dir, tmp_path):
    row = {"messages": [turn("user", "q"), turn("assistant", "a", "a thought")]}
    data, found = write_rows(tmp_path / "x.jsonl", [row]), {}
    for trains in "true", "false":
        directory = tmp_path / trains
        call("sft", {"model_name_or_path": model_dir, "max_steps": 1, "device": "cpu",
                     "dataset_name": data, "output_dir": directory, "logging_steps": 1,
                     "train_on_thoughts": trains})  # fmt: skip
        found[trains] = metrics(directory)[0]
    assert found["true"]["num_tokens"] == found["false"]["num_tokens"]
    assert found["true"]["loss"] != found["false"]["loss"]


@pytest.mark.usefixtures("no_curves")
def test_data_that_hold_their_template(model_dir, tmp_path, capsys):
    """SFT's text, DPO's and KTO's strings, without a template of ours."""
    prompt, reply = f"{IM_START}user\nHello!{IM_END}\n{IM_START}assistant\n", f"Bye.{IM_END}"
    rows = {
        "sft": [{"text": prompt + reply}],
        "dpo": [{"prompt": prompt, "chosen": reply, "rejected": f"No.{IM_END}"}],
        "kto": [
            {"prompt": prompt + extra, "completion": reply, "label": bool(extra)}
            for extra in ("", "So? ")
        ],
    }
    given = {"model_name_or_path": model_dir, "max_steps": 1, "device": "cpu"}
    for method, data in rows.items():
        given["dataset_name"] = write_rows(tmp_path / f"{method}.jsonl", data)
        given["output_dir"] = tmp_path / method
        if method == "sft":
            with pytest.raises(InputError, match="or text, with --chat_template none"):
                call("sft", given)
        call(method, given | {"chat_template": "none"})
    assert capsys.readouterr().out.count("template: none\n") == 3
    given |= {"dataset_name": tmp_path / "sft.jsonl", "eval_dataset": tmp_path / "sft.jsonl"}
    given |= {"output_dir": tmp_path / "y", "generate_during_eval": "true", "chat_template": "none"}
    call("sft", given)
    assert "there is no prompt to reply to" in capsys.readouterr().out
    tokenizer, template, added = load_tokenizer(str(tmp_path / "sft"))
    assert isinstance(template, NoTemplate) and not added
    for layouts, file in ((SFT, "sft"), (DPO, "dpo")):
        source = str(tmp_path / f"{file}.jsonl")
        [example], _ = read_examples([source], layouts, tokenizer, template)
        text = decoded(tokenizer, [*example.prompt, *example.texts[0][0]])
        assert text == prompt + reply
    talks = write_rows(tmp_path / "talks.jsonl", [{"messages": talk("q", "a")}])
    with pytest.raises(InputError, match="columns messages make no known layout"):
        call(
            "sft",
            given | {"dataset_name": talks, "chat_template": "none", "output_dir": tmp_path / "x"},
        )


def model_of(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny(LlamaConfig, vocab_size=len(tokenizer)))


# ------------------------------------------------------------------------------ one more template


class Llama3:
    """All that another template takes, besides its entry in TEMPLATES."""

    markers = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    jinja = LLAMA3

    def __init__(self, tokenizer):
        self.begin, self.ids = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(self.markers)
        self.stop_ids = [self.ids[-1]]

    def header(self, role):
        start, end, _ = self.ids
        return [(start, False), (role, False), (end, False)]

    def pieces(self, messages, tools=()):
        *before, reply = messages
        yield from self.prompt(before)
        yield reply["content"].strip(), True
        yield self.ids[-1], True

    def prompt(self, messages, tools=()):
        yield self.begin, False
        for message in messages:
            yield from self.header(message["role"])
            if message["role"] == "assistant":
                yield "\n\n", False
                yield message["content"].strip(), False
            else:
                yield "\n\n" + message["content"].strip(), False
            yield self.ids[-1], False
        yield from self.header("assistant")
        yield "\n\n", False


def test_a_template_of_ones_own(tmp_path, monkeypatch):
    """A tokenizer opens with it, and the ids are those that `native` makes of its jinja."""
    monkeypatch.setitem(TEMPLATES, "llama3", Llama3)
    bare = make_tokenizer(("<s>", "</s>"))
    bare.bos_token = "<s>"
    bare.save_pretrained(tmp_path / "bare")
    tokenizer, template, added = load_tokenizer(str(tmp_path / "bare"), "llama3")
    assert tokenizer.convert_ids_to_tokens(added) == list(Llama3.markers)
    assert tokenizer.eos_token == "<|eot_id|>" and tokenizer.chat_template == LLAMA3
    tokenizer.save_pretrained(tmp_path / "saved")
    again, native, added = load_tokenizer(str(tmp_path / "saved"), "native")
    assert added == [] and native.stop_ids == template.stop_ids
    for messages in [talk("Hello!", "Bye.", system="Be brief."), *ORDINARY[:6], ORDINARY[7]]:
        ids, mask = ids_and_mask(tokenizer, template, messages)
        assert (ids, mask) == ids_and_mask(again, native, messages)
        assert ids == rendered(tokenizer, messages)
        prompt = [list(kind.prompt(messages)) for kind in (template, native)]
        assert len(set(map(str, encode(tokenizer, prompt)))) == 1
