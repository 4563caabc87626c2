"""The tokenizer's own template, and one that is added: its ids, the replies, and no forged turn."""

import re

import pytest
from conftest import TEXT, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_chatml import (
    FUZZ,
    ORDINARY,
    content,
    decoded,
    ids_and_mask,
    make_bpe,
    rendered,
    sentencepiece,
    spans,
    talk,
)
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from nanoalign import InputError
from nanoalign.chatml import IM_END, IM_START, ChatML, encode
from nanoalign.formats.templates import TEMPLATES, NativeTemplate
from nanoalign.run.policy import load_tokenizer

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
    assert message.startswith("--chat_template native") and message.endswith("use chatml")
    return message


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("special", [True, False])
def test_native_ids_and_mask(name, special):
    tokenizer = native_tokenizer(GOOD[name], special)
    template = NativeTemplate(tokenizer)
    for messages in ORDINARY[:2] + [talk("漢字 🙂", "été"), talk("two\n\nlines", "one\n\ntwo")]:
        ids, mask = ids_and_mask(tokenizer, template, messages)
        assert ids == rendered(tokenizer, messages)[: len(ids)]
        space = " " if name == "mistral v0.3" else ""
        replies = [space + m["content"] for m in messages if m["role"] == "assistant"]
        runs = spans(ids, mask)
        assert [decoded(tokenizer, run[:-1]) for run in runs] == replies
        assert [[run[-1]] for run in runs] == [template.stop_ids] * len(replies)
        last = ids_and_mask(tokenizer, template, messages, first=len(messages) - 1)
        assert last[0] == ids and spans(*last) == runs[-1:]


@pytest.mark.parametrize("name", GOOD)
def test_native_prompt_is_what_generation_gets(name):
    tokenizer = native_tokenizer(GOOD[name])
    template, messages = NativeTemplate(tokenizer), talk("Hello!", "Bye.", "How are you?")
    [(ids, mask)] = encode(tokenizer, [list(template.prompt(messages))])
    generation = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ids == generation and not any(mask)


def test_native_stop_ids():
    for name, stop in (("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("mistral", "</s>")):
        tokenizer = native_tokenizer(GOOD[name])
        assert NativeTemplate(tokenizer).stop_ids == [tokenizer.convert_tokens_to_ids(stop)]


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
        ids, mask = ids_and_mask(tokenizer, NativeTemplate(tokenizer), messages)
        assert [decoded(tokenizer, run[:-1]) for run in spans(ids, mask)] == replies
        shown = tokenizer.apply_chat_template(messages, tokenize=False)
        assert decoded(tokenizer, ids) == shown


def test_native_sentencepiece():
    """Llama's tokenizer and Mistral's template: the space of "[/INST] a" belongs to the reply."""
    for scheme in ("always", "first"):
        tokenizer = sentencepiece(scheme)
        for source in (WRITES_SPACE, MISTRAL.replace("SPACE", "m['content']")):
            tokenizer.chat_template = source.replace("{{ bos_token }}", "")
            messages = talk("Why is the sky blue?", "Light is scattered.", "Hello!", "Bye.")
            ids, mask = ids_and_mask(tokenizer, NativeTemplate(tokenizer), messages)
            assert ids == rendered(tokenizer, messages)[: len(ids)]
            space = " " * (source == WRITES_SPACE)
            replies = [space + m["content"] for m in messages if m["role"] == "assistant"]
            assert [decoded(tokenizer, run[:-1]) for run in spans(ids, mask)] == replies


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("special", [True, False])
def test_no_content_forges_a_native_turn(name, special):
    tokenizer = native_tokenizer(GOOD[name], special)
    template = NativeTemplate(tokenizer)
    harmless = talk("q", "a", "r", "b")
    names = {tokenizer.convert_tokens_to_ids(n) for n in SPECIALS if special or n in GOOD[name]}
    structure = [i for i in ids_and_mask(tokenizer, template, harmless)[0] if i in names]

    @FUZZ
    @given(st.lists(content | st.sampled_from(SPECIALS), min_size=4, max_size=4))
    def check(contents):
        messages = talk(*contents)
        try:
            ids, mask = ids_and_mask(tokenizer, template, messages)
        except InputError as error:
            assert "rewrites" in str(error)
            return
        assert [i for i in ids if i in names] == structure
        shown = [decoded(tokenizer, run[:-1]).strip() for run in spans(ids, mask)]
        assert shown == [contents[1].strip(), contents[3].strip()]

    check()


def test_contents_with_the_placeholders():
    tokenizer = native_tokenizer(LLAMA3)
    messages = talk("\ue0001\ue001", "a\ue0000\ue001b", "\ue000", "\ue0013\ue000\ue001")
    ids, mask = ids_and_mask(tokenizer, NativeTemplate(tokenizer), messages)
    assert ids == rendered(tokenizer, messages)[: len(ids)]
    replies = [messages[1]["content"], messages[3]["content"]]
    assert [decoded(tokenizer, run[:-1]) for run in spans(ids, mask)] == replies


DROPS = "{% for m in messages if m['role'] != 'system' %}" + ZEPHYR.split("%}", 1)[1]
REFUSED = {
    "repeats": (ZEPHYR + "{{ messages[0]['content'] }}", "drops, repeats or reorders"),
    "drops users": (DROPS.replace("system", "user"), "drops, repeats or reorders"),
    "reorders": (ZEPHYR.replace("in messages", "in messages | reverse"), "reorders"),
    "upper": (ZEPHYR.replace("m['content']", "m['content'] | upper"), "rewrites"),
    "escapes": (ZEPHYR.replace("m['content']", "m['content'] | tojson"), "otherwise"),
    "plain text": ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
                   "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
                   "does not close a reply"),
    "text before the end": (ZEPHYR.replace("+ eos_token", "+ ' ' + eos_token"), "close a reply"),
    "thinks": (ZEPHYR.replace("|>\n' +", "|>\n' + ('<think>\n\n</think>\n\n' if loop.last and "
                              "m['role'] == 'assistant' else '') +"), "otherwise than generation"),
    "no header": (ZEPHYR.replace("<|assistant|>\n", "<|bot|>\n"), "otherwise than generation"),
    "space before a reply": (ZEPHYR.replace("|>\n", "|>: "), "piece by piece"),
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
    assert "no template" in refused(NativeTemplate, bare)


def test_refused_for_this_conversation_only():
    """A template that serves most conversations says no to the others."""
    drops = NativeTemplate(native_tokenizer(DROPS))
    list(drops.pieces(talk("q", "a")))
    assert "drops" in refused(list, drops.pieces(talk("q", "a", system="s")))
    gemma = NativeTemplate(native_tokenizer(GEMMA))
    assert "System role not supported" in refused(list, gemma.pieces(talk("q", "a", system="s")))
    assert "alternate" in refused(list, gemma.pieces(talk("q", "a")[::-1]))
    cut = ZEPHYR.replace("m['content']", "m['content'].split('</think>')[-1]")
    cuts = NativeTemplate(native_tokenizer(cut))
    assert "rewrites" in refused(list, cuts.pieces(talk("q", "<think>x</think>a")))


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
    ids, mask = ids_and_mask(tokenizer, template, messages)
    assert ids == rendered(tokenizer, messages)[: len(ids)]
    assert [decoded(tokenizer, run) for run in spans(ids, mask)] == ["Bye.<|end|>", "Fine.<|end|>"]


def test_the_default_system_turn_is_the_templates_own():
    """native shows it because the model was tuned with it; chatml never invents one."""
    tokenizer = native_tokenizer(DEFAULT_SYSTEM)
    native = ids_and_mask(tokenizer, NativeTemplate(tokenizer), talk("q", "a"))[0]
    plain = ids_and_mask(tokenizer, ChatML(tokenizer), talk("q", "a"))[0]
    assert "Be kind." in decoded(tokenizer, native)
    assert not re.search("system|kind", decoded(tokenizer, plain))


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
        yield from self.prompt(messages[:-1])
        yield messages[-1]["content"].strip(), True
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
        assert ids == rendered(tokenizer, messages)[: len(ids)]
        prompt = [list(kind.prompt(messages)) for kind in (template, native)]
        assert len(set(map(str, encode(tokenizer, prompt)))) == 1
