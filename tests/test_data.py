"""Every layout reads as the conversation that was meant; a bad row is one line, or is counted."""

import csv
import json
import sys
import types
from collections import Counter
from functools import reduce

import pytest
import torch
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import call, metrics, write_rows
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from nanoalign import InputError
from nanoalign.chatml import IM_END, ChatML
from nanoalign.data import (
    Case,
    Limits,
    epoch_order,
    make_example,
    make_examples,
    with_mismatches,
)
from nanoalign.formats.layouts import DPO, KTO, SFT, answered, describe, read_examples
from nanoalign.packing import Example
from nanoalign.tools.data import method_of
from nanoalign.train import fitting


def message(role, content):
    return {"role": role, "content": content}


def user(content):
    return message("user", content)


def assistant(content):
    return message("assistant", content)


def human(content):
    return {"from": "human", "value": content}


def gpt(content):
    return {"from": "gpt", "value": content}


SYSTEM = message("system", "S")


def chatml(*messages, header=True):
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + "<|im_start|>assistant\n" * header


def write(folder, rows, kind="jsonl"):
    path = folder / f"data.{kind}"
    if kind.lower() == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def read(tokenizer, tmp_path):
    """rows -> (examples, count), through a file."""

    def read(layouts, rows, kind="jsonl", input_as_system=False, **limits):
        path = write(tmp_path, rows, kind)
        limits = Limits(**{"max_length": None, **limits})
        template = ChatML(tokenizer)
        return read_examples(
            [path], layouts, tokenizer, template, limits, input_as_system=input_as_system
        )

    return read


@pytest.fixture
def shown(tokenizer):
    """An example as text: (prompt, [completion, ...], label); what does not train in {}."""

    def completion(ids, mask):
        runs, text = [], ""
        for i, trains in zip(ids, mask):
            if not runs or runs[-1][1] != trains:
                runs.append(([], trains))
            runs[-1][0].append(i)
        for run, trains in runs:
            part = tokenizer.decode(run, clean_up_tokenization_spaces=False)
            text += part if trains else f"{{{part}}}"
        return text

    def shown(example):
        prompt = tokenizer.decode(example.prompt, clean_up_tokenization_spaces=False)
        return prompt, [completion(*c) for c in example.texts], example.label

    return shown


# -------------------------------------------------------------------------------------- layouts

Q, QS = chatml(user("Q")), chatml(SYSTEM, user("Q"))
A, B = f"A{IM_END}", f"B{IM_END}"
TURN = "{" + f"\n{chatml(user('R'))}" + "}"  # between two replies of one conversation
SFT_ROWS = {
    "messages": ({"messages": [user("Q"), assistant("A")]}, Q, A),
    "messages with system": ({"messages": [SYSTEM, user("Q"), assistant("A")]}, QS, A),
    "every reply of messages trains": (
        {"messages": [user("Q"), assistant("A"), user("R"), assistant("B")]}, Q, A + TURN + B),
    "messages and a system column": (
        {"messages": [user("Q"), assistant("A")], "system": "S"}, QS, A),
    "strings": ({"prompt": "Q", "completion": "A"}, Q, A),
    "strings and a system column": ({"system": "S", "prompt": "Q", "completion": "A"}, QS, A),
    "message lists": ({"prompt": [user("Q")], "completion": [assistant("A")]}, Q, A),
    "list and string": ({"prompt": [SYSTEM, user("Q")], "completion": "A"}, QS, A),
    "string and list": ({"prompt": "Q", "completion": [assistant("A")]}, Q, A),
    "only the completion trains": (
        {"prompt": [user("P"), assistant("O"), user("Q")], "completion": "A"},
        chatml(user("P"), assistant("O"), user("Q")), A),
    "completion of several turns": (
        {"prompt": "Q", "completion": [assistant("A"), user("R"), assistant("B")]},
        Q, A + TURN + B),
    "completion with its prompt": (
        {"prompt": "Q", "completion": [user("Q"), assistant("A")]}, Q, A),
    "alpaca": ({"instruction": "Q", "output": "A"}, Q, A),
    "alpaca, empty input": ({"instruction": "Q", "input": "", "output": "A"}, Q, A),
    "alpaca, null input": ({"instruction": "Q", "input": None, "output": "A"}, Q, A),
    "alpaca with input": (
        {"instruction": "Q", "input": "I", "output": "A"}, chatml(user("Q\nI")), A),
    "alpaca, input alone": (
        {"instruction": "", "input": "I", "output": "A"}, chatml(user("I")), A),
    "alpaca with system": (
        {"system": "S", "instruction": "Q", "input": "I", "output": "A"},
        chatml(SYSTEM, user("Q\nI")), A),
    "alpaca, list and input": (
        {"instruction": [SYSTEM, user("Q")], "input": "I", "output": "A"},
        chatml(SYSTEM, user("Q\nI")), A),
    "question": ({"system": "S", "question": "Q", "chosen": "A"}, QS, A),
    "question, empty system": ({"system": "", "question": "Q", "chosen": "A"}, Q, A),
    "sharegpt": ({"conversations": [human("Q"), gpt("A")]}, Q, A),
    "sharegpt with system": (
        {"conversations": [{"from": "system", "value": "S"}, human("Q"), gpt("A")]}, QS, A),
    "sharegpt and a system column": (
        {"conversations": [human("Q"), gpt("A")], "system": "S"}, QS, A),
    "sharegpt, roles of the others": (
        {"conversations": [user("Q"), {"from": "assistant", "value": "A"}]}, Q, A),
    "tool": (
        {"messages": [user("Q"), assistant("A"), message("tool", "T"), assistant("B")]},
        Q, A + "{\n" + chatml(user("<tool_response>\nT\n</tool_response>")) + "}" + B),
    "two users in a row": (
        {"messages": [user("Q"), user("R"), assistant("A")]}, chatml(user("Q"), user("R")), A),
    "more columns than needed": ({"id": 7, "prompt": "Q", "completion": "A", "tag": None}, Q, A),
    "an input that its layout has no place for": (
        {"prompt": "Q", "completion": "A", "input": ["I"]}, Q, A),
    "first replies of weight 0": (
        {"messages": [user("P"), {**assistant("O"), "weight": 0}, user("Q"),
                      {**assistant("A"), "weight": 1}, user("R"), assistant("B")]},
        chatml(user("P"), assistant("O"), user("Q")), A + TURN + B),
    "sharegpt weights": (
        {"conversations": [{"from": "system", "value": "S", "weight": None},
                           {**human("Q"), "weight": 0}, {**gpt("A"), "weight": 1.0}]}, QS, A),
}  # fmt: skip
DPO_ROWS = {
    "strings": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "message lists": {
        "prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
    "mixed": {"prompt": "Q", "chosen": [assistant("A")], "rejected": "B"},
    "prompt repeated": {
        "prompt": "Q", "chosen": [user("Q"), assistant("A")],
        "rejected": [user("Q"), assistant("B")]},
    "prompt repeated once": {
        "prompt": [user("Q")], "chosen": [user("Q"), assistant("A")], "rejected": "B"},
    "implicit": {
        "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
    "alpaca": {"instruction": "Q", "input": "", "output": ["A", "B"]},
    "alpaca, mixed": {"instruction": [user("Q")], "output": ["A", [assistant("B")]]},
    "orca": {"question": "Q", "chosen": "A", "rejected": "B"},
    "sharegpt": {"conversations": [human("Q")], "chosen": gpt("A"), "rejected": gpt("B")},
    "sharegpt lists": {"conversations": [human("Q")], "chosen": [gpt("A")], "rejected": "B"},
}  # fmt: skip
KTO_ROWS = {
    "strings": {"prompt": "Q", "completion": "A"},
    "message lists": {"prompt": [user("Q")], "completion": [assistant("A")]},
    "mixed": {"prompt": [user("Q")], "completion": "A"},
    "messages": {"messages": [user("Q"), assistant("A")]},
}


def formats(rows):
    """The formats that can hold these rows: a CSV has strings only."""
    flat = all(isinstance(v, str) for row in rows for v in row.values())
    return ["json", "jsonl", *(["csv", "CSV"] if flat else [])]


@pytest.mark.parametrize("name", SFT_ROWS)
def test_sft_layouts(name, read, shown):
    row, prompt, completion = SFT_ROWS[name]
    for kind in formats([row]):
        [example], count = read(SFT, [row], kind)
        assert shown(example) == (prompt, [completion], None)
        assert count == Counter(rows=1, examples=1)


@pytest.mark.parametrize("name", DPO_ROWS)
def test_dpo_layouts(name, read, shown):
    row = DPO_ROWS[name]
    for kind in formats([row]):
        [example], _ = read(DPO, [row], kind)
        assert shown(example) == (Q, [A, B], None)
        [example], _ = read(DPO, [{**row, "system": "S"}], kind)
        assert shown(example) == (QS, [A, B], None)


@pytest.mark.parametrize("name", DPO_ROWS)
def test_a_copy_of_a_method_trains_the_same_tokens(read, shown, name):
    """What a method's layouts mean is said by value: it is not the object that decides."""
    turns = [user("Q"), assistant("A"), user("R"), assistant("B")]
    for layouts, row in (
        (SFT, {"messages": turns}),
        (KTO, {"messages": turns, "label": True}),
        (KTO, DPO_ROWS[name]),
    ):
        copy = dict(layouts)
        assert copy is not layouts and copy == layouts
        expected = [shown(e) for e in read(layouts, [row])[0]]
        assert [shown(e) for e in read(copy, [row])[0]] == expected


@pytest.mark.parametrize("name", DPO_ROWS)
def test_a_pair_is_two_single_labels(name, read, shown):
    for kind in formats([DPO_ROWS[name]]):
        examples, count = read(KTO, [DPO_ROWS[name]], kind)
        assert [shown(e) for e in examples] == [(Q, [A], True), (Q, [B], False)]
        assert count == Counter(rows=1, examples=2)
        assert [e.number for e in examples] == [0, 1]
        assert examples[0].where == examples[1].where


@pytest.mark.parametrize("name", KTO_ROWS)
def test_kto_layouts(name, read, shown):
    for label in (True, False):
        for kind in ("json", "jsonl"):
            [example], _ = read(KTO, [{**KTO_ROWS[name], "label": label}], kind)
            assert shown(example) == (Q, [A], label)


def test_kto_of_a_conversation_judges_its_last_reply(read, shown):
    turns = [user("Q"), assistant("A"), user("R"), assistant("B")]
    [example], _ = read(KTO, [{"messages": turns, "label": True}])
    assert shown(example) == (chatml(*turns[:3]), [B], True)


def test_implicit_prompt_of_several_turns(read, shown):
    shared = [SYSTEM, user("P"), assistant("O"), user("Q")]
    row = {"chosen": [*shared, assistant("A")], "rejected": [*shared, assistant("B")]}
    assert shown(read(DPO, [row])[0][0]) == (chatml(*shared), [A, B], None)


def test_implicit_prompt_ends_at_the_first_difference(read, shown):
    chosen = [user("Q"), assistant("A"), user("R"), assistant("B")]
    rejected = [user("Q"), assistant("B"), user("R"), assistant("B")]
    [example], _ = read(DPO, [{"chosen": chosen, "rejected": rejected}])
    assert shown(example) == (Q, [A + TURN + B, B + TURN + B], None)


@pytest.mark.parametrize("swap", [False, True])
def test_implicit_prompt_when_one_conversation_begins_the_other(read, shown, swap):
    short = [user("Q"), assistant("A")]
    pair = [short, [*short, user("R"), assistant("B")]]
    expected = [A, A + TURN + B]
    names = ("rejected", "chosen") if swap else ("chosen", "rejected")
    [example], _ = read(DPO, [dict(zip(names, pair))])
    assert shown(example) == (Q, expected[::-1] if swap else expected, None)


def test_input_as_system(read, shown):
    row = {"instruction": "Q", "input": "S"}
    [sft], _ = read(SFT, [{**row, "output": "A"}], input_as_system=True)
    assert shown(sft) == (QS, [A], None)
    [dpo], _ = read(DPO, [{**row, "output": ["A", "B"]}], input_as_system=True)
    assert shown(dpo) == (QS, [A, B], None)
    [sft], _ = read(SFT, [{**row, "input": "", "output": "A"}], input_as_system=True)
    assert shown(sft) == (Q, [A], None)
    with pytest.raises(InputError, match="system and input are both there"):
        read(SFT, [{**row, "system": "T", "output": "A"}], input_as_system=True)


def test_labels_in_csv(read):
    words = ["true", "TRUE", "True", "1", " true ", "false", "False", "FALSE", "0", "0 "]
    rows = [{"prompt": "Q", "completion": "A", "label": word} for word in words]
    examples, _ = read(KTO, rows, "csv")
    assert [e.label for e in examples] == [True] * 5 + [False] * 5
    assert [e.label for e in read(KTO, rows, "CSV")[0]] == [True] * 5 + [False] * 5


def test_several_files_each_in_its_own_layout(tokenizer, tmp_path, shown):
    (tmp_path / "b").mkdir()
    one = write(tmp_path, [{"prompt": "Q", "completion": "A"}], "csv")
    two = write(tmp_path / "b", [{"messages": [user("Q"), assistant("B")]}])
    examples, count = read_examples([one, two], SFT, tokenizer, ChatML(tokenizer))
    assert [shown(e) for e in examples] == [(Q, [A], None), (Q, [B], None)]
    assert [e.where for e in examples] == [f"{one}, line 2", f"{two}, line 1"]
    assert [e.number for e in examples] == [0, 1] and count["rows"] == 2


def test_the_first_row_tells_the_method(tmp_path):
    rows = {"sft": [row for row, *_ in SFT_ROWS.values()], "dpo": list(DPO_ROWS.values())}
    rows["kto"] = [{**row, "label": True} for row in KTO_ROWS.values()]
    for method, some in rows.items():
        for row in some:
            assert method_of(write(tmp_path, [row])) == method
    for row, method in (
        ({"prompt": "Q", "completion": None, "label": True}, "kto"),  # its error is that method's
        ({"prompt": "Q", "completion": "A", "label": "no"}, "kto"),
        ({"question": "Q", "chosen": "A", "rejected": 3}, "dpo"),
        ({"instruction": 3, "output": "A"}, "sft"),
        ({"nothing": "known"}, "sft"),
    ):
        assert method_of(write(tmp_path, [row])) == method


def test_a_layout_of_ones_own(read, shown, tmp_path, monkeypatch):
    """One entry: the columns, and what makes a case of them."""
    row = {"ask": "Q", "good": "A", "bad": "B"}
    monkeypatch.setitem(DPO, ("ask", "good", "bad"), answered)
    assert shown(read(DPO, [row])[0][0]) == (Q, [A, B], None)
    assert method_of(write(tmp_path, [row])) == "dpo"


def test_examples_without_files(tokenizer, shown):
    """Cases in, examples out: what a notebook needs."""
    cases = [
        Case([user("Q")], [[assistant("A")]]),
        Case([user("Q")], [[assistant("B" * 50)]], True),
    ]
    examples, count = make_examples(iter(cases), tokenizer, ChatML(tokenizer), Limits(40))
    prompt, [reply], label = shown(examples[1])
    assert shown(examples[0]) == (Q, [A], None) and prompt == Q and label is True
    assert reply and set(reply) == {"B"} and len(examples[1]) == 40
    assert count == {"examples": 2, "completions cut": 1} and cases[0].prompt == [user("Q")]
    assert [e.number for e in examples] == [0, 1]


def test_errors_come_in_the_order_of_the_rows(tokenizer, tmp_path):
    """What the template refuses in line 2 is said before what is malformed in line 3."""

    class Grumpy(ChatML):
        def pieces(self, messages, tools=()):
            if messages[0]["content"] == "bad":
                raise InputError("says no; use chatml")
            return super().pieces(messages, tools)

    rows = [{"prompt": text, "completion": "A"} for text in ("Q", "bad", 3)]
    with pytest.raises(InputError, match="line 2: says no"):
        read_examples([write(tmp_path, rows)], SFT, tokenizer, Grumpy(tokenizer))
    cases = [Case([user(text)], [[assistant("A")]]) for text in ("Q", "bad")]
    with pytest.raises(InputError, match="^case 2: says no"):
        make_examples(cases, tokenizer, Grumpy(tokenizer), Limits())


def test_one_batch_call_tokenizes_all(read, tokenizer, monkeypatch):
    calls, call = [], type(tokenizer).__call__
    spy = lambda self, text, **kw: calls.append(text) or call(self, text, **kw)  # noqa: E731
    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    examples, _ = read(DPO, [{"prompt": f"Q{i}", "chosen": "A", "rejected": "B"} for i in range(9)])
    assert len(examples) == 9 and len(calls) <= 4  # a few probes, then everything at once
    texts = calls[-1]
    assert len(texts) == len(set(texts)) and {"user\nQ0", "user\nQ8", "A", "B"} <= set(texts)


def test_length_counts_a_shared_prompt_in_each_sequence():
    example = Example([1, 2, 3], [([4], [True]), ([5, 6], [True, True])])
    assert len(example) == (3 + 1) + (3 + 2)


# ----------------------------------------------------------------------------------- truncation


def test_prompts_are_cut_left_or_right(read, tokenizer):
    row = {"prompt": "Q", "completion": "A"}
    [whole], _ = read(SFT, [row])
    n = len(whole.prompt)
    [end], count = read(SFT, [row], max_prompt_length=3)
    assert end.prompt == whole.prompt[-3:] and end.texts == whole.texts
    assert count == Counter({"rows": 1, "examples": 1, "prompts cut": 1})
    assert describe(count) == "1 rows, 1 examples; 1 prompts cut"
    [start], _ = read(SFT, [row], max_prompt_length=3, truncation_mode="keep_start")
    assert start.prompt == whole.prompt[:3] and start.texts == whole.texts
    for limit in (n, n + 1, None):
        [same], count = read(SFT, [row], max_prompt_length=limit)
        assert same.prompt == whole.prompt and "prompts cut" not in count
    [none], _ = read(SFT, [row], max_prompt_length=0)
    assert not none.prompt


def test_completions_are_cut_from_the_right(read):
    row = {"prompt": "Q", "chosen": "A B C D", "rejected": "A"}
    [whole], _ = read(DPO, [row])
    n, (chosen, rejected) = len(whole.prompt), whole.texts
    assert len(chosen[0]) > len(rejected[0]) == 2
    [fits], count = read(DPO, [row], max_length=n + len(chosen[0]))
    assert fits.texts == whole.texts and "completions cut" not in count
    [cut], count = read(DPO, [row], max_length=n + 3)
    assert cut.prompt == whole.prompt
    assert cut.texts == [(chosen[0][:3], chosen[1][:3]), rejected]
    assert describe(count) == "1 rows, 1 examples; 1 completions cut"
    [both], count = read(DPO, [row], max_prompt_length=4, max_length=7)
    assert both.prompt == whole.prompt[-4:]
    assert [ids for ids, _ in both.texts] == [chosen[0][:3], rejected[0]]
    assert describe(count) == "1 rows, 1 examples; 1 prompts cut; 1 completions cut"


def test_a_conversation_is_cut_from_the_right(read):
    """What is left ends with a trained token: nothing after it would be learned from."""
    row = {"messages": [user("Q"), assistant("A"), user("R"), assistant("B C")]}
    [whole], _ = read(SFT, [row])
    [(ids, mask)] = whole.texts
    assert mask[-1] and mask.count(True) > 4
    second = mask.index(True, 2)  # where the second reply begins
    for room in range(1, len(ids) + 1):
        [cut], count = read(SFT, [row], max_length=len(whole.prompt) + room)
        kept = room if room > second else min(room, 2)
        assert cut.texts == [(ids[:kept], mask[:kept])]
        assert count["completions cut"] == (room < len(ids))


def test_no_trained_token_left(read):
    rows = [{"prompt": "Q", "completion": "A"}, {"prompt": "Q" * 50, "completion": "A"}]
    examples, count = read(SFT, rows, max_length=40)
    assert [e.where[-6:] for e in examples] == ["line 1"]
    assert describe(count) == "2 rows, 1 examples; 1 skipped: no trained token left"
    examples, count = read(SFT, rows, max_length=40, max_prompt_length=10)
    assert len(examples) == 2 and describe(count) == "2 rows, 2 examples; 2 prompts cut"
    rows[1]["completion"] = "A" * 50  # longer than what is missing
    assert read(SFT, rows, max_length=40)[1]["no trained token left"] == 1


def test_a_pair_that_the_cut_makes_equal_is_skipped(read):
    rows = [{"prompt": "Q", "chosen": "A B C", "rejected": "A B D"}]
    rows += [{"prompt": "Q", "chosen": "C", "rejected": "D"}]
    n = len(read(DPO, rows)[0][0].prompt)
    examples, count = read(DPO, rows, max_length=n + 2)
    assert [e.where[-6:] for e in examples] == ["line 2"] and examples[0].number == 0
    assert count["chosen equal to rejected"] == 1


def test_defaults():
    assert Limits() == Limits(1024, None, "keep_end")


# ------------------------------------------------------------------------------- what is counted


def test_empty_completions_are_counted(read):
    """A reply of white space only teaches nothing either."""
    good = {"prompt": "Q", "completion": "A"}
    for empty in ("", " \n\t", "\u3000"):
        examples, count = read(SFT, [{"prompt": "Q", "completion": empty}, good])
        assert len(examples) == 1
        assert describe(count) == "2 rows, 1 examples; 1 skipped: empty completion"
    talk = [user("Q"), assistant(""), user("R"), assistant("A")]
    assert read(SFT, [{"messages": talk}, {"messages": talk[2:]}])[1]["empty completion"] == 1
    assert len(read(KTO, [{"messages": talk, "label": True}])[0]) == 1  # it is in the prompt
    pair = {"prompt": "Q", "chosen": "A", "rejected": " "}
    for layouts in (DPO, KTO):
        other = {"prompt": "Q", "chosen": "A", "rejected": "B"}
        assert read(layouts, [pair, other])[1]["empty completion"] == 1


def test_chosen_equal_to_rejected_is_counted(read):
    rows = [{"prompt": "Q", "chosen": "A", "rejected": [assistant("A")]}]
    rows += [{"prompt": "Q", "chosen": "A", "rejected": "A "}]
    for layouts, left in ((DPO, 1), (KTO, 2)):
        examples, count = read(layouts, rows)
        assert len(examples) == left
        assert describe(count).endswith("examples; 1 skipped: chosen equal to rejected")


def test_pairs_of_ranked_replies_by_hand():
    """Replies 5, 6, 7, 8 and 6 again; the fourth does not fit. Of the others 6 and 7 are tied, and
    6 is no better than 6."""
    texts = [([1, 2, reply], [False, False, True]) for reply in (5, 6, 7, 8, 6)]
    texts[3] = [1, 2, 3, 4, 8], [False] * 4 + [True]
    case, count = Case([], [[]] * 5, ranks=[3, 1, 1, 0, 2]), Counter()
    found = make_example(case, [[text] for text in texts], Limits(4), count)
    assert found.prompt == [1, 2] and found.completions is None
    assert found.texts == [([reply], [True]) for reply in (5, 6, 7, 6)]
    assert found.pairs == [(1, 0), (2, 0), (2, 3), (3, 0)]
    assert count["replies with no trained token left"] == 1 and count["pairs tied or equal"] == 2


def test_a_reply_that_does_not_fit_leaves_no_pair():
    texts, count = [([1, 2], [False, True]), ([1, 3, 4], [False, False, True])], Counter()
    assert make_example(Case([], [[], []]), [[text] for text in texts], Limits(2), count) is None
    assert count == {"no trained token left": 1}


@pytest.mark.parametrize("mode, start", [("keep_start", [1]), ("keep_end", [4])])
def test_a_prompt_is_cut_before_what_trains_in_each_text(mode, start):
    """Four tokens before the first reply trains, two before the second, and one is to stay."""
    texts = ([1, 2, 3, 4, 9], [False] * 4 + [True]), ([1, 2, 8, 9], [False] * 2 + [True] * 2)
    limits = Limits(None, 1, mode)
    found = make_example(Case([], [[], []]), [[text] for text in texts], limits, Counter())
    whole = [found.prompt + ids for ids, _ in found.texts]
    assert whole == [[*start, 9], [1, 8, 9] if mode == "keep_start" else [8, 9]]
    assert [mask.count(True) for _, mask in found.texts] == [1, 2]


def test_a_prompt_ends_where_the_texts_part():
    """Before what trains, where thoughts do not: 3 and 4 are in the texts and not in the prompt."""
    texts = ([1, 2, 3, 9, 10], [False] * 3 + [True] * 2), ([1, 2, 4, 11], [False] * 3 + [True])
    found = make_example(Case([], [[], []]), [[text] for text in texts], Limits(), Counter())
    assert found.prompt == [1, 2]
    assert found.texts == [([3, 9, 10], [False, True, True]), ([4, 11], [False, True])]


def test_no_row_left_is_an_error(read):
    with pytest.raises(InputError) as caught:
        read(SFT, [{"prompt": "Q", "completion": ""}] * 3)
    message = str(caught.value)
    assert message.endswith(
        "data.jsonl: 3 rows, 0 examples; 3 skipped: empty completion; expected a row to train on"
    )


# --------------------------------------------------------------------------------- what is refused

GOOD_ROWS = {
    "SFT prompt": {"prompt": "Q", "completion": "A"},
    "SFT messages": {"messages": [user("Q"), assistant("A")]},
    "SFT instruction": {"instruction": "Q", "output": "A"},
    "SFT question": {"question": "Q", "chosen": "A"},
    "SFT conversations": {"conversations": [human("Q"), gpt("A")]},
    "DPO prompt": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "DPO instruction": {"instruction": "Q", "output": ["A", "B"]},
    "DPO chosen": DPO_ROWS["implicit"],
    "DPO conversations": DPO_ROWS["sharegpt"],
    "KTO prompt": {"prompt": "Q", "completion": "A", "label": True},
    "KTO messages": {"messages": [user("Q"), assistant("A")], "label": True},
}


def talk(*messages):
    return "SFT messages", {"messages": list(messages)}


def prompt(**row):
    return "SFT prompt", {"prompt": "Q", "completion": "A", **row}


def pair(**row):
    return "DPO prompt", {"prompt": "Q", "chosen": "A", "rejected": "B", **row}


def thumb(label):
    return "KTO prompt", {"prompt": "Q", "completion": "A", "label": label}


ROLES = "expected system, user, assistant, tool"
DEEP = reduce(lambda inner, _: [inner], range(700), "A")
BAD_ROWS = {  # the second row of a file whose first is good: what is wrong, what was expected
    "column missing": (("SFT prompt", {"prompt": "Q"}), "no column completion", "first row"),
    "another layout": (("SFT prompt", talk()[1]), "no column prompt", "first row"),
    "empty row": (("SFT prompt", {}), "no column prompt", "first row"),
    "prompt null": (prompt(prompt=None), "prompt: null", "a string or a list of messages"),
    "prompt a number": (prompt(prompt=7), "prompt: a number", "a string or a list"),
    "prompt a dict": (prompt(prompt=user("Q")), "prompt: an object", "a string or a list"),
    "completion null": (prompt(completion=None), "completion: null", "a string or a list"),
    "completion a number": (prompt(completion=1.5), "completion: a number", "a string or"),
    "completion true": (prompt(completion=True), "completion: true or false", "a string or"),
    "completion of strings": (prompt(completion=["A"]), "message 1: a string", '{"role": ..., '),
    "completion from the user": (prompt(completion=[user("A")]), "no assistant turn", "a reply"),
    "completion begins with user": (
        prompt(completion=[user("R"), assistant("A")]), "begins with the user", "the assistant"),
    "completion without a turn": (
        prompt(completion=[]), "completion: an empty list", "at least one message"),
    "prompt without a turn": (prompt(prompt=[]), "prompt: an empty list", "at least one message"),
    "pair without a prompt": (pair(prompt=[]), "prompt: an empty list", "at least one message"),
    "chosen without a turn": (pair(chosen=[]), "chosen: an empty list", "at least one message"),
    "rejected without a turn": (pair(rejected=[]), "rejected: an empty list", "at least one"),
    "implicit, rejected without a turn": (
        ("DPO chosen", {**DPO_ROWS["implicit"], "rejected": []}), "rejected: an empty list", "one"),
    "good output without a turn": (
        ("DPO instruction", {"instruction": "Q", "output": [[], "B"]}),
        "output, reply 1: an empty list", "at least one message"),
    "thumb without a prompt": (
        ("KTO prompt", {"prompt": [], "completion": "A", "label": True}),
        "prompt: an empty list", "at least one message"),
    "sharegpt without a turn": (
        ("SFT conversations", {"conversations": []}), "conversations: an empty list", "one"),
    "prompt that answers itself": (
        prompt(prompt=[user("Q"), assistant("O")]), "turns 2 and 3 are both", "another's"),
    "completion that is its prompt": (
        prompt(prompt=[user("Q"), assistant("A")], completion=[user("Q"), assistant("A")]),
        "has no turn after the prompt", "the assistant"),
    "system null is none, but no number": (prompt(system=0), "system: a number", "a string"),
    "system a list": (prompt(system=[SYSTEM]), "system: a list", "a string"),
    "two systems": (
        prompt(system="S", prompt=[SYSTEM, user("Q")]), "turn 2 is a system turn", "it first"),
    "messages null": (("SFT messages", {"messages": None}), "messages: null", "a list of messages"),
    "messages a dict": (
        ("SFT messages", {"messages": user("Q")}), "messages: an object", "a list of messages"),
    "messages a string": (
        ("SFT messages", {"messages": "Q"}), "messages: a string", "a list of messages"),
    "messages empty": (talk(), "messages: an empty list", "at least one message"),
    "messages without a reply": (talk(user("Q")), "no assistant turn", "a reply"),
    "message null": (talk(user("Q"), None), "message 2: null", '{"role": ..., "content": ...}'),
    "message a list": (talk([]), "message 1: a list", '{"role": ..., "content": ...}'),
    "message without content": (talk({"role": "user"}), "keys role", '{"role": ..., "con'),
    "message without keys": (talk({}), "keys none", '{"role": ..., "content": ...}'),
    "content null": (talk(user("Q"), assistant(None)), "message 2: content is null", "a string"),
    "content a number": (talk(user(12), assistant("A")), "content is a number", "a string"),
    "content with a picture": (
        talk(user([{"type": "text", "text": "Q"}, {"type": "image_url", "image_url": "u"}]),
             assistant("A")), "content, part 2: 'image_url'", "a text"),
    "content of numbers": (talk(user([1]), assistant("A")), "part 1: 'a number'", "a text"),
    "unknown role": (talk(message("bot", "Q")), "message 1: role is 'bot'", ROLES),
    "role with a newline": (talk(message("a\nb\u2028", "Q")), r"'a\nb\u2028'", ROLES),
    "role endless": (talk(message("x" * 9999, "Q")), "role is 'xxx", ROLES),
    "role null": (talk(message(None, "Q")), "role is null", ROLES),
    "role a number": (talk(message(1, "Q")), "role is 1", ROLES),
    "role true": (talk(message(True, "Q")), "role is True", ROLES),
    "role unhashable": (talk(message(["user"], "Q")), "role is ['user']", ROLES),
    "role a dict": (talk(message({"user": 1}, "Q")), "role is {'user': 1}", ROLES),
    "no assistant": (talk(SYSTEM, user("Q")), "no assistant turn", "a reply"),
    "last from user": (talk(user("Q"), assistant("A"), user("R")), "is the user's", "assistant"),
    "last from tool": (
        talk(user("Q"), assistant("A"), message("tool", "T")), "turn is the tool's", "assistant"),
    "two assistants": (
        talk(user("Q"), assistant("A"), assistant("B")), "turns 2 and 3 are both", "another's"),
    "system in the middle": (
        talk(user("Q"), SYSTEM, assistant("A")), "turn 2 is a system turn", "it first"),
    "two systems first": (talk(SYSTEM, SYSTEM, assistant("A")), "turn 2 is a system turn", "first"),
    "weight of a half": (
        talk(user("Q"), {**assistant("A"), "weight": 0.5}), "message 2: weight is 0.5", "0 or 1"),
    "sharegpt unknown": (
        ("SFT conversations", {"conversations": [{"from": "bing", "value": "Q"}]}),
        "message 1: from is 'bing'", ROLES),
    "sharegpt unhashable": (
        ("SFT conversations", {"conversations": [{"from": ["human"], "value": "Q"}]}),
        "from is ['human']", ROLES),
    "sharegpt value null": (
        ("SFT conversations", {"conversations": [human(None)]}), "value is null", "a string"),
    "sharegpt without value": (
        ("SFT conversations", {"conversations": [{"from": "human"}]}), "keys from", '"role"'),
    "sharegpt a string": (
        ("SFT conversations", {"conversations": "Q"}), "conversations: a string", "a list"),
    "sharegpt last from human": (
        ("SFT conversations", {"conversations": [human("Q"), gpt("A"), human("R")]}),
        "the user's", "the assistant's"),
    "sharegpt chosen from human": (
        ("DPO conversations", {**DPO_ROWS["sharegpt"], "chosen": human("A")}),
        "no assistant turn", "a reply"),
    "sharegpt chosen null": (
        ("DPO conversations", {**DPO_ROWS["sharegpt"], "chosen": None}), "chosen: null", "a str"),
    "sharegpt pair for sft": (
        ("SFT conversations", DPO_ROWS["sharegpt"]), "no assistant turn", "a reply"),
    "instruction null": (
        ("SFT instruction", {"instruction": None, "output": "A"}), "instruction: null", "a string"),
    "input a number": (
        ("SFT instruction", {"instruction": "Q", "input": 0, "output": "A"}),
        "input: a number", "a string"),
    "input a list": (
        ("SFT instruction", {"instruction": "Q", "input": [], "output": "A"}),
        "input: a list", "a string"),
    "input after a reply": (
        ("SFT instruction", {"instruction": [user("Q"), assistant("O")], "input": "I",
                             "output": "A"}), "follows no user turn", "expected one"),
    "output a pair for sft": (
        ("SFT instruction", {"instruction": "Q", "output": ["A", "B"]}),
        "output, message 1: a string", '{"role": ..., "content": ...}'),
    "output a string for dpo": (
        ("DPO instruction", {"instruction": "Q", "output": "A"}), "a string", "two replies"),
    "output one": (
        ("DPO instruction", {"instruction": "Q", "output": ["A"]}), "a list of 1;", "two replies"),
    "output null": (
        ("DPO instruction", {"instruction": "Q", "output": ["A", None]}),
        "output, reply 2: null", "a string or a list"),
    "chosen null": (pair(chosen=None), "chosen: null", "a string or a list"),
    "rejected a number": (pair(rejected=3), "rejected: a number", "a string or a list"),
    "rejected from the user": (pair(rejected=[user("B")]), "no assistant turn", "a reply"),
    "implicit strings": (
        ("DPO chosen", {"chosen": "A", "rejected": "B"}), "chosen: a string", "a list of messages"),
    "implicit, other prompts": (
        ("DPO chosen", {"chosen": [user("Q"), assistant("A")],
                        "rejected": [user("R"), assistant("B")]}),
        "begins with the user", "the assistant"),
    "label a word": (thumb("no"), "label is 'no'", "true or false"),
    "label quoted": (thumb("true"), "label is 'true'", "true or false, without quotes"),
    "label 2": (thumb(2), "label is 2", "true or false"),
    "label -1": (thumb(-1), "label is -1", "true or false"),
    "label null": (thumb(None), "label is null", "true or false"),
    "label a list": (thumb([True]), "label is [True]", "true or false"),
    "label deep": (thumb(DEEP), "label is [[[", "true or false"),
    "sharegpt role deep": (
        ("SFT conversations", {"conversations": [{"from": DEEP, "value": "Q"}]}),
        "from is [[[", ROLES),
    "label of an empty reply": (
        ("KTO prompt", {"prompt": "Q", "completion": "", "label": 2}), "label is 2", "true or"),
    "label missing": (
        ("KTO messages", {"messages": [user("Q"), assistant("A")]}), "no column label", "first"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(name, read, tmp_path):
    (kind, row), found, expected = BAD_ROWS[name]
    layouts = {"SFT": SFT, "DPO": DPO, "KTO": KTO}[kind[:3]]
    assert read(layouts, [GOOD_ROWS[kind]])[1]["examples"] > 0
    for form, place in (("jsonl", "line 2"), ("json", "row 2")):
        with pytest.raises(InputError) as caught:
            read(layouts, [GOOD_ROWS[kind], row], form)
        message = str(caught.value)
        start = f"{tmp_path}/data.{form}, {place}: "
        assert message.startswith(start) and message.isprintable()
        message = message.removeprefix(start)
        assert found in message and "expected" in message and len(message) < 200
        assert expected in message.partition(found)[2] + message.partition("expected")[1:][1]


@pytest.mark.parametrize("label", ["no", "", "2", "yes", "truee", "None", "-1", "null"])
def test_bad_labels_in_csv(read, label):
    with pytest.raises(
        InputError, match="line 2: label is '.*'; expected true or false, or 1 or 0"
    ):
        read(KTO, [{"prompt": "Q", "completion": "A", "label": label}], "csv")


def test_csv_names_the_line_of_the_row(read):
    """A quoted value spans lines; the place is the line where its row begins."""
    rows = [{"prompt": "Q\n\nQ", "completion": "A", "label": "1"}]
    rows += [{"prompt": "Q\nQ", "completion": "A", "label": "maybe"}]
    with pytest.raises(InputError, match="data.csv, line 5: label is 'maybe'"):
        read(KTO, rows, "csv")


@pytest.mark.parametrize("layouts", [SFT, DPO, KTO], ids=["SFT", "DPO", "KTO"])
def test_unknown_layouts_name_the_columns_and_the_choices(layouts, read):
    with pytest.raises(InputError) as caught:
        read(layouts, [{"text": "Q", "multi\nline": "A"}])
    message = str(caught.value)
    assert r"line 1: columns text, multi\nline make no known layout" in message
    assert message.isprintable()
    for columns in layouts:
        assert ", ".join(columns) in message.partition("expected one of: ")[2]
    with pytest.raises(InputError, match="columns none make no known layout"):
        read(layouts, [{}])
    with pytest.raises(InputError) as caught:
        read(layouts, [{"c" * i: 1 for i in range(1, 500)}])
    assert len(str(caught.value)) < 1500


def test_a_layout_of_another_method_is_unknown(read):
    for layouts, kind in ((SFT, "DPO prompt"), (DPO, "SFT prompt"), (KTO, "SFT messages")):
        with pytest.raises(InputError, match="make no known layout"):
            read(layouts, [GOOD_ROWS[kind]])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", " ", "A", "user", "human", IM_END, "true", "\n\u2028", "x" * 99]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=4)
    | st.builds(message, st.sampled_from(["system", "user", "assistant", "tool", "bot"]), inner),
    max_leaves=8,
)  # fmt: skip
columns = ["messages", "prompt", "completion", "instruction", "input", "output", "system"]
columns += ["question", "chosen", "rejected", "conversations", "label", "x\ny"]


@settings(
    max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    st.sampled_from(sorted(GOOD_ROWS)),
    st.dictionaries(st.sampled_from(columns), values, max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_nothing_but_one_line_ever_escapes(read, tmp_path, kind, change, base, as_system):
    row = {**GOOD_ROWS[kind], **change} if base else change
    layouts = {"SFT": SFT, "DPO": DPO, "KTO": KTO}[kind[:3]]
    try:
        examples, _ = read(layouts, [row], input_as_system=as_system)
    except InputError as error:
        assert str(error).isprintable() and str(error).startswith(f"{tmp_path}/data.jsonl")
        assert "expected" in str(error)
    else:
        for example in examples:
            assert len(example.texts) == (2 if layouts is DPO else 1)
            assert all(mask[0] and mask[-1] for _, mask in example.texts)
            assert (example.label is None) == (layouts is not KTO)


# -------------------------------------------------------------------------------- files and the hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets package."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "owner/missing":
            raise ConnectionError("no\n\nsuch " + "thing " * 99)
        return [{"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": name}]

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize("name", ["owner/name", "name", "owner/name-v1.0", "a_b/C.d-e"])
def test_hub_ids(name, hub, tokenizer):
    examples, _ = read_examples([name], SFT, tokenizer, ChatML(tokenizer), split="test")
    assert hub == [(name, "test")]
    assert [e.where for e in examples] == [f"{name}[test], row 1", f"{name}[test], row 2"]


@pytest.mark.parametrize(
    "name",
    ["missing.jsonl", "a/missing.CSV", "./missing", "../missing", "/missing", "a/b/c", "here/x",
     "~/missing", "~", "a b", "a/", ".hidden", "C:\\x", "with\nnewline", ""],
)  # fmt: skip
def test_paths_that_are_not_there(name, hub, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match="No such file|Is a directory") as caught:
        read_examples([name], SFT, tokenizer, ChatML(tokenizer))
    assert hub == [] and str(caught.value).isprintable()


def test_a_path_that_looks_like_a_hub_id(hub, tokenizer, tmp_path, monkeypatch):
    """What exists is a file, or refused as one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "name").mkdir()
    with pytest.raises(InputError, match="name: Is a directory"):
        read_examples(["name"], SFT, tokenizer, ChatML(tokenizer))
    (tmp_path / "notes").write_text("Q")
    with pytest.raises(InputError, match="notes: unknown kind of file"):
        read_examples(["notes"], SFT, tokenizer, ChatML(tokenizer))
    assert hub == []


def test_hub_without_luck(hub, tokenizer, monkeypatch):
    with pytest.raises(InputError) as caught:
        read_examples(["owner/missing"], SFT, tokenizer, ChatML(tokenizer))
    message = str(caught.value)
    assert message.startswith("owner/missing: no such file, and the hub says: no such thing")
    assert message.isprintable() and len(message) < 280
    monkeypatch.setitem(sys.modules, "datasets", None)  # import fails
    with pytest.raises(
        InputError, match=r"no such file; to read .*: pip install 'nanoalign\[hub\]'"
    ):
        read_examples(["owner/name"], SFT, tokenizer, ChatML(tokenizer))


# -------------------------------------------------------------------------------- order and batches


def example(number, label=None, prompt=None):
    ids = [number] if prompt is None else prompt
    return Example(ids, [([number], [True])], label, number=number)


def partners(paired):
    """The numbers of the examples whose completions are y'."""
    return [number for e in paired for (number,), _ in e.mismatch.texts]


def test_epoch_order_is_a_function_of_seed_and_epoch():
    data = [example(i) for i in range(50)]
    orders = {
        (seed, epoch): [e.number for e in epoch_order(data, epoch, seed)]
        for seed in (0, 1, 11)
        for epoch in (0, 1, 10)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9  # and none is another's
    assert all(order != list(range(50)) for order in orders.values())
    again = [e.number for e in epoch_order(list(data), 1, 11)]
    assert again == orders[11, 1]
    assert [e.number for e in data] == list(range(50))  # the data stays as it was


def test_epoch_order_is_the_same_everywhere():
    """Not only in this process: a resumed run must find its place again."""
    numbers = [e.number for e in epoch_order([example(i) for i in range(8)], epoch=3, seed=7)]
    assert numbers == [5, 2, 6, 7, 3, 1, 0, 4]


def test_no_shuffling():
    data = [example(i, i % 2 == 0) for i in range(9)]
    order = epoch_order(data, 0, 0, shuffle=False)
    assert list(order) == data and order is not data
    assert len(epoch_order([], 0, 0)) == 0


@pytest.mark.parametrize("up, down", [(3, 9), (9, 3), (5, 5), (1, 20), (17, 40), (0, 4), (4, 0)])
def test_labels_are_merged_evenly(up, down):
    data = [example(i, i < up) for i in range(up + down)]
    orders = set()
    for epoch in range(6):
        order = epoch_order(data, epoch, seed=1)
        assert sorted(e.number for e in order) == list(range(up + down))
        for end in range(len(order) + 1):  # any first part of the epoch has its share, within one
            ups = sum(e.label for e in order[:end])
            assert abs(ups - end * up / (up + down)) <= 1
        orders.add(tuple(e.number for e in order))
    assert len(orders) > 1


def test_labels_are_merged_from_the_middle_of_their_shares():
    order = epoch_order([example(i, i < 2) for i in range(8)], 0, 0)
    assert "".join("DU"[e.label] for e in order) == "DUDDDUDD"


def by_definition(order):
    """The nearest earlier example, cyclically, with another prompt."""
    return [
        next(
            other.number
            for back in range(1, len(order))
            if (other := order[i - back]).prompt != e.prompt
        )
        for i, e in enumerate(order)
    ]


def test_mismatches_worked():
    order = [example(i, True, prompt) for i, prompt in enumerate([[1], [1], [2], [2], [1], [3]])]
    paired = with_mismatches(order)
    assert partners(paired) == [5, 5, 1, 1, 3, 4]
    assert [e.number for e in paired] == [0, 1, 2, 3, 4, 5]
    assert all(e.mismatch is None for e in order)  # copies: the data stays as it was


def test_a_mismatch_asks_with_all_that_precedes_a_reply():
    """x is 1 2 3, though 2 and 3 stand in the text."""
    order = [Example([1], [([2, 3, 4, 5], [False, False, True, True])]), example(9)]
    first, second = with_mismatches(order)
    assert (first.mismatch.prompt, first.mismatch.texts) == ([1, 2, 3], [([9], [True])])
    assert (second.mismatch.prompt, second.mismatch.texts) == ([9], [([4, 5], [True, True])])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(lambda x: len(set(x)) > 1))
def test_mismatches_by_definition(prompts):
    order = [example(i, True, [prompt]) for i, prompt in enumerate(prompts)]
    paired = with_mismatches(order)
    assert partners(paired) == by_definition(order)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=9).filter(
        lambda sizes: len({prompt for prompt, _ in sizes}) > 1
    ),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.integers(4, 12),
)
def test_mismatches_fit_where_they_are_put(sizes, trains, longest):
    """y' is cut to what x leaves of max_length, and ends with a token that trains."""
    order = [
        Example([0] * prompt, [(list(range(n)), [True, *trains[: n - 1]])], where=f"row {n}")
        for prompt, n in sizes
    ]
    for example, cut in zip(with_mismatches(order), with_mismatches(order, longest)):
        [(whole, mask)], [(ids, cut_mask)] = example.mismatch.texts, cut.mismatch.texts
        assert cut.mismatch.prompt == example.prompt
        n = len(ids)
        assert ids == whole[:n] and cut_mask == mask[:n] and cut_mask[-1]
        room = longest - len(example.prompt)
        assert n <= max(room, 1)
        assert not any(mask[n : max(room, 0)])  # all that trains and fits is there


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_kto_stays_within_learned_positions(kind, tmp_path, no_curves):
    """A long x with the y' of a short one: x and y' together are no longer than max_length."""
    small = dict(vocab_size=320, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    size = dict(hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=2)
    torch.manual_seed(0)
    model = {
        "opt": lambda: OPTForCausalLM(
            OPTConfig(**size, **small, num_attention_heads=4, max_position_embeddings=48)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, n_positions=48)
        ),
    }[kind]()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    long, short = {"prompt": "Q" * 20, "completion": "A"}, {"prompt": "Q", "completion": "A " * 30}
    rows = [{**(long, short)[i % 2], "label": i < 2} for i in range(4)]
    given = dict(
        model_name_or_path=tmp_path / "model",
        dataset_name=write_rows(tmp_path / "rows.jsonl", rows),
        output_dir=tmp_path / "out",
        max_length=48,
        max_steps=1,
        logging_steps=1,
        use_peft=kind == "opt",
        device="cpu",
    )
    call("kto", given)
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(0.5, abs=0.01)


def test_one_prompt_has_no_mismatch():
    order = [Example([1], [([2], [True])], where=f"{name}.jsonl, line 7") for name in "aba"]
    with pytest.raises(InputError, match="^a.jsonl, b.jsonl: KTO needs two different prompts"):
        with_mismatches(order)
    for n in (1, 2, 5):
        with pytest.raises(InputError, match="two different prompts"):
            with_mismatches([example(i, True, [1, 2]) for i in range(n)])
    assert len(with_mismatches([])) == 0  # no evaluation set


def test_batches():
    def sizes(count, size):
        return [len(batch) for batch in fitting([Example([1], [([2], [True])])] * count, size, 99)]

    assert sizes(5, 2) == [2, 2, 1] and sizes(2, 4) == [2] and sizes(0, 4) == []
