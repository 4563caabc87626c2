"""Show what a model will be trained on: the mask in colour, lengths, what was cut or skipped.

    python -m nanoalign.data DATASET --model_name_or_path M --show 3

Trained tokens are green, markers are blue, and the rest is grey. Without colours (in a pipe, or if
NO_COLOR is set) trained text is between [[ and ]], and a backslash is put before text that looks
like a marker. Tokens that several texts of an example begin with are shown once. The continuations
are indented below them.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate, groupby, islice, pairwise
from textwrap import indent

from nanoalign import InputError
from nanoalign.formats.layouts import DPO, KTO, SFT, layout_of, read_record
from nanoalign.formats.rows import files_of, records_of
from nanoalign.packing import Example, Ids
from nanoalign.run.advice import ONE_LABEL, advice_on_prompts, suggested_weights
from nanoalign.run.command import command
from nanoalign.run.flags import Parser, add_flags
from nanoalign.run.log import printable
from nanoalign.run.policy import load_tokenizer
from nanoalign.run.session import read

METHODS = {"sft": SFT, "dpo": DPO, "kto": KTO}
FLAGS = (
    "max_length max_prompt_length truncation_mode chat_template chat_template_kwargs "
    "input_as_system train_on skip_bad_rows"
).split()
GREEN, BLUE, GREY, PLAIN = "\033[32m", "\033[34m", "\033[90m", "\033[0m"


def render(tokenizer, ids: list[int], mask: list[bool], colour: bool) -> str:
    """The text of ids, with trained parts marked. Markers are the tokenizer's added tokens, special
    or not, unless they are white space."""
    markers = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
    names, text = re.compile("|".join(map(re.escape, markers.values())) or "(?!)"), ""
    for trained, stretch in groupby(zip(mask, ids), key=lambda pair: pair[0]):
        part = ""
        for marker, some in groupby((i for _, i in stretch), key=markers.__contains__):
            piece = printable(tokenizer.decode([*some]))
            if colour:
                part += (GREEN if trained else BLUE if marker else GREY) + piece + PLAIN
            else:
                part += piece if marker else names.sub(r"\\\g<0>", piece)
        text += f"[[{part}]]" if trained and not colour else part
    return text


def branches(example: Example) -> Iterator[tuple[int, Ids, list[bool]]]:
    """The parts of an example's tree, from one branching to the next, in the order of the row:
    (depth in the tree, ids, which of them train)."""
    texts, path = example.paths(), set()  # path: the lengths at which the text so far branches
    shared = [common for common, *_ in texts]
    for i, (common, ids, (_, mask), _) in enumerate(texts):
        later = {n for n in accumulate(shared[i + 1 :], min) if n > common}
        path = {n for n in path if n < common} | {common} | later
        mask = [False] * len(example.prompt) + [*map(bool, mask)]
        for level, (start, end) in enumerate(pairwise([*sorted(path), len(ids)])):
            if start >= common and start < end:
                yield level, ids[start:end], mask[start:end]


def histogram(lengths: list[int]) -> str:
    """How many examples have which length in tokens: a bar for each of at most eight ranges."""
    size = max(lengths) // 8 + 1
    bins = Counter(length // size for length in lengths)
    text = ""
    for i in range(max(bins) + 1):
        bar = "#" * round(40 * bins[i] / max(bins.values()))
        text += f"{i * size:>6} - {(i + 1) * size - 1:<6}{bins[i]:>7}  {bar}\n"
    return text


def method_of(source: str) -> str:
    """The method for which the first line is meant: its layout reads the most columns. If two read
    as many, it is the one that can read the line, and KTO if the line has a thumb."""
    rows = [row for _, row in islice(records_of(files_of([source])[0], "train"), 100)]
    row = next((row for row in rows if isinstance(row, dict)), rows[0])
    if isinstance(row, InputError):
        raise row

    def fit(method: str) -> tuple[int, bool, bool]:
        columns = cases = ()
        with suppress(InputError):
            columns = layout_of(row, METHODS[method])
            cases = read_record(row, columns, METHODS[method])
        thumbs = method == "kto" and any(case.label is not None for case in cases)
        return len(columns), bool(cases), thumbs

    return max(METHODS, key=fit)


@command("data")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m nanoalign.data", allow_abbrev=False)
    parser.add_argument("dataset", nargs="+", help="files, as for --dataset_name")
    parser.add_argument("--model_name_or_path", required=True, help="whose tokenizer to use")
    parser.add_argument("--method", choices=list(METHODS), help="default: by the first line")
    parser.add_argument("--show", type=int, default=3, help="examples to print")
    add_flags(parser, *FLAGS)
    args = parser.parse_args(argv)
    kwargs = args.chat_template_kwargs
    reader = load_tokenizer(args.model_name_or_path, args.chat_template, False, kwargs)
    method = args.method or method_of(args.dataset[0])
    print(f"as {method.upper()} data")
    examples, count = read(args, METHODS[method], reader, args.dataset)
    for line in advice_on_prompts(count["no trained token left"], args.max_length):
        print(f"advice: {line}")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for example in examples[: args.show]:
        label = "" if example.label is None else f", label {str(example.label).lower()}"
        train = sum(sum(mask) for _, mask in example.texts)
        print(f"--- {example.where}{label}: {example.tokens} tokens, {train} train")
        for level, ids, mask in branches(example):
            print(indent(render(reader.tokenizer, ids, mask, colour), "    " * level))
    print("--- tokens of an example")
    print(histogram([len(example) for example in examples]), end="")
    if method == "kto":
        up = sum(example.label for example in examples)
        down = len(examples) - up
        print(f"{up} desirable, {down} undesirable")
        weights = suggested_weights(up, down) or "balanced: no weights needed"
        print(weights if up and down else f"warning: {ONE_LABEL}")


if __name__ == "__main__":
    main()
