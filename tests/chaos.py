"""ckpt-chaos on the scripts: runs are killed at the file events of their saves, and go on.

    python tests/chaos.py [--points 40] [--methods sft dpo kto] [--ranks 1 2] [--modes before,term]

For each method, with LoRA and without, and each number of processes: a run of three steps that
saves each of them is killed at so many of its file events (the first process is, which is the one
that writes), resumed, and compared with the run that nothing ended.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from conftest import make_tokenizer, tiny
from scripts import ROOT, argv, write_data
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--points", default="40", help="of a kind of run; all there are: 9999")
parser.add_argument("--methods", nargs="+", default=["sft", "dpo", "kto"])
parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
parser.add_argument("--modes", default="before,torn,term,unsynced")
args = parser.parse_args()

home = Path(tempfile.mkdtemp(prefix="chaos-"))
torch.manual_seed(0)
LlamaForCausalLM(tiny(LlamaConfig)).save_pretrained(home / "model")
make_tokenizer().save_pretrained(home / "model")
write_data(home)
(home / "none").mkdir()
(home / "none" / "matplotlib.py").write_text("raise ImportError")  # curves take longer than a run
paths = f"{ROOT}:{home / 'none'}"
env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
verdicts, bad = "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL", []
kinds = product(args.methods, [{"lora_r": 4}, {"use_peft": "false"}], args.ranks)
for method, kind, ranks in kinds:
    data = home / f"{method}.jsonl"
    given = dict(
        model_name_or_path=home / "model", dataset_name=data, eval_dataset=data, device="cpu",
        max_steps=3, save_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        output_dir="{out}", resume_from_checkpoint="last", **kind,
    )  # fmt: skip
    weights = "adapter_model" if "lora_r" in kind else "model"
    name = f"{method}-{weights}-{ranks}"
    chaos = dict(
        work=home / name, max_points=args.points, modes=args.modes, grace=60, timeout=1800,
        ranks=ranks, fail_on=verdicts,
        checkpoint_glob="{out}/checkpoint-*", result_file=f"{{out}}/{weights}.safetensors",
        step_regex=r"(?:going on from .*checkpoint-|, step )(\d+)",
    )  # fmt: skip
    names = {name.replace("_", "-"): value for name, value in chaos.items()}
    script = [sys.executable, str(ROOT / f"train_{method}.py"), *argv(given)]
    print(f"\n=== {name}", flush=True)
    command = ["ckpt-chaos", "run", *argv(names), "--ckpt-ignore-size", "--", *script]
    if subprocess.run(command, env=env).returncode:
        bad.append(name)
sys.exit(f"not clean: {', '.join(bad)}; see {home}" if bad else None)
