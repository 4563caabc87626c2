"""Layouts: records of files -> cases, which are checked messages; and cases -> examples.

A layout is one way to store conversations: the names of its columns, and a function that makes a
Case, or several, of a record. To add a layout, add an entry to SFT, DPO or KTO below. A column of
messages may hold {"role": ..., "content": ...} or ShareGPT's {"from": ..., "value": ...}; a column
of one turn may hold a string. In every layout there may also be the columns `system` (the first
turn), `history` (alpaca's earlier turns) and `tools`, and next to a conversation `loss_mask`.

In a case roles are known, turns are in order and contents are text. What is wrong with a record
raises an InputError that names file and line. What is left out of a file is told in one note.
"""

import gc
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain

from nanoalign import InputError
from nanoalign.chatml import Message
from nanoalign.data import Case, Examples, Limits, make_examples, texts_of
from nanoalign.formats import feedback
from nanoalign.formats.columns import (
    beside,
    kind_of,
    label_of,
    list_of,
    listed,
    refuse_unsupported,
    text_of,
    tools_of,
    turns_of,
    unread,
)
from nanoalign.formats.rows import files_of, records_of
from nanoalign.formats.templates import NoTemplate

Layouts = dict[tuple[str, ...], Callable[..., Case | Iterable[Case]]]  # columns -> reader
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # what most special tokens look like
BESIDE = {"system", "history", "tools", "functions", "loss_mask"}  # read in every layout


def answered(record: dict, asked: str, *replies: str) -> Case:
    """A column with the prompt, then a column for each reply. Replies may repeat the prompt, with
    or without a system turn before it. Alpaca's instruction goes on in `input`, after a newline."""
    prompt = turns_of(record, asked, "user")
    if asked == "instruction" and (extra := text_of(record, "input")):
        if (last := prompt.pop())["role"] != "user":
            raise InputError(f"input: follows no user turn; expected one as the end of {asked}")
        content = f"{last['content']}\n{extra}" if last["content"] else extra
        prompt.append({"role": "user", "content": content})
    completions = [turns_of(record, reply, "assistant") for reply in replies]
    longer = completions[0][:1] + prompt
    if longer[0]["role"] == "system" and all(c[: len(longer)] == longer for c in completions):
        prompt = longer
    n = len(prompt)
    return Case(prompt, [c[n:] if c[:n] == prompt else c for c in completions])


def every_reply(record: dict, column: str) -> Case:
    """A conversation in which every reply trains but those with "train": False. The prompt ends
    before the first reply that trains."""
    messages = turns_of(record, column)
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    trained = [i for i in replies if "train" not in messages[i]]
    first = min(trained or replies, default=len(messages))
    return Case(messages[:first], [messages[first:]])


def last_reply(record: dict, *columns: str) -> Case:
    """Conversations whose last replies are judged."""
    return forked([turns_of(record, column) for column in columns])


def forked(conversations: list[list[Message]]) -> Case:
    """Conversations as one case: the prompt is what they begin with in common."""
    first, second = conversations[0], conversations[-1]
    last = min(len(first), len(second)) - 1
    n = next((i for i in range(last) if first[i] != second[i]), last)
    return Case(first[:n], [conversation[n:] for conversation in conversations])


def rejected_reply(record: dict, column: str, rejected: str) -> Case:
    """ms-swift's: a conversation and, as `rejected`, another one or only its end."""
    chosen, other = turns_of(record, column), turns_of(record, rejected, "assistant")
    if other[0]["role"] == "assistant":  # a string replaces the last message, a list the last round
        users = [i for i, m in enumerate(chosen) if m["role"] == "user"]
        n = len(chosen) - 1 if isinstance(record[rejected], str) else max(users, default=-1) + 1
        other = chosen[:n] + other
    return forked([chosen, other])


def openai_pair(record: dict, asked: str, *replies: str) -> Case:
    """OpenAI's: the column `asked` holds the conversation so far and its tools."""
    prompt = record[asked] if isinstance(record[asked], dict) else {}
    case = answered({**record, asked: prompt.get("messages")}, asked, *replies)
    case.tools = tools_of(prompt)
    return case


def arena(record: dict, a: str, b: str, winner: str) -> Case:
    """LM Arena's: two conversations, and which of them won."""
    won = record[winner]
    if won not in ("model_a", "model_b", "tie", "both_bad", "tie (bothbad)"):
        raise InputError(f"{winner}: {str(won)[:40]!r}; expected model_a, model_b, tie or both_bad")
    case = last_reply(record, *((b, a) if won == "model_b" else (a, b)))
    case.ranks = [0.0, float(won.startswith("model"))]
    return case


def ranked(record: dict, asked: str, replies: str, scores: str = "", sign: int = 1) -> Case:
    """A list of replies, the best first; or with a column of scores: the highest is the best, with
    `sign` -1 the lowest. Replies with equal scores are tied."""
    texts = record[replies]
    if not isinstance(texts, list) or len(texts) < 2:
        found = f"a list of {len(texts)}" if isinstance(texts, list) else kind_of(texts)
        raise InputError(f"{replies}: {found}; expected a list of two replies or more, best first")
    points = list_of(record, scores, "numbers") if scores else [-i for i in range(len(texts))]
    numbers = [point for point in points if type(point) in (int, float) and abs(point) < 1e300]
    if len(points) != len(texts) or len(numbers) != len(texts):
        raise InputError(f"{scores}: expected {len(texts)} numbers, one a reply")
    columns = {f"{replies}, reply {i}": reply for i, reply in enumerate(texts, 1)}
    case = answered({**record, **columns}, asked, *columns)
    best = sorted(range(len(texts)), key=lambda i: -sign * points[i])
    ranks = [float(-sign * points[i]) for i in best]
    return Case(case.prompt, [case.completions[i] for i in best], ranks=ranks)


def scored(record: dict, asked: str, replies: str) -> Case:
    """Each reply is an object with its score (UltraFeedback) or its rank (Nectar)."""
    sign, *keys = 1, "response", "overall_score"
    if replies == "answers":
        sign, *keys = -1, "answer", "rank"
    objects = list_of(record, replies, "objects")
    if not all(isinstance(reply, dict) and {*keys} <= reply.keys() for reply in objects):
        raise InputError(f"{replies}: expected objects with {' and '.join(keys)}")
    texts, points = ([reply[key] for reply in objects] for key in keys)
    return ranked({**record, replies: texts, keys[1]: points}, asked, replies, keys[1], sign)


def strings(record: dict, *columns: str) -> Case:
    """For --chat_template none: a prompt and replies to it, or the one column `text`. They hold a
    template already, and are taken as they are."""
    asked = columns[: len(columns) > 1]
    prompt = [{"role": "user", "content": text_of(record, column)} for column in asked]
    replies = [text_of(record, column) for column in columns[len(asked) :]]
    return Case(prompt, [[{"role": "assistant", "content": reply}] for reply in replies])


STRINGS = {"text", "prompt", "question", "completion", "chosen", "rejected", "label"}
SFT = {
    ("messages",): every_reply,
    ("prompt", "completion"): answered,
    ("instruction", "output"): answered,
    ("question", "chosen"): answered,
    ("conversations",): every_reply,
    ("text",): strings,
}
DPO = {
    ("prompt", "chosen", "rejected"): answered,
    ("question", "chosen", "rejected"): answered,
    ("instruction", "chosen", "rejected"): answered,
    ("instruction", "output"): ranked,
    ("conversations", "chosen", "rejected"): answered,
    ("chosen", "rejected"): last_reply,
    ("messages", "rejected_response"): rejected_reply,
    ("messages", "rejected_messages"): rejected_reply,
    ("input", "preferred_output", "non_preferred_output"): openai_pair,
    ("prompt", "responses", "scores"): ranked,
    ("prompt", "responses"): ranked,
    ("instruction", "completions"): scored,
    ("prompt", "answers"): scored,
    ("conversation_a", "conversation_b", "winner"): arena,
    ("type", "data", "meta"): feedback.open_webui,
}
KTO = {
    ("prompt", "completion", "label"): answered,  # the reader gets these without `label`
    ("instruction", "output", "label"): answered,
    ("messages", "label"): last_reply,
    ("conversations", "label"): last_reply,
    ("conversation", "index", "flag"): feedback.gradio,
    **DPO,  # each pair becomes two labelled examples
}


def read_examples(
    sources: list[str], layouts: Layouts, tokenizer, template, limits: Limits | None = None,
    notes: list[str] | None = None, **options,
) -> tuple[Examples, Counter]:  # fmt: skip
    """Files (or data sets of the hub) -> examples, and a count of what was cut or skipped.

    `layouts` is SFT, DPO or KTO; `options` are read_cases'. InputError, with file and line, for a
    record that is refused; and if nothing is left to train on.
    """
    count, notes = Counter(), [] if notes is None else notes
    as_strings = isinstance(template, NoTemplate)
    layouts = {
        columns: strings if as_strings else read
        for columns, read in layouts.items()
        if (STRINGS.issuperset(columns) if as_strings else columns != ("text",))
    }
    cases = read_cases(sources, layouts, count, notes, template=template, **options)
    if not as_strings:
        cases = say_markers(cases, tokenizer, notes)
    collects = gc.isenabled()
    gc.disable()  # looking for cycles among millions of new lists costs a third of the time
    try:
        examples, cuts = make_examples(cases, tokenizer, template, limits)
    finally:
        if collects:
            gc.enable()
    count.update(cuts)
    if not examples:
        wanted = "a row to train on"
        if count["no trained token left"]:  # prompts fill max_length
            wanted += ", by a higher --max_length or a --max_prompt_length"
        raise InputError(f"{', '.join(sources)}: {describe(count)}; expected {wanted}")
    return examples, count


def describe(count: Counter) -> str:
    """The count of read_examples in one line."""
    cuts = "prompts cut", "completions cut", "pairs tied or equal", "empty replies left out"
    cuts += ("replies with no trained token left",)
    said = [f"{count['rows']} rows, {count['examples']} examples"]
    said += [f"{count[key]} {key}" for key in cuts if count[key]]
    skips = [key for key in count if count[key] and key not in ("rows", "examples", *cuts)]
    return "; ".join(said + [f"{count[key]} skipped: {key}" for key in skips])


def read_cases(
    sources: list[str], layouts: Layouts, count: Counter, notes: list[str], split="train",
    input_as_system=False, train_on="every_reply", skip_bad_rows=0, template=None,
) -> Iterator[Case]:  # fmt: skip
    """The records of all sources as cases, one by one. `count` counts records, and those that are
    skipped; `notes` gets a line on what is left out of a file.

    Up to `skip_bad_rows` refused records are skipped, with a note; `template` may refuse some, too.
    """
    labelled = any("label" in columns for columns in layouts)
    for source in files_of(sources):
        csv = source.lower().endswith((".csv", ".csv.gz"))
        columns, left, judged = (), Counter(), defaultdict(list)
        for where, record in records_of(source, split):
            count["rows"] += 1
            try:
                columns = layout_of(record, layouts, columns)
                cases = read_record(record, columns, layouts, input_as_system, csv)
                for case in cases:
                    if labelled and (n := len(case.completions)) > 2:
                        raise InputError(f"{n} replies; expected two, a thumb up and a thumb down")
                    for completion in case.completions if skip_bad_rows and template else ():
                        texts_of(case, completion, template)
            except InputError as error:
                count["refused"] += 1
                if count["refused"] > skip_bad_rows:
                    raise InputError(f"{where}: {error}") from None
                notes.append(f"passed over: {where}: {error}")
                continue
            count["no reply is judged"] += not cases
            known = {*columns, *BESIDE, *["input"] * (input_as_system or "instruction" in columns)}
            known |= {"label"} if any(case.label is not None for case in cases) else set()
            left.update(unread(record, known))
            for case in cases:
                case.where = where
                if train_on == "last_reply":
                    case.completions = [only_last(completion) for completion in case.completions]
                if isinstance(case, feedback.Judged) and not labelled:
                    judged[case.answers].append(case)  # later, with the other replies
                else:
                    yield from worth_training(case, labelled, count)
        for replies in judged.values():
            yield from worth_training(feedback.siblings(replies), labelled, count)
        notes += passed_over(source, left)


def passed_over(source: str, left: Counter) -> Iterator[str]:
    """A line for what was not read in a file, and one for roles that were read as others."""
    roles = [name for name in left if name.startswith("role ")]
    others = [name for name in left if name not in roles]
    for said, names in ("not read", others), ("read", roles):
        if names:
            listing = ", ".join(f"{name[:60]} ({left[name]})" for name in names[:12])
            yield f"{source}: {said}: {listing}{', ...' * (len(names) > 12)}"


def only_last(completion: list[Message]) -> list[Message]:
    """A completion in which only the last turn trains."""
    *before, last = completion
    return [m if m["role"] != "assistant" else {**m, "train": False} for m in before] + [last]


def layout_of(record: dict | InputError, layouts: Layouts, known: tuple = ()) -> tuple[str, ...]:
    """The columns of the first layout that has all its columns in the record; or the `known` ones
    of the file's first record, which must be there. A column kto_tag is renamed to label."""
    if isinstance(record, InputError):
        raise record
    if "kto_tag" in record and "label" not in record:
        record["label"] = record.pop("kto_tag")
    for column in known:
        if column not in record:
            raise InputError(f"no column {column}; expected one, as in the file's first row")
    if known:
        return known
    for columns in layouts:
        if set(columns) <= record.keys():
            return columns
    expected = "; ".join(", ".join(columns) for columns in layouts)
    if "text" in record and ("text",) not in layouts:
        expected += "; or text, with --chat_template none"
    raise InputError(f"columns {listed(record)} make no known layout; expected one of: {expected}")


def read_record(
    record: dict, columns: tuple, layouts: Layouts, input_as_system: bool = False, csv: bool = False
) -> list[Case]:
    """A record -> checked cases, each completion of which begins with a reply."""
    refuse_unsupported(record)
    system, tools, history = "", [], []
    if not BESIDE.isdisjoint(record):
        system, tools, history = beside(record, columns)
    if input_as_system and (extra := text_of(record, "input")):
        if system:
            raise InputError("system and input are both there; expected one (--input_as_system)")
        system, record = extra, {**record, "input": ""}
    found = layouts[columns](record, *(c for c in columns if c != "label"))
    cases = [found] if isinstance(found, Case) else list(found)
    for case in cases:
        if "label" in columns:
            case.label = label_of(record["label"], csv)
        elif "label" in record and len(case.completions) == 1:  # for SFT, which skips a thumb down
            with suppress(InputError):
                case.label = label_of(record["label"], csv)
        case.tools = case.tools or tools
        first = [m for m in case.prompt[:1] if m["role"] == "system"]
        case.prompt[: len(first)] = [*first, *history]
        if system:
            case.prompt = [{"role": "system", "content": system}, *case.prompt]
        for completion in case.completions:
            _check_turns([m["role"] for m in case.prompt], [m["role"] for m in completion])
    return cases


def _check_turns(prompt: list[str], completion: list[str]) -> None:
    """InputError if roles are in an order that no template can write, or no reply comes first."""
    roles = prompt + completion
    if "assistant" not in roles:
        raise InputError("no assistant turn; expected a reply to learn from")
    if roles[-1] != "assistant":
        raise InputError(f"the last turn is the {roles[-1]}'s; expected the assistant's")
    if "system" in roles[1:]:
        found = f"turn {roles.index('system', 1) + 1} is a system turn"
        raise InputError(f"{found}; expected it first: join two, or make a later one the user's")
    for i, both in enumerate(zip(roles, roles[1:]), 1):
        if both == ("assistant", "assistant"):
            found = f"turns {i} and {i + 1} are both the assistant's"
            raise InputError(f"{found}; expected another's between them, or one turn of both")
    if completion[:1] != ["assistant"]:
        found = f"begins with the {completion[0]}" if completion else "has no turn"
        raise InputError(f"a completion {found} after the prompt; expected the assistant")


def worth_training(case: Case, labelled: bool, count: Counter) -> Iterator[Case]:
    """Yields the case without replies that teach nothing, if enough are left. With `labelled` a
    pair becomes two cases. `count` counts what is left out."""
    faults = []
    for completion in case.completions:
        replies = [m for m in completion if m["role"] == "assistant" and "train" not in m]
        bare = [m for m in replies if not m.keys() & {"reasoning_content", "tool_calls"}]
        empty = any(not m["content"].strip() for m in bare)  # white space teaches nothing either
        faults.append("empty completion" if empty else "" if replies else "no reply that trains")
    kept = [i for i, fault in enumerate(faults) if not fault]
    replies = [case.completions[i] for i in kept]
    ranks = case.ranks and [case.ranks[i] for i in kept]
    if any(faults) and len(kept) < 2:
        count[next(filter(None, faults))] += 1
    elif replies[1:] and all(r == replies[0] and repr(r) == repr(replies[0]) for r in replies):
        count["chosen equal to rejected"] += 1
    elif ranks and len(set(ranks)) < 2:
        count["no reply above another"] += 1
    elif not labelled:
        count["label false"] += case.label is False
        count["empty replies left out"] += len(faults) - len(kept)
        if case.label is not False:
            yield replace(case, completions=replies, ranks=ranks, label=None)
    elif len(replies) == 2:
        for reply, label in zip(replies, (True, False)):
            yield replace(case, completions=[reply], ranks=None, label=label)
    else:
        yield case


def say_markers(cases: Iterable[Case], tokenizer, notes: list[str]) -> Iterator[Case]:
    """The cases as they are. After the last one `notes` gets a line on each file whose texts spell
    a template's markers."""
    names = {token.content.strip() for token in tokenizer.added_tokens_decoder.values()}
    names |= {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>"}
    other = [re.escape(name) for name in names if len(name) > 1 and not TAG.fullmatch(name)]
    marker, found = re.compile("|".join([TAG.pattern, *sorted(other, key=len, reverse=True)])), {}
    for case in cases:
        turns = chain(case.prompt, *case.completions)
        texts = (text for m in turns for text in (m["content"], m.get("reasoning_content", "")))
        spelled = (match[0] for text in texts for match in marker.finditer(text))
        if name := next((name for name in spelled if name in names), None):
            file, _, line = case.where.rpartition(", ")
            number, last, example = found.get(file, (0, "", f"{name} in {line}"))
            found[file] = number + (last != case.where), case.where, example
        yield case
    for file, (number, _, example) in found.items():
        said = f"{number} rows hold a template's markers as text ({example}), which stay text"
        notes.append(f"{file}: {said}; --chat_template none is for data that are templated already")
