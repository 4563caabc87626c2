"""The same training here and in TRL + PEFT (+ bitsandbytes), side by side.

    pip install -e ".[bench]"
    python benchmarks/compare.py --model MODEL --dpo_data PAIRS.jsonl --methods dpo --pairs 3

Both sides train the same examples in the same order from the same adapter. Each run is a process,
and the sides take turns. For each method and base this prints real tokens per second, peak memory
(resident set; on CUDA the allocated memory), the ratio of each pair of runs, and the first and last
losses. Tokens are counted for both sides as in TRL: prompts and replies, a DPO prompt twice, no
padding, no KL rows. The first step is left out. On CUDA the clock is CUDA's events. With
--peak_tflops the model FLOPs utilization is printed, too: the operations that the mathematics of a
step needs (see `step_flops`), divided by what the machine could do in this time.

TRL runs with its best settings: bf16, padding_free for SFT, its default chunks of logits, gradient
checkpointing on or off, whichever is faster (--peer_checkpointing turns it on), and on a GPU
--peer_attention flash_attention_2. Neither side makes a logits matrix. TRL's head computes every
position on a CPU, and labelled ones only on a GPU (add_fused_lm_head asks _use_triton). With
--peer_labelled it computes labelled ones only on a CPU, too. If others use the machine, --cpu_time
with OMP_NUM_THREADS=1 counts the seconds that a process has computed.

Ours can run with --torch_compile. In bf16 both sides round differently, and LoRA's dropout draws
other masks. With --dtype float32 --lora_dropout 0 the losses agree to the printed digit. Without a
data flag random words are used, and without --model a --shape with random weights.
"""

import argparse
import itertools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
METHODS = ("sft", "dpo", "kto")
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "tiny": (64, 128, 2, 4, 2, 1024, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
}


# ------------------------------------------------------------------ what both sides are given


def random_model(shape: str, directory: Path) -> str:
    """A Qwen2 of a real shape with random bf16 weights, and a ChatML tokenizer of 512 tokens."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    from nanoalign.world import train_tokenizer

    h, i, layers, heads, kv, vocabulary, tied = SHAPES[shape]
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([" ".join(words(random.Random(0), 5000))])
    config = Qwen2Config(
        hidden_size=h, intermediate_size=i, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def words(rng: random.Random, count: int) -> list[str]:
    syllables = "ba ce di fo gu ha je ki lo mu na pe qi ro su ta ve wi xo yu".split()
    return ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count)]


def random_rows(method: str, count: int, longest: int = 150) -> list[dict]:
    rng = random.Random(1)

    def text():
        return " ".join(words(rng, rng.randint(min(20, longest // 2), longest)))

    keys = {"sft": ["completion"], "dpo": ["chosen", "rejected"], "kto": ["completion"]}[method]
    rows = [{"prompt": text()} | {k: text() for k in keys} for _ in range(count)]
    return [row | {"label": i % 2 == 0} for i, row in enumerate(rows)] if method == "kto" else rows


def prepare(args, method: str, directory: Path) -> tuple[int, float]:
    """Write ours.jsonl (messages), theirs.jsonl (rendered ChatML) and the starting adapter.

    Both sides must see the same ids. TRL ends every reply with the marker, so one that was cut to
    fit ends with it here, too; rows whose text would be split into other tokens when prompt and
    reply are one string, as they are there, are left out, like those that fill max_length.
    Returns the tokens of the steps that are timed, and the FLOPs of a pass over them.
    """
    from nanoalign.data import Limits, with_mismatches
    from nanoalign.formats import layouts
    from nanoalign.run.flags import SFTConfig
    from nanoalign.run.policy import load_policy, save_policy

    wanted = args.batch * (args.steps + 1)
    kind = {"sft": layouts.SFT, "dpo": layouts.DPO, "kto": layouts.KTO}[method]
    torch_seed()
    cfg = SFTConfig(model_name_or_path=args.model, lora_dropout=args.lora_dropout, device="cpu")
    cfg.chat_template = "chatml"
    policy = load_policy(cfg)
    save_policy(policy, directory / "adapter")
    source = getattr(args, f"{method}_data") or write_rows(
        directory / "rows.jsonl", random_rows(method, 2 * wanted)
    )
    limits = Limits(args.max_length)
    examples, _ = layouts.read_examples([source], kind, policy.tokenizer, policy.template, limits)
    examples = list(examples)
    random.Random(0).shuffle(examples)
    decode, ours, theirs = policy.tokenizer.decode, [], []

    def alike(example):
        for ids, _ in example.texts:
            ids[-1] = policy.template.end
            whole = example.prompt + ids
            if policy.tokenizer(decode(whole), add_special_tokens=False)["input_ids"] != [*whole]:
                return False
        return True

    examples = list(itertools.islice(filter(alike, examples), wanted))
    if len(examples) < wanted:
        sys.exit(f"{source}: {len(examples)} rows that can be used, expected {wanted}")
    for example in examples:  # ids -> text, so that both sides encode what was cut to fit
        replies = [decode(ids) for ids, _ in example.texts]
        keys = ("chosen", "rejected") if method == "dpo" else ("completion",)
        label = {"label": example.label} if method == "kto" else {}
        theirs.append({"prompt": decode(example.prompt), **dict(zip(keys, replies)), **label})
        texts = [([*ids], [*mask]) for ids, mask in example.texts]
        ours.append({"ids": [[*example.prompt], texts], **label})
    write_rows(directory / "ours.jsonl", ours)
    write_rows(directory / "theirs.jsonl", theirs)
    timed = examples[args.batch :]
    if method == "kto":
        timed = with_mismatches(examples, args.max_length)[args.batch :]
    return sum(map(len, timed)), sum(step_flops(policy.model, method, e) for e in timed)


def step_flops(model, method: str, example) -> float:
    """What an example needs in a LoRA step, and not what either side happens to compute: no
    padding, a prompt once, the head where a trained token is predicted, nothing a second time."""
    prompt, own = example.prompt, example.texts
    flops = flops_of(model, prompt, own) + flops_of(model, prompt, own, backward=True)
    if method == "dpo":  # the reference
        flops += flops_of(model, prompt, own)
    if method == "kto":  # the reference of y and y', and the policy of y'
        other = example.mismatch.texts
        flops += flops_of(model, prompt, own + other) + flops_of(model, prompt, other)
    return flops


def flops_of(model, prompt: list, completions: list, backward: bool = False) -> float:
    """A forward pass: 2 a weight and token, 4 d a query, key and layer (later keys are masked). A
    backward pass: as many again for frozen weights, which have no gradient of their own; twice as
    many for the adapter and for attention."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - adapter
    frozen -= head.numel() + (0 if head is table else table.numel())
    config, lengths = model.config, [len(ids) for ids, _ in completions]
    heads = config.num_attention_heads
    d = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tokens, trained = len(prompt) + sum(lengths), sum(sum(mask) for _, mask in completions)
    seen = len(prompt) ** 2 / 2 + sum(n * (len(prompt) + n / 2) for n in lengths)
    once = 2 * (frozen * tokens + head.numel() * trained)
    twice = 2 * adapter * tokens + 4 * d * config.num_hidden_layers * seen
    return once + 2 * twice if backward else once + twice


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def torch_seed() -> None:
    import torch

    torch.manual_seed(0)


# ------------------------------------------------------------------------------- the two sides


def settings(args) -> dict:
    return dict(
        learning_rate=1e-4, max_steps=args.steps + 1, logging_steps=1,
        per_device_train_batch_size=args.batch, output_dir=args.directory + "/" + args.worker,
    )  # fmt: skip


class Clock:
    """The moments at which steps ended; on CUDA its own events, so that no step waits for it."""

    now = time.monotonic  # or process_time (--cpu_time)

    def __init__(self, device: str):
        self.cuda, self.moments = device == "cuda", []

    def tick(self) -> None:
        import torch

        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.moments.append(event if self.cuda else self.now())

    def seconds(self) -> float:
        """Between the first and the last tick."""
        first, last = self.moments[0], self.moments[-1]
        if not self.cuda:
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1000


def clocked_steps(device: str) -> Clock:
    """A clock that ticks after each of our optimizer steps, in this process."""
    import nanoalign.train

    clock, step = Clock(device), nanoalign.train.optimizer_step

    def timed_step(*given, **more):
        done = step(*given, **more)
        clock.tick()
        return done

    nanoalign.train.optimizer_step = timed_step
    return clock


def run_ours(args) -> None:
    """The scripts as they are, on examples that are encoded already."""
    import nanoalign.run.session
    from nanoalign.packing import Example
    from nanoalign.run.command import quiet
    from nanoalign.run.flags import DPOConfig, KTOConfig, SFTConfig
    from train_dpo import run_dpo
    from train_kto import run_kto
    from train_sft import run_sft

    kind, run = {
        "sft": (SFTConfig, run_sft), "dpo": (DPOConfig, run_dpo), "kto": (KTOConfig, run_kto),
    }[args.method]  # fmt: skip

    def read(sources, *_, **__):
        from collections import Counter

        rows = [json.loads(line) for line in Path(sources[0]).read_text().splitlines()]
        examples = [
            Example(row["ids"][0], [tuple(c) for c in row["ids"][1]], row.get("label"), str(i), i)
            for i, row in enumerate(rows)
        ]
        return examples, Counter(rows=len(rows), examples=len(rows))

    clock, nanoalign.run.session.read_examples = clocked_steps(args.device), read
    quiet()
    cfg = kind(
        model_name_or_path=args.model, adapter_name_or_path=args.directory + "/adapter",
        dataset_name=[args.directory + "/ours.jsonl"], shuffle_dataset=False,
        overwrite_output_dir=True, dtype=args.dtype, load_in_4bit=args.qlora, device=args.device,
        torch_compile=args.torch_compile, save_steps=0,
        gradient_checkpointing=args.checkpointing, **settings(args),
    )  # fmt: skip
    run(cfg)
    text = (Path(cfg.output_dir) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    report(args, clock, [line["loss"] for line in lines])


def run_theirs(args) -> None:
    import datasets
    import peft
    import transformers
    import trl
    import trl.trainer.utils

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    tokenizer.eos_token = "<|im_end|>"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # a pad token of its own
        tokenizer.pad_token = next(t for t in tokenizer.all_special_tokens if t != "<|im_end|>")
    rows = [json.loads(ln) for ln in Path(args.directory, "theirs.jsonl").read_text().splitlines()]
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=args.dtype
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=args.dtype, device_map=args.device if args.qlora else None,
        quantization_config=quantization if args.qlora else None,
        attn_implementation=args.peer_attention,
    )  # fmt: skip
    name = args.method.upper()
    more = {"max_length": None}
    if args.method == "sft":
        more |= {"padding_free": True}
    config = getattr(trl, f"{name}Config")(
        train_sampling_strategy="sequential", bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu", gradient_checkpointing=args.checkpointing,
        save_strategy="no", report_to="none", disable_tqdm=True, **settings(args), **more,
    )  # fmt: skip
    if args.peer_labelled:  # where positions are chosen; the kernels ask a name of their own
        trl.trainer.utils._use_triton = lambda device: True
    clock = Clock(args.device)

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.tick()

    model = peft.PeftModel.from_pretrained(base, args.directory + "/adapter", is_trainable=True)
    trainer = getattr(trl, f"{name}Trainer")(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Steps()],
    )  # fmt: skip
    trainer.train()
    report(args, clock, [line["loss"] for line in trainer.state.log_history if "loss" in line])


def peak_memory(device: str) -> int:
    """Bytes: on CUDA the most that was allocated, else the largest resident size so far."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024  # KB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report(args, clock: Clock, losses: list[float]) -> None:
    seconds, peak = clock.seconds(), peak_memory(args.device)
    out = {"seconds": seconds, "peak": peak, "first": losses[0], "last": losses[-1]}
    Path(args.directory, f"{args.worker}.json").write_text(json.dumps(out))


# -------------------------------------------------------------------------------- the comparison


def side(args, worker: str, method: str, qlora: bool, directory: Path) -> dict:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--worker", worker, "--method", method]
    command += ["--directory", str(directory), "--model", args.model, "--device", args.device]
    command += ["--steps", str(args.steps), "--batch", str(args.batch), "--dtype", args.dtype]
    command += ["--qlora"] if qlora else []
    ours = worker == "ours"
    command += ["--torch_compile"] if ours and args.torch_compile else []
    command += ["--checkpointing"] if not ours and args.peer_checkpointing else []
    command += ["--peer_labelled"] if args.peer_labelled else []
    command += ["--cpu_time"] if args.cpu_time else []
    command += ["--peer_attention", args.peer_attention] if args.peer_attention else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{worker} failed:\n{done.stderr[-2000:]}")
    return json.loads((directory / f"{worker}.json").read_text())


def compare(args, method: str, qlora: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        tokens, flops = prepare(args, method, Path(name))
        speeds, memories = [], []
        for pair in range(args.pairs):
            order = ("ours", "theirs") if pair % 2 == 0 else ("theirs", "ours")
            results = {worker: side(args, worker, method, qlora, Path(name)) for worker in order}
            ours, theirs = results["ours"], results["theirs"]
            speeds.append(theirs["seconds"] / ours["seconds"])
            memories.append(ours["peak"] / theirs["peak"])
            print(
                f"{method.upper()} {'QLoRA' if qlora else 'LoRA':<5}  pair {pair + 1}:  "
                f"ours {tokens / ours['seconds']:7.1f} tok/s {ours['peak'] / 2**30:5.2f} GiB  "
                f"TRL {tokens / theirs['seconds']:7.1f} tok/s {theirs['peak'] / 2**30:5.2f} GiB  "
                f"speed x{speeds[-1]:.2f}  memory x{memories[-1]:.2f}  "
                f"loss {ours['first']:.4f} -> {ours['last']:.4f} / "
                f"{theirs['first']:.4f} -> {theirs['last']:.4f}",
                flush=True,
            )
            if args.peak_tflops:
                share = [
                    flops / (run["seconds"] * args.peak_tflops * 1e12) for run in (ours, theirs)
                ]
                print("    model FLOPs utilization: ours {:.1%}, TRL {:.1%}".format(*share))
    print(
        f"{method.upper()} {'QLoRA' if qlora else 'LoRA':<5}  median speed x"
        f"{statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f}), memory x"
        f"{statistics.median(memories):.2f} ({min(memories):.2f} to {max(memories):.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="a model directory with a ChatML tokenizer")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    for method in METHODS:
        parser.add_argument(f"--{method}_data", help="a data file")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--bases", nargs="+", choices=["lora", "qlora"], default=["lora", "qlora"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--lora_dropout", type=float, default=0.05, help="(DPO and KTO ignore it)")
    parser.add_argument("--peak_tflops", type=float, help="the machine's; dense bf16 on H200: 989")
    parser.add_argument("--torch_compile", action="store_true", help="on our side")
    parser.add_argument("--peer_checkpointing", action="store_true")
    parser.add_argument("--peer_labelled", action="store_true", help="its head as on a GPU")
    parser.add_argument("--peer_attention", help="flash_attention_2, say, where it is installed")
    parser.add_argument("--cpu_time", action="store_true", help="not the clock's: of all threads")
    parser.add_argument("--worker", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--qlora", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.cpu_time:
        Clock.now = time.process_time
    if args.worker:
        return {"ours": run_ours, "theirs": run_theirs}[args.worker](args)
    import torch

    needed = ["torch", "transformers", "trl", "peft"]
    needed += ["bitsandbytes"] if "qlora" in args.bases else []
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{device}, {os.cpu_count()} cores; batch {args.batch}, max_length {args.max_length}; "
          + ", ".join(f"{name} {version(name)}" for name in needed))  # fmt: skip
    with tempfile.TemporaryDirectory() as home:
        if args.model is None:
            args.model = random_model(args.shape or "tiny", Path(home))
        for method in args.methods:
            for base in args.bases:
                compare(args, method, base == "qlora")


if __name__ == "__main__":
    main()
