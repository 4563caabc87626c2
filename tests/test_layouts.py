"""Rows as other tools write them, read as the conversation that was meant, refused or counted."""

import csv
import gzip
import io
import json
import re
import sys
from collections import Counter
from functools import reduce

import pytest
from conftest import make_tokenizer

from nanoalign import InputError
from nanoalign.chatml import ChatML
from nanoalign.formats.layouts import DPO, KTO, SFT, describe, read_cases, read_examples
from nanoalign.tools.data import method_of


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def tool(content, **more):
    return {"role": "tool", "content": content, **more}


def call(name="f", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def write(folder, rows, name="data.jsonl"):
    path = folder / name
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if name.endswith(".json") else text, encoding="utf-8")
    return str(path)


class Reader:
    """rows -> cases, through a file; and what was counted and said."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, layouts, rows, name="data.jsonl", **how):
        self.count, self.notes = Counter(), []
        rows = rows if isinstance(rows, list) else [rows]
        path = write(self.folder, rows, name)
        cases = list(read_cases([path], layouts, self.count, self.notes, **how))
        self.count = +self.count
        return cases

    def one(self, layouts, row, **how):
        [case] = self(layouts, row, **how)
        return case


@pytest.fixture
def read(tmp_path):
    return Reader(tmp_path)


def refused(read, layouts, row, *words):
    with pytest.raises(InputError) as caught:
        read(layouts, row)
    message = str(caught.value)
    assert message.isprintable() and "expected" in message and len(message) < 900
    for word in words:
        assert word in message


# --------------------------------------------------------------- thoughts and calls of one message

CALL = call(town="Oslo")
BARE = CALL["function"]
TEXT = '<tool_call>\n{"name": "f", "arguments": {"town": "Oslo"}}\n</tool_call>'
MESSAGES = {  # a message as somebody has it, and the one form that it takes
    "reasoning_content": (assistant("A", reasoning_content="T"),) * 2,
    "reasoning": (assistant("A", reasoning="T"), assistant("A", reasoning_content="T")),
    "thinking": (assistant("A", thinking="T"), assistant("A", reasoning_content="T")),
    "twice the same": (
        assistant("A", thinking="T", reasoning="T\n"), assistant("A", reasoning_content="T")),
    "null and empty thoughts": (
        assistant("A", thinking=None, reasoning="", reasoning_content=" \n"), assistant("A")),
    "a thought alone": (
        assistant("", reasoning_content="T"), assistant("", reasoning_content="T")),
    "a thought beside null": (
        assistant(None, reasoning_content="T"), assistant("", reasoning_content="T")),
    "think as Qwen3 writes it": (
        assistant("<think>\nT\n\nU\n</think>\n\nA\n"),
        assistant("A\n", reasoning_content="T\n\nU")),
    "think in a line": (assistant("<think>T</think>A"), assistant("A", reasoning_content="T")),
    "think after space": (
        assistant("\n <think> T </think> A"), assistant(" A", reasoning_content=" T ")),
    "think without an answer": (
        assistant("<think>T</think>"), assistant("", reasoning_content="T")),
    "think and the same beside it": (
        assistant("<think>\nT\n</think>\n\nA", thinking="T"),
        assistant("A", reasoning_content="T")),
    "an empty think": (assistant("<think>\n\n</think>\n\nA"), assistant("A")),
    "think later on": (assistant("A <think>T</think>"),) * 2,
    "think that never ends": (assistant("<think>A"),) * 2,
    "the end of a think alone": (assistant("T</think>A"),) * 2,
    "two thinks": (
        assistant("<think>T</think><think>U</think>A"),
        assistant("<think>U</think>A", reasoning_content="T")),
    "null keys of datasets": (
        assistant("A", tool_calls=None, function_call=None, thinking=None, images=None, name=None),
        assistant("A")),
    "call": (assistant("A", tool_calls=[CALL]),) * 2,
    "call beside null": (assistant(None, tool_calls=[CALL]), assistant("", tool_calls=[CALL])),
    "call without content": (
        {"role": "assistant", "tool_calls": [CALL]}, assistant("", tool_calls=[CALL])),
    "call with an id": (
        assistant("", tool_calls=[{"id": "1", "index": 0, **CALL}]),
        assistant("", tool_calls=[CALL])),
    "call without a wrapper": (assistant("", tool_calls=[BARE]), assistant("", tool_calls=[CALL])),
    "arguments in JSON": (
        assistant("", tool_calls=[{"function": {"name": "f", "arguments": '{"town": "Oslo"}'}}]),
        assistant("", tool_calls=[CALL])),
    "arguments null": (
        assistant("", tool_calls=[{"name": "f", "arguments": None}]),
        assistant("", tool_calls=[call()])),
    "arguments an empty text": (
        assistant("", tool_calls=[{"name": "f", "arguments": ""}]),
        assistant("", tool_calls=[call()])),
    "no arguments": (
        assistant("", tool_calls=[{"name": "f"}]), assistant("", tool_calls=[call()])),
    "null arguments of datasets": (
        assistant("", tool_calls=[call(a=None, b={"c": None, "d": [None, {"e": None}]})]),
        assistant("", tool_calls=[call(b={"d": [None, {}]})])),
    "null in JSON is a value": (
        assistant("", tool_calls=[{"name": "f", "arguments": '{"a": null, "b": {"c": null}}'}]),
        assistant("", tool_calls=[call(a=None, b={"c": None})])),
    "calls in JSON": (
        assistant("", tool_calls=json.dumps([CALL])), assistant("", tool_calls=[CALL])),
    "no calls": (assistant("A", tool_calls=[]), assistant("A")),
    "function_call": (assistant(None, function_call=BARE), assistant("", tool_calls=[CALL])),
    "function_call beside the same": (
        assistant("", function_call=BARE, tool_calls=[CALL]), assistant("", tool_calls=[CALL])),
    "function_call as a role": (
        {"from": "function_call", "value": json.dumps(BARE)}, assistant("", tool_calls=[CALL])),
    "function_call as a role, with a thought": (
        {"from": "function_call", "value": "<think>T</think>" + json.dumps([BARE, BARE])},
        assistant("", reasoning_content="T", tool_calls=[CALL, CALL])),
    "tool_call": (assistant(TEXT), assistant("", tool_calls=[CALL])),
    "tool_call after words": (assistant(f"A\n{TEXT}\n"), assistant("A", tool_calls=[CALL])),
    "tool_call after a blank line": (
        assistant(f"A\n\n{TEXT}"), assistant("A\n", tool_calls=[CALL])),
    "tool_calls in a line": (assistant(f"A{TEXT}{TEXT}"), assistant("A", tool_calls=[CALL] * 2)),
    "think and tool_call": (
        assistant(f"<think>\nT\n</think>\n\n{TEXT}\n{TEXT}"),
        assistant("", reasoning_content="T", tool_calls=[CALL] * 2)),
    "tool_call and the same beside it": (
        assistant(TEXT, tool_calls=[CALL]), assistant("", tool_calls=[CALL])),
    "tool_call before words": (assistant(f"{TEXT}\nA"),) * 2,
    "tool_call that is no JSON": (assistant("<tool_call>{f}</tool_call>"),) * 2,
    "tool_call that is no call": (assistant('<tool_call>{"a": 1}</tool_call>'),) * 2,
    "tool_call whose key stands twice": (
        assistant('<tool_call>{"name": "f", "name": "g"}</tool_call>'),) * 2,
    "parts": (
        assistant([{"type": "text", "text": "A", "image": None},
                   {"type": "output_text", "text": "B"}]),
        assistant("AB")),
    "a part without its type": (assistant([{"text": "A"}]), assistant("A")),
    "parts that think": (
        assistant([{"type": "text", "text": "<think>T</think>"}, {"type": "text", "text": "A"}]),
        assistant("A", reasoning_content="T")),
    "keys of both kinds": (
        {"role": None, "content": None, "from": "gpt", "value": "A"}, assistant("A")),
    "keys of either kind": ({"from": "assistant", "content": "A"}, assistant("A")),
    "Assistant": ({"role": "Assistant", "content": "A"}, assistant("A")),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_a_reply_in_its_one_form(name, read):
    given, expected = MESSAGES[name]
    case = read.one(SFT, {"messages": [user("Q"), given]})
    assert case.prompt == [user("Q")] and case.completions == [[expected]]
    before = read.one(SFT, {"prompt": [user("Q"), given, user("R")], "completion": "A"})
    assert before.prompt == [user("Q"), expected, user("R")]
    if given.keys() == {"role", "content"} and isinstance(given["content"], str):
        row = {"instruction": "Q", "output": given["content"]}
        assert read.one(SFT, row).completions == [[expected]]


@pytest.mark.parametrize("name", MESSAGES)
def test_the_form_is_its_own(name, read):
    """What was read once is read again as it is."""
    _, expected = MESSAGES[name]
    if "<think>" not in expected["content"] and "null" not in name:
        assert read.one(SFT, {"messages": [user("Q"), expected]}).completions == [[expected]]


@pytest.mark.parametrize(
    "text",
    ["<think>\nT\n\n\nU\n</think>\n\nA\n", f"A\n\n{TEXT}", f"{TEXT}\n{TEXT}", "A <think>T</think>",
     f"<think>\nT\n</think>\n\nA\n{TEXT}", f"<think>\nT\n</think>\n\n{TEXT}", "<think>", "\nA\n",
     "<tool_call>\n{\n</tool_call>", f"{TEXT}\nA", f"A\n<tool_call>\n</tool_call>\n{TEXT}"],
)  # fmt: skip
def test_what_was_spelled_is_written_as_it_was(text, read):
    """Read from a text and written by ChatML, a reply is the same text again."""
    [[reply]] = read.one(SFT, {"prompt": "Q", "completion": text}).completions
    assert "".join(piece for piece, _ in ChatML(make_tokenizer()).reply(reply)) == text


TURNS = {  # other turns
    "developer": ({"role": "developer", "content": "S"}, system("S")),
    "System": ({"role": "System", "content": "S"}, system("S")),
    "human": ({"role": "human", "content": "Q"}, user("Q")),
    "Human": ({"from": "Human", "value": "Q"}, user("Q")),
    "words of templates": (user("<think>T</think>\n" + TEXT), user("<think>T</think>\n" + TEXT)),
    "parts": (user([{"type": "text", "text": "<think>"}, {"text": ""}]), user("<think>")),
    "no parts": (user([]), user("")),
    "null thoughts": (user("Q", reasoning_content=None, thinking="", tool_calls=[]), user("Q")),
    "weight 0": (user("Q", weight=0, train=False), user("Q")),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_a_turn_in_its_one_form(name, read):
    given, expected = TURNS[name]
    case = read.one(SFT, {"messages": [given, user("R"), assistant("A")]})
    assert case.prompt == [expected, user("R")]


@pytest.mark.parametrize("role", ["tool", "function", "observation", "tool_response", "Tool"])
def test_results_of_tools(role, read):
    turns = [user("Q"), assistant("", tool_calls=[CALL])]
    case = read.one(SFT, {"messages": [*turns, {"role": role, "content": "4"}, assistant("A")]})
    assert case.completions == [[turns[1], tool("4"), assistant("A")]]
    assert (f"read: role {role} as tool (1)" in "".join(read.notes)) == (role != "tool")


def test_calls_that_are_messages_of_their_own(read):
    """ShareGPT's function_call: the calls belong to the reply before them, and to one another."""
    one, two = ({"from": "function_call", "value": json.dumps(call(n)["function"])} for n in "ab")
    talk = [{"from": "human", "value": "Q"}, one, two, {"from": "observation", "value": "4"}]
    talk += [{"from": "gpt", "value": "A"}]
    expected = [assistant("", tool_calls=[call("a"), call("b")]), tool("4"), assistant("A")]
    assert read.one(SFT, {"conversations": talk}).completions == [expected]
    talk.insert(1, {"from": "gpt", "value": "<think>T</think>Wait."})
    expected[0] = assistant("Wait.", reasoning_content="T", tool_calls=[call("a"), call("b")])
    assert read.one(SFT, {"conversations": talk}).completions == [expected]
    talk[2] = {**one, "loss": False}
    refused(read, SFT, {"conversations": talk}, "message 3", "as its reply does")


DEEP = reduce(lambda inner, _: [inner], range(150), 1)
BAD_MESSAGES = {
    "two thoughts": (assistant("A", thinking="T", reasoning="U"), "two thoughts", "disagree"),
    "a think and another thought": (assistant("<think>T</think>A", thinking="U"), "two thoughts"),
    "a thought that is no text": (assistant("A", thinking=["T"]), "thought is a list", "string"),
    "two calls": (assistant("", tool_calls=[CALL], function_call={"name": "g"}), "two sets of"),
    "a call and another": (assistant(TEXT, tool_calls=[call("g")]), "two sets of tool calls"),
    "1 is not true": (
        assistant("", tool_calls=[call(n=1)], function_call=call(n=True)["function"]), "disagree"),
    "a call of another kind": (
        assistant("", tool_calls=[{"type": "custom", "name": "f"}]), "keys type, name"),
    "a call with other keys": (
        assistant("", tool_calls=[{"name": "f", "parameters": {}}]), "keys name, parameters"),
    "a call without a name": (assistant("", tool_calls=[{"arguments": {}}]), '{"name": ..., '),
    "a call that is a number": (assistant("", tool_calls=[1]), "tool_calls: a number"),
    "calls that are a number": (assistant("", tool_calls=1), "tool_calls: a number"),
    "a name that is no text": (assistant("", tool_calls=[{"name": 1}]), "a function's name"),
    "arguments that are a list": (
        assistant("", tool_calls=[{"name": "f", "arguments": "[]"}]), "a list", "an object"),
    "arguments that are broken": (
        assistant("", tool_calls=[{"name": "f", "arguments": '{"a": '}]), "tool_calls", "cut off"),
    "arguments that say twice": (
        assistant("", tool_calls=[{"name": "f", "arguments": '{"a": 1, "a": 2}'}]), "twice"),
    "arguments that are not finite": (
        assistant("", tool_calls=[{"name": "f", "arguments": '{"a": NaN}'}]), "finite"),
    "arguments with half a pair": (
        assistant("", tool_calls=[{"name": "f", "arguments": '{"a": "\\ud800"}'}]), "surrogate"),
    "deep arguments": (assistant("", tool_calls=[call(a=DEEP)]), "nested too deep"),
    "deep arguments in JSON": (
        assistant("", tool_calls=[{"name": "f", "arguments": json.dumps({"a": DEEP})}]), "deep"),
    "a role that calls nothing": ({"from": "function_call", "value": "go"}, "the call", "expected"),
    "null": (assistant(None), "content is null", "a string"),
    "null beside an empty thought": (assistant(None, thinking=""), "content is null"),
    "images": (assistant("A", images=["a.png"]), "message 2: images: a list", "text alone"),
    "audio": (assistant("A", audio={"id": 1}), "audio: an object", "text alone"),
    "a part that thinks": (
        assistant([{"type": "thinking", "thinking": "T"}]), "part 1: 'thinking'", "a text"),
    "a part that is null": (assistant([None]), "part 1: 'null'"),
    "a part without text": (assistant([{"type": "text", "text": None}]), "part 1: 'text'"),
    "a part with a picture": (
        assistant([{"type": "text", "text": "A", "image_url": {"url": "u"}}]), "image_url"),
    "weight 2": (assistant("A", weight=2), "weight is 2", "0 or 1"),
    "train no": (assistant("A", train="no"), "train is 'no'", "0 or 1"),
    "flags that disagree": (assistant("A", train=True, weight=0), "weight and train disagree"),
    "a role unknown": ({"role": "bot", "content": "A"}, "role is 'bot'"),
    "a role that is a list": ({"role": ["assistant"], "content": "A"}, "role is ['assistant']"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages(name, read):
    message, *words = BAD_MESSAGES[name]
    refused(read, SFT, {"messages": [user("Q"), message]}, "message 2", *words)


@pytest.mark.parametrize("more", [{"reasoning": "T"}, {"tool_calls": [CALL]}, {"weight": 1}])
def test_what_only_a_reply_has(more, read):
    [key] = more
    refused(read, SFT, {"messages": [user("Q", **more), assistant("A")]}, "message 1", key)


def test_a_pair_may_differ_in_its_calls_or_thoughts_only(read):
    for one, two in (
        (assistant("", tool_calls=[call(n=1)]), assistant("", tool_calls=[call(n=2)])),
        (assistant("", tool_calls=[call(n=1)]), assistant("", tool_calls=[call(n=True)])),
        (assistant("A", thinking="T"), assistant("A", thinking="U")),
        (assistant("A"), assistant("A", thinking="U")),
    ):
        assert len(read(DPO, {"prompt": "Q", "chosen": [one], "rejected": [two]})) == 1
        assert not read(DPO, {"prompt": "Q", "chosen": [one], "rejected": [one]})
        assert read.count["chosen equal to rejected"] == 1


# ------------------------------------------------------------------------------------------- tools

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TOOLS = {
    "list": [TOOL], "JSON": json.dumps([TOOL]), "a list of JSON": [json.dumps(TOOL)],
    "null keys of datasets": [{**TOOL, "strict": None}],
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
def test_tools(name, read):
    row = {"messages": [user("Q"), assistant("A")], "tools": TOOLS[name]}
    assert read.one(SFT, row).tools == [TOOL] and not read.notes
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B", "tools": TOOLS[name]}
    assert read.one(DPO, pair).tools == [TOOL]
    assert [case.tools for case in read(KTO, pair)] == [[TOOL], [TOOL]]
    assert read.one(SFT, {"prompt": "Q", "completion": "A", "functions": TOOLS[name]}).tools == [
        TOOL
    ]


@pytest.mark.parametrize("nothing", [None, "", [], "[]", "null"])
def test_no_tools(nothing, read):
    case = read.one(SFT, {"prompt": "Q", "completion": "A", "tools": nothing})
    assert case.tools == [] and not read.notes


@pytest.mark.parametrize("bad", [1, {}, {"a": 1}, ["f"], [1], "f", [[]], [DEEP]])
def test_bad_tools(bad, read):
    if bad:
        refused(read, SFT, {"prompt": "Q", "completion": "A", "tools": bad}, "tools")


def test_null_stays_in_tools_that_are_text(read):
    tools = json.dumps([{"name": "f", "default": None}])
    row = {"prompt": "Q", "completion": "A", "tools": tools}
    assert read.one(SFT, row).tools == [{"name": "f", "default": None}]


# ------------------------------------------------------------------------------- which turns train

NOT = {"train": False}


@pytest.mark.parametrize("key", ["weight", "train", "loss", "loss_mask", "trainable"])
@pytest.mark.parametrize("no, yes", [(0, 1), (False, True), (0.0, 1.0), (0, None)])
def test_flags_of_messages(key, no, yes, read):
    turns = [user("P"), assistant("A", **{key: no}), user("Q"), assistant("B", **{key: yes})]
    turns += [user("R"), assistant("C", **{key: no}), user("S"), assistant("D")]
    case = read.one(SFT, {"messages": turns})
    assert case.prompt == [user("P"), assistant("A", **NOT), user("Q")]
    assert case.completions == [
        [assistant("B"), user("R"), assistant("C", **NOT), user("S"), assistant("D")]
    ]
    row = {"prompt": turns[:3], "chosen": turns[3:6] + turns[6:], "rejected": "E"}
    case = read.one(DPO, row)
    assert case.completions[0][2] == assistant("C", **NOT) and "train" not in case.completions[0][0]
    assert read(SFT, {"messages": turns[:2]}) == []
    assert read.count == {"rows": 1, "no reply that trains": 1}
    assert describe(read.count) == "1 rows, 0 examples; 1 skipped: no reply that trains"
    assert read(KTO, {"messages": turns[:2], "label": True}) == []
    assert read(DPO, {"prompt": "Q", "chosen": "A", "rejected": turns[1:2]}) == []
    assert read.count == {"rows": 1, "no reply that trains": 1}


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_column_loss_mask(column, read):
    turns = [user("P"), assistant("A"), user("Q"), assistant("B", train=True)]
    for mask in ([0, 0, 0, 1], [False, False, False, True], "[0, 0, 0, 1]"):
        case = read.one(SFT, {column: turns, "loss_mask": mask})
        assert case.completions == [[assistant("B")]] and case.prompt[1] == assistant("A", **NOT)
    assert len(read.one(SFT, {column: turns, "loss_mask": []}).completions[0]) == 3
    refused(read, SFT, {column: turns, "loss_mask": [0, 1]}, "loss_mask: 2 entries", "4")
    refused(read, SFT, {column: turns, "loss_mask": [0, 1, 0, 0]}, "message 4", "disagree")
    refused(read, SFT, {column: turns, "loss_mask": [1, 1, 0, 1]}, "message 1", "loss_mask is 1")
    refused(read, SFT, {column: turns, "loss_mask": [0, 2, 0, 1]}, "loss_mask is 2", "0 or 1")
    refused(read, SFT, {"prompt": "Q", "completion": "A", "loss_mask": [1]}, "beside prompt")


def test_train_on_the_last_reply(read):
    turns = [user("P"), assistant("A"), user("Q"), assistant("B")]
    for row in ({"messages": turns}, {"prompt": "P", "completion": turns[1:]}):
        [reply] = read.one(SFT, row, train_on="last_reply").completions
        assert [m for m in reply if m["role"] == "assistant" and "train" not in m] == [turns[3]]
    turns[3] = assistant("B", weight=0)  # the last one is context, and so are the others
    assert read(SFT, {"messages": turns}, train_on="last_reply") == []


def test_empty_context_is_no_empty_completion(read):
    turns = [
        user("P"),
        assistant("A"),
        user("Q"),
        assistant("", weight=0),
        user("R"),
        assistant("B"),
    ]
    assert len(read(SFT, {"messages": turns})) == 1
    turns[3] = assistant("")
    assert read(SFT, {"messages": turns}) == [] and read.count["empty completion"] == 1


# ----------------------------------------------------------------------------------- ranked replies


def texts(case):
    return [reply[-1]["content"] for reply in case.completions]


RANKED = {  # the row, the replies from the best on, their ranks
    "alpaca": ({"instruction": "Q", "output": ["A", "B", "C"]}, "ABC", [0, 1, 2]),
    "a pair of alpaca": ({"instruction": "Q", "output": ["A", "B"]}, "AB", [0, 1]),
    "responses": ({"prompt": "Q", "responses": ["A", "B", "C"]}, "ABC", [0, 1, 2]),
    "prompt of messages": (
        {"prompt": [user("Q")], "responses": [[assistant("A")], "B"]}, "AB", [0, 1]),
    "scores": (
        {"prompt": "Q", "responses": ["A", "B", "C"], "scores": [0.5, 3, -1]},
        "BAC", [-3, -0.5, 1]),
    "scores that tie": (
        {"prompt": "Q", "responses": ["A", "B", "C"], "scores": [1, 2, 1]}, "BAC", [-2, -1, -1]),
    "UltraFeedback": (
        {"instruction": "Q", "completions": [{"response": "A", "overall_score": 2, "model": "m"},
                                             {"response": "B", "overall_score": 4.5}]},
        "BA", [-4.5, -2]),
    "Nectar": (
        {"prompt": "Q", "answers": [{"answer": "A", "rank": 2}, {"answer": "B", "rank": 1}]},
        "BA", [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKED)
def test_ranked_replies(name, read):
    row, replies, ranks = RANKED[name]
    case = read.one(DPO, row)
    assert "".join(texts(case)) == replies and case.ranks == ranks and case.prompt == [user("Q")]
    if len(replies) > 2:
        refused(read, KTO, row, f"{len(replies)} replies", "expected two")
    else:
        labels = [(texts(case)[0], case.label, case.ranks) for case in read(KTO, row)]
        assert labels == [(replies[0], True, None), (replies[1], False, None)]
    assert method_of(write(read.folder, [row])) == "dpo"


def test_ranked_replies_without_a_pair(read):
    row = {"prompt": "Q", "responses": ["A", "B"], "scores": [1, 1]}
    for layouts in (DPO, KTO):
        assert read(layouts, row) == [] and read.count["no reply above another"] == 1
    assert read(DPO, {"prompt": "Q", "responses": ["A", "A", "A"]}) == []
    assert read.count["chosen equal to rejected"] == 1
    assert read(DPO, {"prompt": "Q", "responses": ["A", "", " "]}) == []
    assert read.count == {"rows": 1, "empty completion": 1}


def test_an_empty_reply_leaves_the_others(read):
    row = {"prompt": "Q", "responses": ["A", "", "B"], "scores": [1, 9, 2]}
    case = read.one(DPO, row)
    assert texts(case) == ["B", "A"] and case.ranks == [-2, -1]
    assert read.count == {"rows": 1, "empty replies left out": 1}
    assert describe(read.count) == "1 rows, 0 examples; 1 empty replies left out"


BAD_RANKS = {
    "no replies": ({"responses": []}, "a list of 0", "two replies"),
    "one reply": ({"responses": ["A"]}, "a list of 1", "two replies"),
    "one output": ({"output": ["A"]}, "a list of 1", "two replies"),
    "an object": ({"responses": {"a": "A"}}, "responses: an object"),
    "too few scores": ({"responses": ["A", "B"], "scores": [1]}, "2 numbers"),
    "a score that is null": (
        {"responses": ["A", "B"], "scores": [1, None]},
        "scores: expected 2 numbers",
    ),
    "a score that is true": ({"responses": ["A", "B"], "scores": [1, True]}, "2 numbers"),
    "a score without end": ({"responses": ["A", "B"], "scores": [1, 10**400]}, "2 numbers"),
    "a score that is text": ({"responses": ["A", "B"], "scores": [1, "2"]}, "2 numbers"),
    "a reply that is null": ({"responses": ["A", None]}, "responses, reply 2: null"),
    "no rank": ({"answers": [{"answer": "A"}]}, "answers", "answer and rank"),
    "no objects": ({"completions": ["A"]}, "completions", "response and overall_score"),
}


@pytest.mark.parametrize("name", BAD_RANKS)
def test_bad_ranks(name, read):
    more, *words = BAD_RANKS[name]
    asked = "instruction" if more.keys() & {"output", "completions"} else "prompt"
    refused(read, DPO, {asked: "Q", **more}, *words)


# ------------------------------------------------------------------------------- forms people have

CHAT = [system("S"), user("P"), assistant("O"), user("Q"), assistant("A")]
OTHER = [*CHAT[:-1], assistant("B")]
DPO_FORMS = {
    "prompt beside conversations with a system turn": (
        {"prompt": "P", "chosen": [system("S"), user("P"), assistant("A")],
         "rejected": [system("S"), user("P"), assistant("B")]}, CHAT[:2]),
    "OpenAI": (
        {"input": {"messages": CHAT[:-1], "tools": [], "parallel_tool_calls": True},
         "preferred_output": CHAT[-1:], "non_preferred_output": [assistant("B")]}, CHAT[:-1]),
    "ms-swift, a text": ({"messages": CHAT, "rejected_response": "B"}, CHAT[:-1]),
    "ms-swift, messages": (
        {"messages": CHAT, "rejected_response": [assistant("B")]}, CHAT[:-1]),
    "ms-swift, a conversation": ({"messages": CHAT, "rejected_messages": OTHER}, CHAT[:-1]),
    "ms-swift, only a reply": (
        {"messages": CHAT, "rejected_messages": [assistant("B")]}, CHAT[:-1]),
    "LLaMA-Factory, ShareGPT": (
        {"system": "S", "conversations": [{"from": "human", "value": "P"}],
         "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
        CHAT[:2]),
    "LLaMA-Factory, alpaca": (
        {"system": "S", "instruction": "P", "input": "", "chosen": "A", "rejected": "B"}, CHAT[:2]),
    "history": (
        {"system": "S", "instruction": "Q", "history": [["P", "O"]], "output": ["A", "B"]},
        CHAT[:-1]),
    "arena": (
        {"id": 1, "conversation_a": OTHER, "conversation_b": CHAT, "winner": "model_b"}, CHAT[:-1]),
}  # fmt: skip


@pytest.mark.parametrize("name", DPO_FORMS)
def test_pairs_of_others(name, read):
    row, prompt = DPO_FORMS[name]
    case = read.one(DPO, row)
    assert case.prompt == prompt and texts(case) == ["A", "B"]
    assert [(texts(c), c.label) for c in read(KTO, row)] == [(["A"], True), (["B"], False)]
    assert method_of(write(read.folder, [row])) == "dpo"


def test_openai_tools(read):
    row = {"input": {"messages": [user("Q")], "tools": [TOOL]}, "preferred_output": "A",
           "non_preferred_output": [assistant(None, tool_calls=[CALL])]}  # fmt: skip
    case = read.one(DPO, row)
    assert case.tools == [TOOL] and case.completions[1] == [assistant("", tool_calls=[CALL])]
    refused(read, DPO, {**row, "input": "Q"}, "input: null")
    refused(read, DPO, {**row, "input": {}}, "input: null")


def test_arena_ties(read):
    row = {"conversation_a": CHAT, "conversation_b": OTHER, "winner": "tie"}
    for winner in ("tie", "both_bad"):
        assert read(DPO, {**row, "winner": winner}) == []
        assert read.count["no reply above another"] == 1
    refused(read, DPO, {**row, "winner": None}, "winner", "model_a")


def test_history(read):
    row = {"instruction": "Q", "input": "I", "output": "A", "history": [["O", "<think>T</think>P"]]}
    case = read.one(SFT, row)
    assert case.prompt == [user("O"), assistant("P", reasoning_content="T"), user("Q\nI")]
    for nothing in ([], None, "", "[]"):
        assert read.one(SFT, {**row, "history": nothing}).prompt == [user("Q\nI")]
        assert not read.notes
    for bad in (["O", "P"], [["O"]], [[1, "P"]], [["O", None]], {"a": 1}, "O", [[["O"], "P"]]):
        refused(read, SFT, {**row, "history": bad}, "history")


LABELLED = {
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "alpaca without input": {"instruction": "Q", "output": "A"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "messages": {"messages": [user("Q"), assistant("A")]},
    "strings": {"prompt": "Q", "completion": "A"},
}


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_thumbs_of_others(name, key, read):
    for value in (True, False, 1, 0):
        row = {**LABELLED[name], key: value}
        case = read.one(KTO, row)
        assert case.label is bool(value) and texts(case) == ["A"] and case.prompt == [user("Q")]
        assert not read.notes and method_of(write(read.folder, [row])) == "kto"
    for value in (-1, 2, "true", "1", None, 0.5):
        refused(read, KTO, {**LABELLED[name], key: value}, "label is ", "true or false")


def test_sft_does_not_learn_what_was_disliked(read):
    rows = [
        {"prompt": "Q", "completion": c, "label": v} for c, v in zip("ABCD", (1, 0, True, False))
    ]
    cases = read(SFT, rows)
    assert [texts(case) for case in cases] == [["A"], ["C"]]
    assert all(case.label is None for case in cases) and not read.notes
    assert read.count == {"rows": 4, "label false": 2}
    rows = [{"prompt": "Q", "completion": "A", "label": v} for v in ("sports", 7)]
    assert len(read(SFT, rows)) == 2 and read.notes[0].endswith("not read: column label (2)")


# --------------------------------------------------------------------------------- feedback exports


def chat_of(*turns, **more):
    """Open WebUI's messages: id, parent, role, content."""
    return {
        i: {"id": i, "parentId": p, "childrenIds": [], "role": r, "content": c, **more}
        for i, p, r, c in turns
    }


def rated(message, rating, messages, chat="c"):
    return {
        "id": message + str(rating), "user_id": "u", "version": 0, "type": "rating",
        "data": {"rating": rating, "model_id": "m", "sibling_model_ids": None, "tags": []},
        "meta": {"arena": False, "chat_id": chat, "message_id": message, "message_index": 1},
        "snapshot": {"chat": {"id": chat, "chat": {"models": ["m"], "history": {
            "messages": messages, "currentId": message}}}},
    }  # fmt: skip


TREE = chat_of(
    ("1", None, "user", "P"), ("2", "1", "assistant", "O"), ("3", "2", "user", "Q"),
    ("4", "3", "assistant", "A"), ("5", "3", "assistant", "B"), ("6", "3", "assistant", "C"),
)  # fmt: skip
PATH = [user("P"), assistant("O"), user("Q")]


def test_open_webui_thumbs(read):
    rows = [rated("4", 1, TREE), rated("5", "-1", TREE), rated("2", 1, TREE)]
    cases = read(KTO, rows, "data.json")
    assert [(texts(c), c.label) for c in cases] == [(["A"], True), (["B"], False), (["O"], True)]
    assert cases[0].prompt == PATH and cases[2].prompt == PATH[:1]
    assert method_of(write(read.folder, rows)) == "kto"


def test_open_webui_siblings_are_pairs(read):
    rows = [rated("5", -1, TREE), rated("4", 1, TREE), rated("6", -1, TREE), rated("2", 1, TREE)]
    case = read.one(DPO, [*rows, rows[1]])
    assert case.prompt == PATH and texts(case) == ["A", "B", "C"] and case.ranks == [0, 1, 1]
    assert case.where.endswith("line 1")
    assert read.count == {"rows": 5, "no reply above another": 1}
    apart = [rated("4", 1, TREE), rated("5", -1, TREE, chat="another")]
    assert read(DPO, apart) == [] and read.count["no reply above another"] == 2


def test_open_webui_thoughts(read):
    html = '<details type="reasoning" done="true" duration="3">\n<summary>Thought for 3 seconds'
    html += "</summary>\n&gt; T &amp; t\n&gt; \n&gt; U\n</details>\nA"
    tree = chat_of(("1", None, "user", "Q"), ("2", "1", "assistant", html))
    expected = assistant("A", reasoning_content="T & t\n\nU")
    assert read.one(KTO, rated("2", 1, tree)).completions == [[expected]]


def test_open_webui_refused(read):
    row, loop = rated("4", 1, TREE), {**TREE, "1": {**TREE["1"], "parentId": "4"}}
    no_root = {k: v for k, v in TREE.items() if k != "1"}
    for bad, *words in (
        ({**row, "snapshot": None}, "snapshot", "Open WebUI"),
        ({k: v for k, v in row.items() if k != "snapshot"}, "snapshot", "Open WebUI"),
        (rated("4", 0, TREE), "rating", "1 or -1"),
        (rated("4", None, TREE), "rating", "1 or -1"),
        (rated("9", 1, TREE), "no 9"),
        (rated("4", 1, no_root), "no 1"),
        (rated("4", 1, loop), "message 4 follows itself"),
        (rated("3", 1, TREE), "the user's"),
        ({**row, "meta": {}}, "message_id: no message_id"),
        ({**row, "meta": None}, "meta.message_id"),
        (rated("4", 1, chat_of(("4", None, "assistant", "A"), files=[{"type": "image"}])), "files"),
    ):
        refused(read, KTO, bad, *words)


def gradio(*rows, header="conversation,index,value,flag,timestamp"):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([header.split(","), *rows])
    return out.getvalue()


def spoken(role, text):
    return {
        "role": role,
        "metadata": None,
        "content": [{"type": "text", "text": text}],
        "options": None,
    }


def test_gradio_log(read, tmp_path):
    talk = [spoken("user", "P"), spoken("assistant", "O"), spoken("user", "Q")]
    talk, path = json.dumps([*talk, spoken("assistant", "A")]), tmp_path / "log.csv"
    path.write_text(
        gradio([talk, 3, "Like", "t"], [talk, 1, "Dislike", "t"], [talk, 1, "Spam", "t"])
    )
    cases = list(read_cases([str(path)], KTO, count := Counter(), notes := []))
    assert [(texts(c), c.label) for c in cases] == [(["A"], True), (["O"], False)]
    assert cases[0].prompt == PATH and cases[0].where.endswith("line 2")
    assert count == {"rows": 3, "no reply is judged": 1}
    assert notes == [f"{path}: not read: column timestamp (3)"] and method_of(str(path)) == "kto"
    for bad in ([talk, 2, "Like", "t"], [talk, 9, "Like", "t"], [talk, -1, "Like", "t"],
                [talk, "x", "Like", "t"], ["[", 1, "Like", "t"], [talk, 1, "Like"]):  # fmt: skip
        path.write_text(gradio(bad))
        with pytest.raises(InputError, match="line 2: .*expected"):
            list(read_cases([str(path)], KTO, Counter(), []))


@pytest.mark.parametrize("columns", ["inputs outputs feedback", "messages candidates"])
def test_what_is_not_read_is_refused_by_name(columns, read):
    refused(read, KTO, dict.fromkeys(columns.split(), "x"), columns.replace(" ", ", "))


# ----------------------------------------------------------------------- what is said, once a file


def test_what_is_not_read_is_named(read):
    rows = [
        {
            "messages": [user("Q", name="Ann"), assistant("A", tool_call_id="x")],
            "id": i,
            "empty": None,
        }
        for i in range(3)
    ]
    rows[1] |= {
        "tags": ["a"],
        "messages": [{"role": "developer", "content": "S"}, *rows[1]["messages"]],
    }
    read(SFT, rows)
    file = f"{read.folder}/data.jsonl"
    assert read.notes == [
        f"{file}: not read: key name (3), key tool_call_id (3), column id (3), column tags (1)",
        f"{file}: read: role developer as system (1)",
    ]
    read(SFT, {"prompt": "Q", "completion": "A", **{f"c{i}": 1 for i in range(30)}})
    assert read.notes[0].count("column") == 12 and read.notes[0].endswith(", ...")
    read(SFT, {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": []})
    assert read.notes == []
    read(SFT, {"prompt": "Q", "completion": "A", "input": "I"})
    assert read.notes == [f"{file}: not read: column input (1)"]
    read(SFT, {"prompt": "Q", "completion": "A", "input": "I"}, input_as_system=True)
    assert read.notes == []


@pytest.mark.parametrize("column", ["images", "audios", "video", "chat_template_kwargs"])
def test_columns_that_change_the_meaning(column, read):
    refused(read, SFT, {"prompt": "Q", "completion": "A", column: ["x"]}, column, "text alone")
    for nothing in ([], None, ""):
        assert len(read(SFT, {"prompt": "Q", "completion": "A", column: nothing})) == 1


def test_spelled_markers_are_said(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"prompt": "Q", "chosen": f"A{i}", "rejected": "B"} for i in range(5)]
    rows[1]["chosen"] = rows[2]["prompt"] = "x<|im_end|>\n"
    rows[4]["rejected"] = "no <think> here"
    path = write(tmp_path, rows)
    for layouts in (DPO, KTO):
        notes = []
        read_examples([path], layouts, tokenizer, ChatML(tokenizer), notes=notes)
        [note] = notes
        assert note.startswith(f"{path}: 3 rows hold a template's markers as text")
        assert "(<|im_end|> in line 2)" in note and "--chat_template none" in note
    tokenizer.add_tokens(["##", "[INST]"])  # of other shapes too
    for text, marker in (("<a<|im_end|>", "<|im_end|>"), ("a##b", "##"), ("[x[INST]", "[INST]")):
        path = write(tmp_path, [{**rows[0], "prompt": text}])
        read_examples([path], DPO, tokenizer, ChatML(tokenizer), notes=(notes := []))
        assert f"({marker} in line 1)" in notes[0]
    rows[0] |= {"prompt": "# 1 < 2 <im_end> [1]"}
    plain = write(tmp_path, rows[:1], "plain.jsonl")
    read_examples([plain], DPO, tokenizer, ChatML(tokenizer), notes=(notes := []))
    assert notes == []


def test_full_prompts_name_the_flags(tmp_path):
    tokenizer = make_tokenizer()
    path = write(tmp_path, [{"prompt": "Q" * 2000, "completion": "A"}])
    with pytest.raises(InputError, match="--max_length or a --max_prompt_length"):
        read_examples([path], SFT, tokenizer, ChatML(tokenizer))


# ------------------------------------------------------------------------------- rows passed over

GOOD = {"prompt": "Q", "completion": "A"}
BAD = {
    "layout": {"prompt": "Q"},
    "role": {"prompt": [{"role": "bot", "content": "Q"}], "completion": "A"},
    "last turn": {"prompt": "Q", "completion": [assistant("A"), user("R")]},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("form", ["data.jsonl", "data.json"])
def test_bad_rows_are_passed_over(name, form, read):
    rows = [BAD[name], GOOD, BAD[name], GOOD]
    with pytest.raises(InputError, match=r"(line|row) 1: "):
        read(SFT, rows, form)
    with pytest.raises(InputError, match=r"(line|row) 3: "):
        read(SFT, rows, form, skip_bad_rows=1)
    assert len(read.notes) == 1
    assert len(read(SFT, rows, form, skip_bad_rows=2)) == 2
    assert read.count == {"rows": 4, "refused": 2}
    assert [re.search(r"(?:line|row) (\d)", note)[1] for note in read.notes] == ["1", "3"]
    assert all(note.startswith("passed over: ") and "expected" in note for note in read.notes)


def refuse_all(cases):
    return list(cases)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}', "{}{}"]
)
def test_bad_json_is_passed_over(text, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{text}\n{json.dumps(GOOD)}\n")
    cases = read_cases([str(path)], SFT, count := Counter(), notes := [], skip_bad_rows=1)
    assert len(list(cases)) == 1 and count["refused"] == 1 and len(notes) == 1
    assert method_of(str(path)) == "sft"
    path = tmp_path / "data.json"
    path.write_text(f"[{text}, {json.dumps(GOOD)}]")
    whole = text not in ("{", "[1]", "{}{}")  # else nobody knows where the row ends
    cases = read_cases([str(path)], SFT, Counter(), [], skip_bad_rows=1)
    if whole:
        assert len(list(cases)) == 1
    else:
        pytest.raises(InputError, list, cases)


def test_a_broken_file_is_not_passed_over(tmp_path):
    good = json.dumps(GOOD).encode() + b"\n"
    table = b"prompt,completion\nQ,A\n"
    for name, data in (
        ("a.jsonl", good + b"\xff\n"), ("a.jsonl", b""), ("a.json", b"[" + good),
        ("a.csv", table + b'Q,"A\n'), ("a.jsonl.gz", gzip.compress(good)[:-9]),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError):
            list(read_cases([str(tmp_path / name)], SFT, Counter(), [], skip_bad_rows=9))
    (tmp_path / "a.csv").write_bytes(table + b"Q\nQ,A,A\nQ,A\n")
    cases = read_cases([str(tmp_path / "a.csv")], SFT, count := Counter(), [], skip_bad_rows=9)
    assert len(list(cases)) == 2 and count["refused"] == 2


def test_what_the_template_refuses_is_passed_over(tmp_path):
    tokenizer = make_tokenizer()

    class Grumpy(ChatML):
        def pieces(self, messages, *given):
            if messages[0]["content"] == "bad":
                raise InputError("says no; expected another")
            return super().pieces(messages, *given)

    rows = [{"prompt": text, "completion": "A"} for text in ("Q", "bad", "R")]
    given = [write(tmp_path, rows)], SFT, tokenizer, Grumpy(tokenizer)
    examples, count = read_examples(*given, skip_bad_rows=1, notes=(notes := []))
    assert len(examples) == 2 and "1 skipped: refused" in describe(count)
    assert "line 2: says no" in notes[0]
    with pytest.raises(InputError, match="line 2: says no"):
        read_examples(*given)


# ------------------------------------------------------------------------- files of other kinds

ROWS = [GOOD, {"prompt": "R", "completion": "B"}]


def contents(sources, layouts=SFT, **how):
    return [(texts(c), c.where) for c in read_cases(sources, layouts, Counter(), [], **how)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_gzip(name, tmp_path):
    text = "prompt,completion\nQ,A\nR,B\n" if name.endswith("csv") else None
    path = tmp_path / name
    path.write_text(text) if text else write(tmp_path, ROWS, name)
    packed = tmp_path / (name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    places = [where.replace(str(path), str(packed)) for _, where in contents([str(path)])]
    assert contents([str(packed)]) == list(zip((["A"], ["B"]), places))
    assert method_of(str(packed)) == "sft"


def test_labels_in_packed_csv(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"prompt,completion,label\nQ,A,TRUE\nQ,B,0\n"))
    assert [c.label for c in read_cases([str(path)], KTO, Counter(), [])] == [True, False]


def test_patterns(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "[c].jsonl", "d.txt"):
        write(tmp_path, [{"prompt": "Q", "completion": name}], name)
    read = [text for [text], _ in contents([f"{tmp_path}/*.jsonl"])]
    assert read == ["[c].jsonl", "a.jsonl", "b.jsonl"]
    assert [t for [t], _ in contents([f"{tmp_path}/[c].jsonl"])] == ["[c].jsonl"]
    assert method_of(f"{tmp_path}/*.jsonl") == "sft"
    with pytest.raises(InputError, match="no such file"):
        contents([f"{tmp_path}/*.csv"])


def test_tables(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    path = str(tmp_path / "a.parquet")
    table.to_parquet(path)
    assert contents([path]) == [(["A"], f"{path}, row 1"), (["B"], f"{path}, row 2")]
    assert method_of(path) == "sft"
    folder = str(tmp_path / "saved")
    table.save_to_disk(folder)
    assert contents([folder]) == [(["A"], f"{folder}, row 1"), (["B"], f"{folder}, row 2")]
    many = str(tmp_path / "many")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(many)
    assert contents([many], split="test") == [(["B"], f"{many}, row 1")]
    with pytest.raises(InputError, match="no split validation; expected one of: train, test"):
        contents([many], split="validation")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="broken.parquet: it can't be read"):
        contents([str(tmp_path / "broken.parquet")])
    with pytest.raises(InputError, match="No such file"):
        contents([str(tmp_path / "none.parquet")])
    with pytest.raises(InputError, match="Is a directory"):
        contents([str(tmp_path)])
    with pytest.raises(InputError, match="too long"):
        contents([str(tmp_path / ("x" * 999 + ".jsonl"))])


def test_datasets_fills_keys_with_null(tmp_path):
    """Rows that have passed through the library are read as they were before."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [user("Q"), assistant("", tool_calls=[call("a", town="Oslo")]), tool("4"),
                      assistant("A", thinking="T")], "tools": [TOOL]},
        {"messages": [user("Q"), assistant("", tool_calls=[call("b", n=1), call("c", m=[1])]),
                      tool("4"), assistant("B")], "tools": []},
    ]  # fmt: skip
    plain = list(read_cases([write(tmp_path, rows)], SFT, Counter(), []))
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    notes = []
    filled = list(read_cases([path], SFT, Counter(), notes))
    assert [(c.prompt, c.completions, c.tools) for c in filled] == [
        (c.prompt, c.completions, c.tools) for c in plain
    ]
    assert notes == []


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_tables_without_the_library(name, tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)  # import fails
    with pytest.raises(InputError, match=r"to read it: pip install 'nanoalign\[hub\]'"):
        contents([str(tmp_path / name)])
