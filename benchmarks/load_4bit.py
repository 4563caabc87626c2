"""Peak memory of opening a model in 4 bits, for a checkpoint of a billion random weights.

    python benchmarks/load_4bit.py
    python benchmarks/load_4bit.py --layers 32 --hidden 4096 --use_bnb_nested_quant

The bf16 weights are written shard by shard into a temporary directory, and a new process opens them
in 4 bits. Its peak resident memory, minus that of the imports, should be the 4-bit model and a few
of its largest tensors, and not the bf16 model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from compare import peak_memory
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from nanoalign.formats.weights import load_lm, skeleton
from nanoalign.model import probe

MB = 2**20


def peak() -> float:
    """In MB."""
    return peak_memory("cpu") / MB


def write(directory: Path, layers: int, hidden: int, shard_mb: int) -> None:
    """A Llama with random weights as a sharded checkpoint."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    shapes = {n: p.shape for n, p in skeleton(config, torch.bfloat16).named_parameters()}
    shard, index = {}, {}

    def flush():
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        if sum(t.nbytes for t in shard.values()) > shard_mb * MB:
            flush()
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    count = sum(shape.numel() for shape in shapes.values())
    print(f"{count / 1e9:.2f} B weights, {2 * count / MB:.0f} MB in bf16", end=", ")
    print(f"in {len(set(index.values()))} shards of about {shard_mb} MB", flush=True)


def measure(directory: str, double_quant: bool) -> None:
    """Run in a fresh process: open the model, and say what it took."""
    probe(LlamaForCausalLM, LlamaConfig.from_pretrained(directory), directory)  # to warm up
    before, started = peak(), time.monotonic()
    lm = load_lm(directory, device="cpu", load_in_4bit=True, double_quant=double_quant)
    after, seconds = peak(), time.monotonic() - started
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    size = sum(t.nbytes for t in tensors) / MB
    largest = max(t.nbytes for t in lm.model.parameters()) / MB
    print(f"4-bit model (with its dense embedding and head)  {size:8.0f} MB")
    print(f"its largest tensor                               {largest:8.0f} MB")
    print(f"process before loading                           {before:8.0f} MB")
    print(f"peak while loading                               {after:8.0f} MB")
    extra = after - before - size
    print(f"peak - before - model = {extra:.0f} MB = {extra / largest:.1f} largest tensors")
    print(f"loaded in {seconds:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--shard_mb", type=int, default=500)
    parser.add_argument("--use_bnb_nested_quant", action="store_true")
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=["write", "measure"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage == "write":
        write(Path(args.directory), args.layers, args.hidden, args.shard_mb)
    elif args.stage == "measure":
        measure(args.directory, args.use_bnb_nested_quant)
    else:  # two processes: Linux hands the peak of a process on to those that it starts
        with tempfile.TemporaryDirectory() as directory:
            for stage in ("write", "measure"):
                command = [sys.executable, *sys.argv, "--stage", stage, "--directory", directory]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
