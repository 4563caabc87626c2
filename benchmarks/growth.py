"""How costs grow with length and batch, with the vocabulary and with the data; and the start.

    python benchmarks/growth.py --model MODEL

It prints seven figures: the time per token of an SFT step, for sequence lengths and batch sizes; of
attention alone, for lengths of the row; of packing trees, for numbers and depths of branches; peak
memory of the head for vocabularies with the same number of tokens, beside plain logits; examples
per second from a file to ids and masks, beside TRL with dataset.map; peak memory of --many_rows
lines, read, encoded and put in order, beside that of their ids; and the seconds of a command that
trains one step, beside TRL's command line, and of --help.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compare import random_model, random_rows, write_rows  # noqa: E402


def best(action, times: int = 3) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    action()
    seconds = []
    for _ in range(times):
        start = time.monotonic()
        action()
        seconds.append(time.monotonic() - start)
    return min(seconds)


def lengths_and_batches(args) -> None:
    import torch

    from nanoalign.packing import Example
    from nanoalign.run.flags import SFTConfig
    from nanoalign.run.policy import load_policy

    cfg = SFTConfig(model_name_or_path=args.model, device="cpu", dtype="bfloat16")
    policy = load_policy(cfg)
    policy.lm.train()
    generator = torch.Generator().manual_seed(0)

    def per_token(sequences: int, length: int) -> str:
        ids = torch.randint(0, 1000, (sequences, length), generator=generator).tolist()
        batch = [Example([], [(row, [False] + [True] * (length - 1))]) for row in ids]
        seconds = best(lambda: (-policy.lm(batch).logps.sum()).backward())
        return f"{1e3 * seconds / (sequences * length):>8.2f} ms"

    print("\nSFT, forward and backward, time per token")
    for length in (256, 512, 1024, 2048, 4096):
        print(f"  one sequence of {length:>5} tokens {per_token(1, length)}")
    for size in (1, 2, 4, 8, 16):
        print(f"  {size:>2} sequences of 128 tokens  {per_token(size, 128)}")


def attention_of_rows(examples=(4, 16, 64, 256), length: int = 128) -> None:
    """Attention alone, forward and backward, of rows with more and more examples of one length:
    9 query heads on 3 key-value heads of 64, as SmolLM2-135M has them."""
    import torch

    from nanoalign.fast.attention import attention
    from nanoalign.packing import Example, pack

    print(f"\nattention, forward and backward, time per token; examples of {length} tokens")
    for number in examples:
        geometry = pack([Example([0], [([0] * length, [True] * length)])] * number).geometry
        tokens = number * length
        q, k, v = (torch.randn(1, h, tokens, 64, dtype=torch.bfloat16) for h in (9, 3, 3))
        for x in (q, k, v):
            x.requires_grad_()
        seconds = best(lambda: attention(q, k, v, geometry, 0.125).sum().backward(), 5)
        print(f"  a row of {tokens:>6} tokens {1e6 * seconds / tokens:>8.2f} us")


def packing_of_trees(numbers=(2, 4, 8, 16, 32, 64), length: int = 100) -> None:
    """Packing alone, and beside it the attention of the row, of trees of two kinds: a prompt with
    so many replies; and a conversation of so many turns with thoughts, in which each reply leaves
    the trunk (depth), and the next turn goes on without its thought."""
    import random

    import torch

    from nanoalign.fast.attention import attention
    from nanoalign.packing import Example, pack

    rng = random.Random(0)

    def ids(n):
        return [rng.randrange(1000) for _ in range(n)]

    print(
        f"\npacking a tree, and its attention, time per token of the row; texts of {length} tokens"
    )
    for number in numbers:
        replies = [ids(length) for _ in range(number)]
        trunk, turns = [], []
        for reply in replies:
            turns.append(trunk + ids(length // 2) + reply)  # with its thought, and what it says
            trunk = trunk + reply
        for kind, texts in (("branches", replies), ("turns", turns)):
            example = Example(ids(length), [(text, [True] * len(text)) for text in texts])
            geometry = pack([example]).geometry
            tokens = len(geometry.position)
            q, k, v = (torch.randn(1, h, tokens, 64, dtype=torch.bfloat16) for h in (9, 3, 3))
            packing = best(lambda: pack([example]))
            attending = best(lambda: attention(q, k, v, geometry, 0.125))
            times = (f"{1e6 * seconds / tokens:>8.2f} us" for seconds in (packing, attending))
            print(f"  {number:>3} {kind:<8} {tokens:>6} tokens", *times)


def data_memory(rows: int, longest: int, model: str) -> None:
    """In a process of its own: the memory that rows take, from the first line of their file to an
    order of KTO with its mismatches; and what their ids alone would take as 32-bit numbers."""
    import transformers

    from nanoalign.chatml import ChatML
    from nanoalign.data import epoch_order, with_mismatches
    from nanoalign.formats.layouts import KTO, read_examples

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = ChatML.jinja
    some = random_rows("kto", 1000, longest)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for i in range(rows):  # no two are alike
            texts = {name: f"{i} {some[i % 1000][name]}" for name in ("prompt", "completion")}
            file.write(json.dumps({**texts, "label": i % 3 == 0}) + "\n")
        file.flush()
        ChatML(tokenizer), tokenizer("what it needs once is not counted")
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew here
        before = resident("VmRSS")
        examples, _ = read_examples([file.name], KTO, tokenizer, ChatML(tokenizer))
    start = time.process_time()
    order = with_mismatches(epoch_order(examples, 0, 0), 1024)
    seconds = time.process_time() - start
    peak = resident("VmHWM") - before
    print(len(order), sum(map(len, examples)) * 4 / 2**20, peak, seconds)


def many_rows(rows: int, model: str) -> None:
    print(f"\nmemory of {rows:,} rows, read, encoded and in an order of KTO with its mismatches")
    for longest in (15, 150):
        command = [sys.executable, __file__, "--data", str(rows), str(longest), model]
        _, *found = subprocess.check_output(command, cwd=ROOT, text=True).split()
        ids, peak, seconds = map(float, found)
        print(f"  of {ids * 2**18 / rows:.0f} tokens: ids {ids:,.0f} MB, peak {peak:,.0f} MB, "
              f"{peak / ids:.2f} times as much; the order takes {seconds:.1f} s")  # fmt: skip


def head_memory(vocabulary: int, plain: bool) -> None:
    """In a process of its own: the memory that 2,048 tokens add to the head's own weights."""
    import torch

    from nanoalign.fast.head import token_logps
    from nanoalign.logps import Head

    torch.manual_seed(0)
    weight = torch.randn(vocabulary, 576, dtype=torch.bfloat16)
    h = torch.randn(2048, 576, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocabulary, (2048,))
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew here
    before = resident("VmRSS")
    if plain:
        logps = (h @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])
    else:
        logps = token_logps(h, Head(weight), targets)
    logps.sum().backward()
    print(resident("VmHWM") - before)


def resident(what: str) -> float:
    """This process's memory in MB: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) / 1024


def vocabularies() -> None:
    print("\nmemory of the log-probs of 2,048 tokens and their gradient, beyond the head's weights")
    for vocabulary in (16_384, 32_768, 65_536, 131_072, 262_144):
        megabytes = []
        for plain in ("", "plain"):
            command = [sys.executable, __file__, "--head", str(vocabulary), plain]
            megabytes.append(float(subprocess.check_output(command, cwd=ROOT, text=True)))
        ours, theirs = megabytes
        print(f"  vocabulary {vocabulary:>7}: {ours:>6.0f} MB, plain logits {theirs:>6.0f} MB")


def pipeline(rows: int, home: Path, model: str) -> None:
    """From a JSONL file of prompts and completions to what is trained on."""
    import datasets
    import transformers
    import trl

    from nanoalign.chatml import ChatML
    from nanoalign.formats.layouts import SFT, read_examples

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = ChatML.jinja
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    datasets.disable_progress_bars()
    config = trl.SFTConfig(
        output_dir=str(home / "trl"), report_to="none", use_cpu=True, max_length=1024, bf16=False,
        eos_token="<|im_end|>",
    )  # fmt: skip
    print(f"\n{rows:,} rows, from the file to ids and masks, beside TRL's SFTTrainer")
    for longest in (15, 150):
        talk = [
            {"prompt": [{"role": "user", "content": row["prompt"]}],
             "completion": [{"role": "assistant", "content": row["completion"]}]}
            for row in random_rows("sft", rows, longest)
        ]  # fmt: skip
        path = write_rows(home / f"rows-{longest}.jsonl", talk)
        start = time.monotonic()
        examples, _ = read_examples([path], SFT, tokenizer, ChatML(tokenizer))
        ours = time.monotonic() - start
        start = time.monotonic()
        cache = str(home / f"cache-{longest}")
        data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
        trl.SFTTrainer(model=network, args=config, train_dataset=data, processing_class=tokenizer)
        theirs = time.monotonic() - start
        print(f"  of {sum(map(len, examples)) / rows:.0f} tokens: {rows / ours:,.0f} examples/s, "
              f"theirs {rows / theirs:,.0f}: {theirs / ours:.1f}x")  # fmt: skip


def commands(home: Path, model: str) -> None:
    """As typed: everything from the shell's prompt to the shell's prompt."""
    train_sft, trl = str(ROOT / "train_sft.py"), str(Path(sys.executable).with_name("trl"))
    data = home / "few"
    data.mkdir()
    write_rows(data / "train.jsonl", random_rows("sft", 8))
    same = ["--model_name_or_path", model, "--max_steps", "1", "--report_to", "none"]
    ours = [sys.executable, train_sft, *same, "--dataset_name", str(data / "train.jsonl")]
    ours += ["--output_dir", str(home / "ours"), "--overwrite_output_dir"]
    theirs = [trl, "sft", *same, "--dataset_name", str(data), "--use_peft", "--use_cpu"]
    theirs += ["--output_dir", str(home / "theirs"), "--bf16", "false"]

    def seconds(command) -> float:
        def run():
            done = subprocess.run(command, capture_output=True, text=True, cwd=home)
            if done.returncode:
                sys.exit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")

        return best(run, 2)

    ours, theirs = seconds(ours), seconds(theirs)
    print("\nthe whole command for one step of a tiny model")
    print(f"  ours {ours:.1f} s, TRL {theirs:.1f} s: {ours / theirs:.2f} of it")
    print(f"  train_sft.py --help {seconds([sys.executable, train_sft, '--help']):.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="a model directory; else a tiny one")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--many_rows", type=int, default=100_000)
    parser.add_argument("--head", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--data", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.head:
        return head_memory(int(args.head[0]), bool(args.head[1]))
    if args.data:
        return data_memory(int(args.data[0]), int(args.data[1]), args.data[2])
    from nanoalign.run.command import quiet

    quiet()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        tiny = random_model("tiny", home / "tiny")
        args.model = args.model or tiny
        commands(home, tiny)
        pipeline(args.rows, home, args.model)
        many_rows(args.many_rows, args.model)
        vocabularies()
        attention_of_rows()
        packing_of_trees()
        lengths_and_batches(args)


if __name__ == "__main__":
    main()
