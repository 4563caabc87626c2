"""What threads are worth on a CPU, on an idle machine and beside a busy program.

    python benchmarks/threads.py --model MODEL --data CONVERSATIONS.json

Tokens per second, without the first step, of SFT of the built-in model and of MODEL with 1, 2, 4
... threads, up to the number of cores. Also with threads that sleep while they wait for each other
(OMP_WAIT_POLICY=PASSIVE), or sleep sooner (GOMP_SPINCOUNT; GNU's OpenMP waits 300,000 turns of a
loop, some milliseconds). The busy program is a process that only loops. A case that takes more than
a minute is stopped, and its steps so far are counted.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


WAITS = {  # how threads wait for each other: what the environment says of it
    "": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "10,000 turns": {"GOMP_SPINCOUNT": "10000"},
    "1,000 turns": {"GOMP_SPINCOUNT": "1000"},
}


def speed(flags: list[str], threads: int, wait: str, out: str, limit: float) -> float:
    """Tokens per second of a run, from its second line of metrics on."""
    command = [sys.executable, ROOT / "train_sft.py", *flags, "--output_dir", out]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), **WAITS[wait]}
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=env, timeout=limit, check=True, stdout=subprocess.DEVNULL)
    metrics = Path(out, "metrics.jsonl")
    text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    if len(lines) < 2:
        return float("nan")
    first, last = lines[0], lines[-1]
    return (last["num_tokens"] - first["num_tokens"]) / (last["time"] - first["time"])


@contextlib.contextmanager
def neighbour(busy: bool):
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a real model; none: only the built-in one")
    parser.add_argument("--data", help="its conversations")
    parser.add_argument("--steps", type=int, default=40, help="of the built-in model")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a run")
    args = parser.parse_args(argv)
    kinds = {"built-in": ["--max_steps", str(args.steps), "--logging_steps", "2"]}
    if args.model:
        kinds[Path(args.model).name] = ["--model_name_or_path", args.model, "--dataset_name",
            args.data, "--chat_template", "chatml", "--max_length", "512", "--max_steps", "6",
            "--per_device_train_batch_size", "4", "--logging_steps", "1"]  # fmt: skip
    threads = [1]
    while threads[-1] < (os.cpu_count() or 1):
        threads.append(min(2 * threads[-1], os.cpu_count()))
    cases = [(n, "") for n in threads] + [(threads[-1], wait) for wait in WAITS if wait]
    heads = [", ".join([f"{n} thread{'s' * (n > 1)}", wait]).rstrip(", ") for n, wait in cases]
    print("| model | machine | " + " | ".join(heads) + " |")
    print("|---|---|" + "---|" * len(cases))
    for name, flags in kinds.items():
        for busy in (False, True):
            with neighbour(busy), tempfile.TemporaryDirectory() as work:
                rates = [speed(flags, *case, f"{work}/{case}", args.limit) for case in cases]
            shown = " | ".join(f"{rate:.0f} tok/s" for rate in rates)
            print(f"| {name} | {'beside a neighbour' if busy else 'idle'} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
