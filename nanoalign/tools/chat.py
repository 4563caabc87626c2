"""Talk to what you trained: python -m nanoalign.chat DIR

DIR is a model or an adapter. Commands while talking: /reset starts over, /undo takes the last turn
back, /system TEXT sets the system turn, /compare shows beside each reply the one of the base model
without the adapter, an empty line or Ctrl-D ends. Ctrl-C stops a reply, not the program.

For scripts: --prompt TEXT, or text piped in, gives one reply on standard output.

A reply is printed as it is made, by transformers' own generate and its KV cache. Control characters
in it are shown escaped: a model's words must not move the cursor or set the terminal's title.
"""

import contextlib
import math
import sys
from pathlib import Path

import torch
from transformers import TextStreamer

from nanoalign import InputError
from nanoalign.formats.peft import load_adapter
from nanoalign.model import Policy, generate
from nanoalign.run.command import command
from nanoalign.run.flags import POSITIVE, Config, Parser, add_flags
from nanoalign.run.log import printable
from nanoalign.run.policy import load_policy

FLAGS = "device", "chat_template", "chat_template_kwargs", "load_in_4bit", "trust_remote_code"
BOUNDS = {  # what a number must do, and whether it does
    "temperature": ("be at least 0 and finite", lambda x: 0 <= x < math.inf),
    "top_p": ("be above 0 and at most 1", lambda x: 0 < x <= 1),
    "max_new_tokens": POSITIVE,
    "seed": ("be at least 0 and less than 2**63", lambda x: 0 <= x < 2**63),
}


class Printer(TextStreamer):
    """Prints a reply piece by piece and keeps it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.reply = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.reply += text
        print(printable(text), end="\n" if stream_end else "", flush=True)


def say(policy: Policy, system: str, history: list[dict], args) -> str:
    """Print the reply to a conversation as it is made, and return it; Ctrl-C cuts it short."""
    start = [{"role": "system", "content": system}] if system else []
    how = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
    printer = Printer(policy.tokenizer)
    try:
        generate(policy, [start + history], streamer=printer, **how)
    except KeyboardInterrupt:
        print(" [stopped]")
    return printer.reply


def utf8(name: str, words: str | bytes) -> str:
    """What was typed or piped in, as UTF-8 whatever the locale. What the locale could not read,
    Python has left as surrogates, which no tokenizer takes."""
    try:
        raw = words if isinstance(words, bytes) else words.encode(errors="surrogateescape")
        return raw.decode()
    except UnicodeError:
        raise InputError(f"{name}: is not UTF-8") from None


def talk(policy: Policy, args) -> None:
    """The conversation at the terminal."""
    system, history, compare = args.system, [], False
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
            history = []
        elif command == "/undo":
            history = history[:-2]
        elif command == "/system":
            system = rest
        elif command == "/compare":
            compare = not compare and policy.lora is not None
            print("the base model's reply comes first" if compare else "compare is off")
        elif command.startswith("/"):
            print("commands: /reset  /undo  /system TEXT  /compare  (an empty line ends)")
        else:
            history.append({"role": "user", "content": line})
            try:
                if compare:
                    print("[base] ", end="")
                    with policy.reference():
                        say(policy, system, history, args)
                    print("[trained] ", end="")
                reply = say(policy, system, history, args)
            except InputError as error:  # it has become too long, say: /undo and /reset help
                print(error)
                history.pop()
            else:
                history.append({"role": "assistant", "content": reply})


def open_policy(args) -> Policy:
    """A model or an adapter directory, loaded as the scripts load it, but that nothing new trains
    and `reference` is the base model."""
    adapter = Path(args.directory, "adapter_config.json").exists()
    directory = {"adapter_name_or_path" if adapter else "model_name_or_path": args.directory}
    cfg = Config(**directory, **{name: getattr(args, name) for name in FLAGS})
    with contextlib.redirect_stdout(sys.stderr):  # what loading says is no reply
        policy = load_policy(cfg, as_base=True)
        if adapter:
            load_adapter(policy.model, policy.lora, args.directory)
    return policy


@command("chat")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m nanoalign.chat", allow_abbrev=False)
    parser.add_argument("directory", help="a model or an adapter")
    parser.add_argument("--prompt", help="one reply to this, then the end")
    parser.add_argument("--system", default="", help="the system turn")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus to sample from")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of one reply")
    parser.add_argument("--seed", type=int, default=None, help="of sampling")
    add_flags(parser, *FLAGS)
    args = parser.parse_args(argv)
    for name, (must, holds) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise InputError(f"--{name} {value}: must {must}")
    args.system = utf8("--system", args.system)
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().strip()
    if prompt is not None and not (prompt := utf8("the prompt", prompt)):
        raise InputError("nothing to reply to: give --prompt TEXT or pipe text in")
    policy = open_policy(args)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if prompt is None:
        return talk(policy, args)
    say(policy, args.system, [{"role": "user", "content": prompt}], args)


if __name__ == "__main__":
    main()
