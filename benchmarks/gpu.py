"""Speed, utilization and memory of complete training runs on one GPU.

    python benchmarks/gpu.py --quick --out gpu.jsonl   # the most important ones, in 6 minutes
    python benchmarks/gpu.py --out gpu.jsonl           # all, in 20; --parts, --shapes ... for some
    python benchmarks/gpu.py --tiny                    # the same code, on any machine

Nothing is downloaded. Models have the shapes of Llama 3 and random weights, which are made on the
device (in 4 bits layer by layer, so the full model is never in memory). Examples are random tokens.
Each measurement is a process with a deadline, and its result is written at once as a line of JSON.
So if you have a card for some minutes only, you keep what was measured. The most important
measurements come first.

    tests     tests/test_gpu.py without complete runs
    compiled  the layers of the next models are compiled, and their kernels stored on disk
    ours      a run of a script (train_sft.py ...), with its default flags
    theirs    TRL + PEFT (+ bitsandbytes), if installed, on the same ids and weights
    kernels   NF4's decode beside a copy, attention beside its definition
    rows      8B QLoRA SFT with checkpointing, in rows of 2,048 to 32,768 tokens

Tokens are counted as in TRL: a DPO prompt twice, KTO's mismatches not. Utilization is the number of
operations that the mathematics of a step needs, divided by what the GPU could multiply in this time
(see compare.flops_of). These are 2 operations for each frozen weight and token in forward and 2 in
backward (frozen weights have no gradient), three times 2 for an adapter, 4 d for each query and key
that it sees, the head where a trained token is predicted, and the reference's forward passes.
Padding and repeated work are not counted, and a prompt is counted once. What the GPU could multiply
is measured, too, by a product of 8192 x 8192 matrices in bf16. --peak_tflops takes another number,
from the data sheet for example.
"""

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from compare import METHODS, peak_memory, step_flops  # noqa: E402
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, PreTrainedTokenizerFast  # noqa: E402

import nanoalign.train  # noqa: E402
from nanoalign.data import with_mismatches  # noqa: E402
from nanoalign.fast import attention as fast_attention  # noqa: E402
from nanoalign.formats.weights import skeleton  # noqa: E402
from nanoalign.logps import PackedLM  # noqa: E402
from nanoalign.lora import add_lora  # noqa: E402
from nanoalign.nf4 import NF4Linear  # noqa: E402
from nanoalign.packing import Example, attention, pack  # noqa: E402
from nanoalign.run import policy as run_policy  # noqa: E402
from nanoalign.run import session  # noqa: E402
from nanoalign.run.bytes import row_bytes, sizes_of, standing_bytes  # noqa: E402
from nanoalign.run.command import quiet  # noqa: E402
from nanoalign.run.device import row_of  # noqa: E402
from nanoalign.run.flags import DPOConfig, KTOConfig, SFTConfig  # noqa: E402
from nanoalign.train import fitting  # noqa: E402
from train_dpo import run_dpo  # noqa: E402
from train_kto import run_kto  # noqa: E402
from train_sft import run_sft  # noqa: E402

SCRIPTS = {"sft": (SFTConfig, run_sft), "dpo": (DPOConfig, run_dpo), "kto": (KTOConfig, run_kto)}
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "tiny": (64, 128, 2, 4, 2, 320, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}
SHAPES |= {f"{name}'s layer": (*size[:2], 1, *size[3:]) for name, size in SHAPES.items()}
BATCH = {"sft": 16, "dpo": 8, "kto": 16}  # examples a step: some 7,000 tokens each
PEERS = {"lora": ("trl", "peft"), "qlora": ("trl", "peft", "bitsandbytes")}


@dataclass
class Case:
    """One measurement. `part` is what the top of this file lists; the others what it measures."""

    part: str
    method: str = "sft"
    base: str = "lora"
    shape: str = "8b"
    device: str = "cuda"
    rows: int | None = None  # tokens; None: what the run settles with the card
    batch: int = 16
    warm: int = 2  # steps that are not timed
    steps: int = 6  # that are
    seconds: float = 300  # after which it is stopped


# ------------------------------------------------------------------- what both sides are given


def config_of(shape: str) -> LlamaConfig:
    hidden, intermediate, layers, heads, kv, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=131072, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], bos_token_id=None, eos_token_id=1, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip


def random_model(shape: str, device: str, four_bits: bool = False) -> nn.Module:
    """A frozen model in bf16 whose weights are drawn where they stay. With `four_bits` each linear
    layer is packed before the next is drawn."""
    torch.manual_seed(0)
    model = skeleton(config_of(shape), torch.bfloat16)
    head, drawn = model.get_output_embeddings(), {}  # a tied tensor stands in two places
    for name, module in list(model.named_modules()):
        for leaf, like in list(module.named_parameters(recurse=False)):
            if like not in drawn:
                weight = torch.ones(like.shape, dtype=like.dtype, device=device)
                drawn[like] = nn.Parameter(weight if like.dim() == 1 else weight.normal_(0, 0.02))
            setattr(module, leaf, drawn[like].requires_grad_(False))
        if four_bits and type(module) is nn.Linear and module is not head:
            model.set_submodule(name, NF4Linear.from_linear(module))
            module.weight = None  # nothing dense is kept, and `drawn` is the last to hold it
            del drawn[like]
    return model.to(device).eval()


def words_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Token i is the word "wi": any ids are a text, which every tokenizer call turns back into the
    same ids, wherever it is cut in two."""
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), vocabulary)]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def write_model(shape: str, directory: Path) -> str:
    """A model's directory without its weights, which are drawn."""
    config_of(shape).save_pretrained(directory)
    words_tokenizer(SHAPES[shape][5]).save_pretrained(directory)
    return str(directory)


def random_examples(case: Case) -> list[Example]:
    """Prompts of 64 to 192 random tokens and replies of 128 to 512; of a tiny model, a tenth."""
    rng, vocabulary = random.Random(1), SHAPES[case.shape][5]
    unit = 6 if case.shape.startswith("tiny") else 64

    def ids(low, high):
        return [rng.randrange(4, vocabulary) for _ in range(rng.randint(low * unit, high * unit))]

    examples = []
    for i in range(case.batch * (case.warm + case.steps)):
        replies = [ids(2, 8) + [1] for _ in range(2 if case.method == "dpo" else 1)]
        label = i % 2 == 0 if case.method == "kto" else None
        replies = [(reply, [True] * len(reply)) for reply in replies]
        examples.append(Example(ids(1, 3), replies, label, where=f"example {i}", number=i))
    return examples


def flops_needed(case: Case, examples: list[Example]) -> float:
    """FLOPs of a pass over the examples, counted on a model without memory."""
    counted = skeleton(config_of(case.shape), torch.bfloat16)
    add_lora(counted, r=16, scaling=1.0)
    if case.method == "kto":
        examples = with_mismatches(examples, 1024)
    return sum(step_flops(counted, case.method, example) for example in examples)


# ------------------------------------------------------------------------------- the two sides


def digits(x: float) -> float:
    return float(f"{x:.4g}")


class Stopwatch:
    """When steps ended, by a device that had done all it was given; and the peak of memory since it
    was made."""

    def __init__(self, case: Case):
        self.case, self.moments = case, [time.monotonic()]
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def start(self) -> None:
        self.moments = [time.monotonic()]

    def tick(self) -> None:
        if self.case.device == "cuda":
            torch.cuda.synchronize()
        self.moments.append(time.monotonic())

    def result(self, examples: list[Example], losses: list[float]) -> dict:
        case, moments = self.case, self.moments
        timed, seconds = examples[case.batch * case.warm :], moments[-1] - moments[case.warm]
        flops = flops_needed(case, timed)
        return {
            "tokens_per_second": digits(sum(map(len, timed)) / seconds),
            "tflops": digits(flops / seconds / 1e12),
            "peak_gib": round(peak_memory(case.device) / 2**30, 2),
            "first_step_s": round(moments[1] - moments[0], 2),
            "slowest_step_s": round(
                max(b - a for a, b in zip(moments[case.warm :], moments[case.warm + 1 :])), 3
            ),
            "losses": [round(losses[0], 4), round(losses[-1], 4)],
        }


def ours(case: Case, home: Path) -> dict:
    """The script as it is, but that weights are drawn and examples are encoded already."""
    kind, run = SCRIPTS[case.method]
    examples = random_examples(case)
    more = {"max_row_tokens": case.rows}
    if case.part == "rows":
        more["gradient_checkpointing"] = True
    cfg = kind(
        model_name_or_path=write_model(case.shape, home / "model"), dataset_name=["random"],
        output_dir=str(home / "out"), device=case.device, load_in_4bit=case.base == "qlora",
        learning_rate=1e-4, max_steps=case.warm + case.steps, logging_steps=1, save_steps=0,
        per_device_train_batch_size=case.batch, shuffle_dataset=False, **more,
    )  # fmt: skip
    optimizer_step, watch = nanoalign.train.optimizer_step, Stopwatch(case)

    def timed_step(*given, **how):
        if len(watch.moments) == 1:
            watch.start()
        done = optimizer_step(*given, **how)
        watch.tick()
        return done

    def load_base(cfg, name, train_all=False):
        return PackedLM(random_model(case.shape, case.device, cfg.load_in_4bit))

    count = Counter(rows=len(examples), examples=len(examples))
    with ExitStack() as stack:
        for place, attribute, new in (
            (nanoalign.train, "optimizer_step", timed_step),
            (run_policy, "load_base", load_base),
            (session, "read_examples", lambda *_, **__: (examples, count)),
        ):
            stack.enter_context(patch.object(place, attribute, new))
        lm = run(cfg).policy.lm
    text = (home / "out" / "metrics.jsonl").read_text()
    losses = [json.loads(line)["loss"] for line in text.splitlines()]
    limit = cfg.max_row_tokens or lm.row_tokens
    batches = fitting(examples, case.batch, limit)
    row = row_of(cfg, lm, max(len(pack(batch).input_ids) for batch in batches))
    counted = sum((standing_bytes(lm.model) | row_bytes(sizes_of(lm.model), row)).values())
    settled = {"rows": limit, "checkpointing": lm.model.is_gradient_checkpointing}
    counts = {"counted_gib": round(counted / 2**30, 2)}  # by run/bytes.py
    return settled | watch.result(examples, losses) | counts


def peer_model(case: Case):
    """The same weights for PEFT; in 4 bits in bitsandbytes' layers."""
    import peft

    model = random_model(case.shape, case.device)
    if case.base == "qlora":
        import bitsandbytes as bnb

        head = model.get_output_embeddings()
        for name, linear in list(model.named_modules()):
            if type(linear) is not nn.Linear or linear is head:
                continue
            size = linear.in_features, linear.out_features
            packed = bnb.nn.Linear4bit(
                *size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(
                linear.weight.data.cpu(), requires_grad=False, quant_type="nf4"
            )
            model.set_submodule(name, packed.to(case.device))
        model.is_loaded_in_4bit = True  # PEFT asks for it
    if case.device == "cuda" and find_spec("flash_attn"):
        model.set_attn_implementation("flash_attention_2")
    dropout = 0.05 if case.method == "sft" else 0.0  # as ours has it
    return peft.get_peft_model(model, peft.LoraConfig(
        r=16, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    ))  # fmt: skip


def theirs(case: Case, home: Path) -> dict:
    """TRL without gradient checkpointing, or with it where there is no memory for that."""
    try:
        return {"checkpointing": False} | peer_run(case, home, checkpointing=False)
    except torch.OutOfMemoryError:
        pass  # out here, the frames that hold its tensors are gone
    return {"checkpointing": True} | peer_run(case, home, checkpointing=True)


def peer_run(case: Case, home: Path, checkpointing: bool) -> dict:
    import datasets
    import transformers
    import trl

    examples, tokenizer = random_examples(case), words_tokenizer(SHAPES[case.shape][5])
    words = tokenizer.convert_ids_to_tokens
    keys = ("chosen", "rejected") if case.method == "dpo" else ("completion",)
    rows = [
        {"prompt": " ".join(words(e.prompt)) + " "}
        | {key: " ".join(words(ids)) for key, (ids, _) in zip(keys, e.texts)}
        | ({"label": e.label} if case.method == "kto" else {})
        for e in examples
    ]
    name, steps = case.method.upper(), case.warm + case.steps
    more = {"max_length": None}
    if case.method == "sft" and case.device == "cuda" and find_spec("flash_attn"):
        more["padding_free"] = True
    config = getattr(trl, f"{name}Config")(
        output_dir=str(home / "theirs"), train_sampling_strategy="sequential", bf16=True,
        use_cpu=case.device == "cpu", gradient_checkpointing=checkpointing, save_strategy="no",
        report_to="none", disable_tqdm=True, learning_rate=1e-4, max_steps=steps, logging_steps=1,
        per_device_train_batch_size=case.batch, **more,
    )  # fmt: skip
    model, watch = peer_model(case), Stopwatch(case)

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            watch.start()

        def on_step_end(self, *_, **__):
            watch.tick()

    trainer = getattr(trl, f"{name}Trainer")(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Steps()],
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return watch.result(examples, losses)


# ------------------------------------------------------------------------------------- kernels


def seconds(case: Case, action, least: float = 0.2) -> float:
    """The mean time of a call, after three that warm up, over at least so many seconds."""

    def wait():
        if case.device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        action()
    wait()
    calls, begun = 0, time.monotonic()
    while (past := time.monotonic() - begun) < least or calls == 0:
        for _ in range(10 if case.device == "cuda" else 1):
            action()
        wait()
        calls += 10 if case.device == "cuda" else 1
    return past / calls


def kernels(case: Case, home: Path) -> dict:
    torch.manual_seed(0)
    tiny, device = case.shape == "tiny", case.device
    n = 256 if tiny else 8192
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    product = 2 * n**3 / seconds(case, lambda: a @ a) / 1e12
    linear = nn.Linear(256, 512, bias=False) if tiny else nn.Linear(4096, 14336, bias=False)
    layer = NF4Linear.from_linear(linear.to(device, torch.bfloat16))
    weight = layer.dequantize()
    decoded = layer.packed.nbytes + layer.absmax.nbytes + weight.nbytes
    decode, copy = seconds(case, layer.dequantize), seconds(case, weight.clone)
    result = {
        "product_tflops": digits(product),
        "decode_gb_s": digits(decoded / decode / 1e9),
        "copy_gb_s": digits(2 * weight.nbytes / copy / 1e9),
    }
    for part in (1,) if tiny else (42, 85):
        result[f"attention of {48 * part} tokens"] = attention_beside_definition(case, part)
    return result


def attention_beside_definition(case: Case, part: int) -> dict:
    """Eight pairs of examples in a row, with Llama-3's heads, forward and backward in bf16: the
    times, and by how much the outputs differ from the definition in fp32, in its own root mean
    square."""
    tokens = 2 * part  # of a prompt, and of each of its replies but the last token
    replies = [([first, *[1] * tokens], [True] * (tokens + 1)) for first in (2, 3)]
    pair = Example([1] * tokens, replies)
    geometry = pack([pair] * 8, case.device).geometry
    heads, kv, width = (4, 2, 16) if case.shape == "tiny" else (32, 8, 128)
    q, k, v = (
        torch.randn(1, h, len(geometry.position), width, device=case.device)
        for h in (heads, kv, kv)
    )
    exact = attention(q, k, v, geometry, width**-0.5)
    inputs = [t.bfloat16().requires_grad_() for t in (q, k, v)]
    upstream = torch.randn_like(exact).bfloat16()

    def run(how):
        torch.autograd.grad(how(*inputs, geometry, width**-0.5), inputs, upstream)

    with torch.no_grad():
        error = (fast_attention.attention(*inputs, geometry, width**-0.5) - exact).square().mean()
    return {
        "ms": round(1e3 * seconds(case, lambda: run(fast_attention.attention)), 3),
        "definition_ms": round(1e3 * seconds(case, lambda: run(attention)), 3),
        "error": float(f"{(error / exact.square().mean()).sqrt():.1e}"),
    }


# ------------------------------------------------------------------------------------- its tests


def tests(case: Case, home: Path) -> dict:
    """How many passed and which failed, also where there was no time for all."""
    few = "nf4" if case.shape == "tiny" else "not run"
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider"]
    command += [f"{ROOT}/tests/test_gpu.py", "-k", f"{case.device} and {few}"]
    if case.device == "cuda" and find_spec("xdist"):
        command += ["-n", "8"]  # most of the time goes into compiling
    with open(home / "said", "w+", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            done = process.wait(case.seconds) in (0, 1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done = False
        file.seek(0)
        passed, failed = outcomes(file.read())
    return {"passed": len(passed), "failed": sorted(failed), "all": done}


def outcomes(said: str) -> tuple[set[str], set[str]]:
    """Names of the tests that passed and failed by what pytest -v has said, with xdist or not."""
    found = {"PASSED": set(), "FAILED": set()}
    for line in said.splitlines():
        for word, names in found.items():
            before, there, after = line.partition(word)
            if there and "::" in line:
                name = before if "::" in before else after
                names.add(name.partition("::")[2].partition(" - ")[0].strip())
    return found["PASSED"], found["FAILED"]


# ----------------------------------------------------------------------------------- all of it


def quick(args) -> list[Case]:
    """What a card that is there for some minutes is used for. Some of a case's seconds go to
    Python's imports and to weights, and on an H200 a second to each step."""
    tiny = args.tiny
    shared = dict(device=args.device, shape="tiny" if tiny else "8b", rows=None if tiny else 4096)
    mine = [("dpo", "qlora"), ("dpo", "lora"), ("sft", "qlora")]
    runs = [
        Case("ours", method, base, **shared, batch=2 if tiny else BATCH[method], seconds=60)
        for method, base in mine
    ]
    peer = [replace(runs[0], part="theirs", rows=None, seconds=75)]
    kernel = Case("kernels", device=args.device, shape=shared["shape"], seconds=40)
    return [replace(kernel, part="tests", seconds=100), *runs, *peer, kernel]


def thorough(args) -> list[Case]:
    shared = dict(device=args.device)
    if args.tiny:
        shared |= dict(shape="tiny", warm=1, steps=2)
    found = [Case("tests", **shared), Case("kernels", **shared)]
    shapes = ["tiny"] if args.tiny else args.shapes
    for shape in shapes:
        for base in args.bases:
            for method in args.methods:
                more = shared | dict(shape=shape, batch=2 if args.tiny else BATCH[method])
                found.append(Case("ours", method, base, **more))
                found.append(Case("theirs", method, base, **more))
    for rows in (64, 128) if args.tiny else (2048, 4096, 8192, 16384, 32768):
        more = shared | dict(batch=8 if args.tiny else 72, warm=1, steps=2, rows=rows)
        found.append(Case("rows", "sft", "qlora", **more))
    return found


def in_turn(cases: list[Case], minutes: float, here: bool) -> Iterator[dict]:
    """The results, each as soon as it is there. Compilers work on the layers of all models while
    the tests run; nothing else shares the device with a measurement. `here`: in this process."""
    ends = time.monotonic() + 60 * minutes

    def result(case):
        case = replace(case, seconds=round(min(case.seconds, ends - time.monotonic())))
        if case.seconds < 20:
            return vars(case) | {"error": "no time left"}
        return measure(case) if here or case.part == "tests" else spawn(case)

    at_once = [case for case in cases if case.part == "tests"]
    for case in cases if at_once else []:
        if case.part == "ours":
            more = dict(shape=f"{case.shape}'s layer", rows=2048, warm=0, steps=1, seconds=100)
            at_once.append(replace(case, part="compiled", **more))
    with ThreadPoolExecutor(4) as pool:
        yield from map(result, at_once) if here else pool.map(result, at_once)
    yield from (result(case) for case in cases if case.part != "tests")


def measure(case: Case) -> dict:
    """In this process. Its memory and compilers start as fresh as the process is."""
    kinds = dict(tests=tests, compiled=ours, ours=ours, rows=ours, theirs=theirs, kernels=kernels)
    with tempfile.TemporaryDirectory() as home:
        return vars(case) | kinds[case.part](case, Path(home))


def spawn(case: Case) -> dict:
    """In a process of its own, until its deadline; what goes wrong there is its result."""
    command = [sys.executable, __file__, "--case", json.dumps(vars(case))]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=case.seconds
        )
    except subprocess.TimeoutExpired:
        return vars(case) | {"error": f"not done after {case.seconds:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        print(done.stderr[-3000:], file=sys.stderr)
        return vars(case) | {"error": lines[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: str) -> dict:
    names = ["torch", "transformers", "triton", "trl", "peft", "bitsandbytes", "flash_attn"]
    return {
        "part": "machine",
        "name": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        **{name: version(name) for name in names if find_spec(name)},
    }


def table(results: list[dict], peak: float | None) -> str:
    """The results in Markdown, for benchmarks/README.md."""
    found = {(r["part"], r["shape"], r["base"], r["method"]): r for r in results if "base" in r}
    kernel = next((r for r in results if "product_tflops" in r), {})
    tested = next((r for r in results if "passed" in r), {})
    peak = peak or kernel.get("product_tflops")
    lines = []
    for r in (r for r in results if r["part"] == "machine"):
        lines.append(
            ", ".join(f"{k} {v}" if k != "name" else v for k, v in r.items() if k != "part")
        )
    if tested:
        failed = ", ".join(tested["failed"]) or "none"
        midway = "" if tested["all"] else " (stopped midway)"
        lines += ["", f"tests/test_gpu.py: {tested['passed']} passed{midway}; failed: {failed}"]
    if kernel:
        lines += ["", "| kernel | |", "|---|---|"]
        lines.append(f"| products in bf16 | {kernel['product_tflops']} TFLOP/s |")
        lines.append(f"| NF4 decoded | {kernel['decode_gb_s']} GB/s |")
        lines.append(f"| a copy | {kernel['copy_gb_s']} GB/s |")
        for name, r in kernel.items():
            if name.startswith("attention"):
                text = f"{r['ms']} ms (by definition {r['definition_ms']}), error {r['error']}"
                lines.append(f"| {name} | {text} |")
    lines += ["", "| | tokens/s | utilization | peak | first step | TRL | its peak | speed |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for (part, shape, base, method), r in found.items():
        if part != "ours":
            continue
        other = found.get(("theirs", shape, base, method), {"error": ""})
        cells = [
            f"{shape.upper()} {base.replace('lora', 'LoRA').replace('q', 'Q')} {method.upper()}"
        ]
        cells += speed_cells(r, peak)
        if "error" in other:
            cells += [other["error"], "", ""]
        else:
            ckpt = ", checkpointed" * other["checkpointing"]
            cells += [f"{other['tokens_per_second']:,.0f}{ckpt}", f"{other['peak_gib']} GiB"]
            ratio = r.get("tokens_per_second", 0) / other["tokens_per_second"]
            cells += [f"{ratio:.2f}x" if "error" not in r else ""]
        lines.append("| " + " | ".join(cells) + " |")
    if rows := [r for r in results if r["part"] == "rows"]:
        title = f"{rows[0]['shape'].upper()} QLoRA SFT, checkpointed, in rows of"
        lines += ["", f"| {title} | tokens/s | utilization | peak |"]
        lines += ["|---|---|---|---|"]
        for r in rows:
            lines.append("| " + " | ".join([f"{r['rows']:,}", *speed_cells(r, peak)[:3]]) + " |")
    return "\n".join(lines)


def speed_cells(r: dict, peak: float | None) -> list[str]:
    if "error" in r:
        return [r["error"], "", "", ""]
    share = f"{r['tflops'] / peak:.0%}" if peak else ""
    memory = f"{r['peak_gib']} GiB" + ", checkpointed" * r["checkpointing"]
    return [f"{r['tokens_per_second']:,.0f}", share, memory, f"{r['first_step_s']} s"]


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = ["tests", "kernels", "ours", "theirs", "rows"]
    parser.add_argument("--quick", action="store_true", help="what matters most, in 6 minutes")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--shapes", nargs="+", choices=["1b", "8b"], default=["8b", "1b"])
    parser.add_argument("--bases", nargs="+", choices=["qlora", "lora"], default=["qlora", "lora"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["dpo", "sft", "kto"])
    parser.add_argument("--minutes", type=float, help="end by then; none: 6 if --quick, else 20")
    parser.add_argument("--peak_tflops", type=float, help="none: what the product measures")
    parser.add_argument("--out", help="a file to append the lines of JSON to")
    parser.add_argument("--tiny", action="store_true", help="try it all, with tiny models")
    parser.add_argument("--here", action="store_true", help="in this process, without deadlines")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="none: CUDA where it is")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    if args.case:
        print("\n" + json.dumps(measure(Case(**json.loads(args.case)))))
        return []
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cpu" and not args.tiny:
        parser.error("no GPU is here; --tiny tries everything on the CPU")
    found = quick(args) if args.quick else thorough(args)
    cases = [
        case
        for case in found
        if case.part in args.parts
        and (case.part != "theirs" or all(map(find_spec, PEERS[case.base])))
    ]
    minutes = args.minutes or (6 if args.quick else 20)
    results = []
    with open(args.out or os.devnull, "a", encoding="utf-8") as file:
        for result in chain([machine(args.device)], in_turn(cases, minutes, args.here)):
            results.append(result)
            line = json.dumps(result)
            print(line, flush=True)
            print(line, file=file, flush=True)
    print(table(results, args.peak_tflops))
    return results


if __name__ == "__main__":
    main()
