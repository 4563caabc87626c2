"""Talk to what you trained: python -m nanoalign.chat DIR [--feedback thumbs.jsonl]

DIR is a model or an adapter. Commands in the conversation:

    /reset         start over
    /undo          take back the last question and its reply
    /system TEXT   set the system turn
    /compare       show the reply of the base model before each reply, or stop doing so

An empty line or Ctrl-D ends the program. Ctrl-C stops a reply.

With --feedback you can judge replies. /good and /bad judge the last reply, for train_kto.py.
/choose TEXT shows two replies in random order, and /a, /b or /tie judges them, for train_dpo.py (in
thumbs.pairs.jsonl). They come from the base model and the adapter, or both from one model. The
conversation goes on with the chosen reply, or with the first one. If you judge again, the new
judgement replaces the old one.

With --prompt TEXT, or with text in a pipe, one reply is written to standard output.

A reply is printed while transformers' `generate` makes it, with its KV cache. A thought is
dim. Control characters are escaped, or a reply could move the cursor or set the terminal's title.
"""

import math
import os
import random
import re
import sys
from argparse import Namespace
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

import torch
from transformers import TextStreamer

from nanoalign import InputError, world
from nanoalign.formats.peft import load_adapter
from nanoalign.lora import Reference
from nanoalign.model import Policy, generate
from nanoalign.run.command import command
from nanoalign.run.files import saving
from nanoalign.run.flags import POSITIVE, Config, Parser, add_flags
from nanoalign.run.log import printable
from nanoalign.run.policy import load_policy
from nanoalign.tools.page import serve
from nanoalign.tools.thumbs import Conversation, tally

BUILT_IN = world.HOME.parent / "sft"  # the result of train_sft.py
DIM, PLAIN = "\033[2m", "\033[0m"
JUDGE = "/good", "/bad", "/choose", "/a", "/b", "/tie"
FLAGS = "device", "chat_template", "chat_template_kwargs", "load_in_4bit", "trust_remote_code"
BOUNDS = {  # {flag: (what its value must do, a test of it)}
    "temperature": ("be at least 0 and finite", lambda x: 0 <= x < math.inf),
    "top_p": ("be above 0 and at most 1", lambda x: 0 < x <= 1),
    "max_new_tokens": POSITIVE,
    "seed": ("be at least 0 and less than 2**63", lambda x: 0 <= x < 2**63),
}


class Printer(TextStreamer):
    """Prints a reply piece by piece and keeps it. In a terminal with colours a thought is dim."""

    def __init__(self, tokenizer, thinks: bool = False):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.reply, self.thinks = "", thinks  # thinks: the next piece belongs to a thought
        self.dims = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.reply += text
        for part in re.split("(?=<think>)|(?<=</think>)", text):
            self.thinks = self.thinks or part.startswith("<think>")
            shown = printable(part)
            print(DIM + shown + PLAIN if self.thinks and self.dims else shown, end="")
            self.thinks = self.thinks and not part.endswith("</think>")
        print(end="\n" if stream_end else "", flush=True)


def say(policy: Policy, messages: list[dict], args) -> str:
    """Print the reply to a conversation while it is generated, and return it. Ctrl-C stops it."""
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
    *_, (last, _) = policy.template.prompt(messages)
    printer = Printer(policy.tokenizer, str(last).strip().endswith("<think>"))
    try:
        generate(policy, [messages], streamer=printer, **options)
    except KeyboardInterrupt:
        print(" [stopped]")
    return printer.reply


def utf8(name: str, words: str | bytes) -> str:
    """Typed or piped text, read as UTF-8 for each locale. Python puts surrogates for bytes that the
    locale can't read, and a tokenizer would fail on them. InputError: it is not UTF-8."""
    try:
        raw = words if isinstance(words, bytes) else words.encode(errors="surrogateescape")
        return raw.decode()
    except UnicodeError:
        raise InputError(f"{name}: is not UTF-8") from None


def talk(policy: Policy, args) -> None:
    """The conversation in the terminal."""
    chat, compare = Conversation(args.directory, args.feedback, args.system), False
    while True:
        try:
            line = utf8("the line", input("> ")).strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        except (UnicodeError, InputError):
            print("this line is not UTF-8")
            continue
        command, _, rest = line.partition(" ")
        if not line:
            return
        elif command == "/reset":
            chat = Conversation(args.directory, args.feedback, chat.system)
        elif command == "/undo":
            chat.undo()
        elif command == "/system":
            chat.system = rest
        elif command == "/compare":
            compare = not compare and policy.lora is not None
            print("the base model's reply comes first" if compare else "compare is off")
        elif command in JUDGE:
            judge(policy, chat, command, rest, args)
        elif command.startswith("/"):
            print(f"commands: /reset /undo /system TEXT /compare {' '.join(JUDGE)}")
        else:
            chat.ask(line)
            try:
                if compare:
                    print("[base] ", end="")
                    with policy.reference():
                        say(policy, chat.prompt(), args)
                    print("[trained] ", end="")
                chat.answer(say(policy, chat.prompt(), args))
            except InputError as error:  # too long for the model, for example
                print(error)
                chat.turns.pop()


def judge(policy: Policy, chat: Conversation, command: str, rest: str, args) -> None:
    """Do one of the commands in JUDGE."""
    if not args.feedback:
        print("to keep judgements, start with --feedback FILE.jsonl")
    elif command == "/choose" and not rest:
        print("/choose TEXT asks for two replies")
    elif command == "/choose":
        chat.ask(rest)
        try:
            two_replies(policy, chat, args)
        except InputError as error:
            print(error)
            chat.turns.pop()
    elif command in ("/good", "/bad") and chat.turns:
        chat.thumb(command == "/good")
        print(f"kept in {args.feedback}")
    elif command in ("/a", "/b", "/tie") and chat.offer and chat.offer.differ:
        chat.choose({"/a": 0, "/b": 1}.get(command))
        print("neither" if command == "/tie" else f"kept in {chat.pairs}")
    else:
        print("there is nothing to judge yet")


def two_replies(policy: Policy, chat: Conversation, args) -> None:
    """Print two replies to the last question in random order: of the base model and the adapter, or
    two samples of one model."""
    writers = [(nullcontext(), args.directory)] * 2
    if policy.lora:
        writers[1] = policy.reference(), policy.lora.base_model_name_or_path
    random.shuffle(writers)
    texts = []
    for letter, (writer, _) in zip("ab", writers):
        print(f"[{letter}] ", end="")
        with writer:
            texts.append(say(policy, chat.prompt(), args))
    chat.offered(texts, [name for _, name in writers])
    print("/a, /b or /tie" if chat.offer.differ else "both replies are equal: nothing to choose")


def open_policy(args) -> Policy:
    """A model or an adapter, loaded as in the scripts, but without new trained weights. Its
    `reference` is the base model."""
    adapter = Path(args.directory, "adapter_config.json").exists()
    directory = {"adapter_name_or_path" if adapter else "model_name_or_path": args.directory}
    cfg = Config(**directory, **{name: getattr(args, name) for name in FLAGS})
    with redirect_stdout(sys.stderr):  # standard output is for replies only
        policy = load_policy(cfg, as_base=True)
        if adapter:
            load_adapter(policy.model, policy.lora, args.directory)
    return policy


def open_trained(args, run: str | None) -> Policy:
    """The model, or the result of a run that began with it. The reference is the model."""
    if run and not Path(args.directory, "adapter_config.json").exists():
        return open_policy(Namespace(**vars(args) | {"directory": run}))
    policy = open_policy(args)
    if run:  # the run continued this adapter: keep the old weights as the reference
        policy.reference = Reference(policy.lm)
        load_adapter(policy.model, policy.lora, run)
    return policy


@command("chat")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m nanoalign.chat", allow_abbrev=False)
    parser.add_argument("directory", nargs="?", help="a model or an adapter")
    parser.add_argument("--web", action="store_true", help="open a page for your browser")
    parser.add_argument("--port", type=int, default=7860, help="of the page")
    parser.add_argument("--feedback", type=Path, help="JSONL file for your judgements")
    parser.add_argument("--prompt", help="print one reply to this text and end")
    parser.add_argument("--system", default="", help="the system turn")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy")
    parser.add_argument("--top_p", type=float, default=0.95, help="probability to sample from")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of one reply")
    parser.add_argument("--seed", type=int, default=None, help="of sampling")
    add_flags(parser, *FLAGS)
    args = parser.parse_args(argv)
    for name, (must, holds) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise InputError(f"--{name} {value}: must {must}")
    args.system = utf8("--system", args.system)
    if args.web:
        if not args.directory and not (BUILT_IN / "config.json").exists():
            raise InputError("the built-in model is not trained yet: run train_sft.py first")
        args.directory = args.directory or str(BUILT_IN)
        args.feedback = args.feedback or BUILT_IN.parent / "chat" / "thumbs.jsonl"
    elif not args.directory:
        raise InputError("give a model or an adapter to talk to")
    prompt = args.prompt
    if prompt is None and not args.web and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().strip()
    if prompt is not None and not (prompt := utf8("the prompt", prompt)):
        raise InputError("nothing to reply to: give --prompt TEXT or pipe text in")
    if args.feedback:
        if args.feedback.suffix != ".jsonl":
            raise InputError(f"--feedback {args.feedback}: expected a name that ends in .jsonl")
        with saving(args.feedback):
            args.feedback.parent.mkdir(parents=True, exist_ok=True)
        print(tally(Conversation(args.directory, args.feedback)))
    if args.web:
        return serve(args, partial(open_trained, args))
    policy = open_policy(args)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if prompt is None:
        return talk(policy, args)
    chat = Conversation(args.directory, system=args.system)
    chat.ask(prompt)
    say(policy, chat.prompt(), args)


if __name__ == "__main__":
    main()
