"""What a second process is worth, and what sending gradients between the two costs.

    python benchmarks/ranks.py --model MODEL --data CONVERSATIONS.json

SFT of MODEL with LoRA and with full fine-tuning: one process with two threads is compared with two
processes with one thread each (torchrun, gloo), on the same steps of four examples. It prints
tokens per second without the first step. Of the two processes it also prints the shares of a middle
step in which they wait for each other after their examples, and in which they add up sums and
gradients.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from nanoalign.run import ranks

ROOT = Path(__file__).resolve().parent.parent
CASES = {"LoRA": [], "full fine-tuning": ["--use_peft", "false", "--learning_rate", "1e-5"]}


def worker(flags: list[str], out: str) -> None:
    """train_sft.py as one of the ranks; rank 0 writes where the time went, a line a step."""
    real, lines = ranks.total, []

    def timed(sums, parameters=()):
        start = time.monotonic()
        ranks.wait()
        met = time.monotonic()
        whole = real(sums, parameters)
        lines.append((met - start, time.monotonic() - met, start))
        return whole

    ranks.total = timed
    sys.argv = [str(ROOT / "train_sft.py"), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if ranks.RANK == 0:
        Path(out, "wire.json").write_text(json.dumps(lines))


def run(flags: list[str], processes: int, out: str) -> tuple[float, float, float]:
    """-> tokens per second; and of the seconds, the shares of waiting and of the wire."""
    flags = [*flags, "--output_dir", out]
    flags += ["--per_device_train_batch_size", str(4 // processes)]
    env = {**os.environ, "OMP_NUM_THREADS": str(2 // processes), "PYTHONPATH": str(ROOT)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launch, __file__, "--worker", out, *flags]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    text = Path(out, "metrics.jsonl").read_text(encoding="utf-8")
    first, *_, last = [json.loads(line) for line in text.splitlines()]
    steps = json.loads(Path(out, "wire.json").read_text())
    seconds = median(b[2] - a[2] for a, b in zip(steps, steps[1:]))
    waiting, wire = (median(step[i] for step in steps[1:]) / seconds for i in (0, 1))
    rate = (last["num_tokens"] - first["num_tokens"]) / (last["time"] - first["time"])
    return rate, waiting, wire


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="its conversations")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)
    common = ["--model_name_or_path", args.model, "--dataset_name", args.data, "--device", "cpu"]
    common += ["--chat_template", "chatml", "--max_length", "512"]
    common += ["--max_steps", str(args.steps), "--logging_steps", "1"]
    print("| | one process, 2 threads | two processes, 1 thread each | waiting | wire |")
    print("|---|---|---|---|---|")
    for name, flags in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            alone, *_ = run([*common, *flags], 1, f"{work}/one")
            two, waiting, wire = run([*common, *flags], 2, f"{work}/two")
        shown = f"{alone:.0f} tok/s | {two:.0f} tok/s | {waiting:.1%} | {wire:.1%}"
        print(f"| {name} | {shown} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[3:], sys.argv[2])
    else:
        main()
