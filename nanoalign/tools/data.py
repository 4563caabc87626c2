"""See what a model will be trained on: the mask in colour, lengths, what was cut or skipped.

    python -m nanoalign.data DATASET --model_name_or_path M --show 3

Trained tokens are green, markers blue, context grey; without colour (a pipe, NO_COLOR) trained text
stands between [[ and ]].
"""

import argparse
import os
import sys
import unicodedata

from nanoalign import InputError
from nanoalign.data import Example, Limits, describe
from nanoalign.formats.layouts import DPO, KTO, SFT, layout_of, read_case, read_examples
from nanoalign.formats.rows import rows_of
from nanoalign.formats.templates import TEMPLATES
from nanoalign.run.advice import suggested_weights
from nanoalign.run.policy import load_tokenizer
from nanoalign.run.session import one_line_errors

METHODS = {"sft": SFT, "dpo": DPO, "kto": KTO}

GREEN, BLUE, GREY, PLAIN = "\033[32m", "\033[34m", "\033[90m", "\033[0m"


def printable(text: str) -> str:
    """Text with its control and format characters escaped, but for newline, tab and joiner."""

    def shown(c: str) -> str:
        hidden = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        return c.encode("unicode_escape").decode() if hidden and c not in "\n\t\u200d" else c

    return "".join(map(shown, text))


def render(tokenizer, ids: list[int], mask: list[bool], colour: bool) -> str:
    """Text of ids, with the trained stretches marked. Markers are the tokenizer's added tokens,
    whether it calls them special or not, but for the runs of white space that some add."""
    markers = {i for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
    stretches = []  # (kind, ids): trained, marker or context
    for token, trained in zip(ids, mask):
        marker = token in markers
        kind = (trained, marker)
        if not stretches or stretches[-1][0] != kind:
            stretches.append((kind, []))
        stretches[-1][1].append(token)
    text, open_mark = "", False
    for (trained, marker), part in stretches:
        piece = printable(tokenizer.decode(part, skip_special_tokens=False))
        if colour:
            text += (GREEN if trained else BLUE if marker else GREY) + piece + PLAIN
            continue
        if trained != open_mark:
            text += "[[" if trained else "]]"
            open_mark = trained
        text += piece
    return text + ("]]" if open_mark else "")


def histogram(lengths: list[int], width: int = 40) -> str:
    """Examples by length in tokens, in at most eight bins of equal width."""
    size = max(1, -(-max(lengths) // 8))
    bins = [0] * (max(lengths) // size + 1)
    for length in lengths:
        bins[length // size] += 1
    most = max(bins)
    rows = [
        f"{i * size:>6} - {i * size + size - 1:<6}{count:>7}  {'#' * round(width * count / most)}"
        for i, count in enumerate(bins)
    ]
    return "\n".join(rows)


def show(examples: list[Example], count: dict, tokenizer, how_many: int, colour: bool) -> str:
    parts = [describe(count)]
    for example in examples[:how_many]:
        for number, (ids, mask) in enumerate(example.completions):
            tokens, trained = len(example.prompt) + len(ids), sum(mask)
            name = f"completion {number + 1}" if len(example.completions) > 1 else "example"
            label = "" if example.label is None else f", label {str(example.label).lower()}"
            parts.append(f"--- {example.where}: {name}{label}, {tokens} tokens, {trained} train")
            whole = example.prompt + ids, [False] * len(example.prompt) + mask
            parts.append(render(tokenizer, *whole, colour))
    parts += ["--- tokens of an example", histogram([len(example) for example in examples])]
    if examples[0].label is not None:
        up = sum(e.label for e in examples)
        parts.append(f"{up} desirable, {len(examples) - up} undesirable")
        parts.append(suggested_weights(up, len(examples) - up) or "balanced: no weights needed")
    return "\n".join(parts)


def method_of(source: str) -> str:
    """The method that the first row is made for: the one whose layout needs the most of its
    columns, and where two need as many (instruction, output) the one that can read it."""
    _, row = next(iter(rows_of(source, "train")))

    def fit(method: str) -> tuple[int, bool]:
        columns, reads = (), False
        try:
            columns = layout_of(row, METHODS[method])
            reads = bool(read_case(row, columns, METHODS[method]))
        except InputError:
            pass
        return len(columns), reads

    return max(METHODS, key=fit)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m nanoalign.data", allow_abbrev=False)
    parser.add_argument("dataset", nargs="+", help="JSON, JSONL or CSV files")
    parser.add_argument("--model_name_or_path", required=True, help="whose tokenizer to use")
    parser.add_argument("--method", choices=list(METHODS), help="else by the first row")
    parser.add_argument("--show", type=int, default=3, help="examples to print")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--max_prompt_length", type=int, default=None)
    parser.add_argument("--truncation_mode", choices=["keep_end", "keep_start"], default="keep_end")
    parser.add_argument("--chat_template", choices=list(TEMPLATES), default="chatml")
    parser.add_argument("--input_as_system", action="store_true")
    args = parser.parse_args(argv)
    tokenizer, template, _ = load_tokenizer(args.model_name_or_path, args.chat_template)
    limits = Limits(args.max_length, args.max_prompt_length, args.truncation_mode)
    method = args.method or method_of(args.dataset[0])
    examples, count = read_examples(
        args.dataset, METHODS[method], tokenizer, template, limits, "train", args.input_as_system
    )
    print(f"as {method.upper()} data")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(show(examples, count, tokenizer, args.show, colour))


def run(argv: list[str]) -> None:
    with one_line_errors("data"):
        main(argv)


if __name__ == "__main__":
    run(sys.argv[1:])
