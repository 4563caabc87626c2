"""What each idea is worth: DPO steps as they are, and with one idea removed.

    python benchmarks/ideas.py --model MODEL --data PAIRS.jsonl

Each line is a process that trains the same pairs. It prints the seconds of the timed steps (the
first one is left out), peak resident memory, and both relative to the design as it is. Each round
goes through all lines, and the median of the rounds is taken for each line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compare import clocked_steps, peak_memory  # noqa: E402

# each takes an idea away: examples -> examples that cost what it saves


def unshared(examples):
    """The prompt once for each completion."""
    return [replace(e, texts=[c]) for e in examples for c in e.texts]


def padded(examples):
    """All as long as the longest, as a rectangular batch has it. What is filled in is no target."""
    out, longest = [], max(map(len, unshared(examples)))
    for example in unshared(examples):
        [(ids, mask)], missing = example.texts, longest - len(example)
        filled = [*ids, *[0] * missing], [*mask, *[False] * missing]
        out.append(replace(example, prompt=[*example.prompt], texts=[filled]))
    return out


def everywhere(examples):
    """Log-probs of the prompt's tokens too, as of any text."""
    out = []
    for example in unshared(examples):
        [(ids, _)], (first, *rest) = example.texts, example.prompt
        whole = [*rest, *ids]
        out.append(replace(example, prompt=[first], texts=[(whole, [True] * len(whole))]))
    return out


def variants() -> dict:
    """Name -> what to change: flags of the run, or (module, attribute, replacement) to patch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from nanoalign import logps
    from nanoalign.fast import attention, dropout, nf4
    from nanoalign.fast import head as head_twin

    pack, token_logps = logps.pack, head_twin.token_logps
    fused = torch.compile(nf4.decode, dynamic=True)

    def costly(change):
        return logps, "pack", lambda batch, *how: pack(change(batch), *how)

    def chunks_of(rows):
        return head_twin, "token_logps", partial(token_logps, chunk=rows)

    def torchs_head(h, head, targets):
        """Of torch 2.13, in chunks as large as ours."""
        rows = head_twin.chunk_rows(len(head.weight), h.device)
        chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        how = dict(reduction="none", linear_bias=head.bias, options=chunks)
        return -F.linear_cross_entropy(h, head.weight, targets, **how).float()

    def decoded_by(decode):
        return nf4, "way_for", lambda *sizes: decode

    def plain_dropout(self, x):
        return F.dropout(x, self.p, self.training)

    torchs = dropout.Dropout, "forward", plain_dropout

    newer = {"torch's head": [(head_twin, "token_logps", torchs_head)]}
    return {
        "as it is": [],
        "padding": [costly(padded)],
        "a prompt for each reply": [costly(unshared)],
        "logps of prompts too": [costly(everywhere)],
        "all logits at once": [(head_twin, "token_logps", logps.token_logps)],
        "chunks of 32 rows": [chunks_of(32)],
        "chunks of 1024 rows": [chunks_of(1024)],
        "rows of 1024 tokens": [{"max_row_tokens": 1024}],
        "torch's attention kernel": [(attention, "SHORT", 0)],
        "reference before step 1": [{"precompute_ref_log_probs": True}],
        "compiled layers": [{"torch_compile": True}],
        "dropout, ours": [{"disable_dropout": False}],
        "dropout, torch's": [{"disable_dropout": False}, torchs],
        "4 bits": [{"load_in_4bit": True}],
        "4 bits, rows of 1024 tokens": [{"load_in_4bit": True, "max_row_tokens": 1024}],
        "4 bits, decoded plainly": [{"load_in_4bit": True}, decoded_by(nf4.decode)],
        "4 bits, decoded compiled": [{"load_in_4bit": True}, decoded_by(fused)],
    } | (newer if hasattr(nn, "LinearCrossEntropyOptions") else {})


def worker(args) -> None:
    import nanoalign.run.session
    from nanoalign.run.command import quiet
    from nanoalign.run.flags import DPOConfig
    from train_dpo import run_dpo

    flags: dict = {}
    patches = []
    for change in variants()[args.idea]:
        flags.update(change) if isinstance(change, dict) else patches.append(change)
    load = nanoalign.run.session.load_policy

    def load_and_patch(*given):
        policy = load(*given)  # with the probe, which would notice
        for patch in patches:
            setattr(*patch)
        return policy

    nanoalign.run.session.load_policy = load_and_patch
    clock = clocked_steps("cpu")
    quiet()
    with tempfile.TemporaryDirectory() as directory:
        run_dpo(DPOConfig(
            model_name_or_path=args.model, dataset_name=[args.data], output_dir=directory,
            overwrite_output_dir=True, device="cpu", dtype="bfloat16", max_length=512,
            per_device_train_batch_size=args.batch, max_steps=args.steps + 1, save_steps=0,
            shuffle_dataset=False, chat_template="chatml", **flags,
        ))  # fmt: skip
    print("\n" + json.dumps({"seconds": clock.seconds(), "peak": peak_memory("cpu")}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a model directory")
    parser.add_argument("--data", required=True, help="a file of preference pairs")
    parser.add_argument("--ideas", nargs="+", metavar="IDEA", help="some of the lines only")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--idea", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.idea:
        return worker(args)
    results: dict[str, list[dict]] = {idea: [] for idea in args.ideas or variants()}
    for _ in range(args.rounds):
        for idea in results:
            command = [sys.executable, __file__, "--model", args.model, "--data", args.data]
            command += ["--steps", str(args.steps), "--batch", str(args.batch), "--idea", idea]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{idea}: failed:\n{done.stderr[-2000:]}")
            results[idea].append(json.loads(done.stdout.splitlines()[-1]))
    base = next(iter(results.values()))
    print(f"{'':<32}{'seconds':>9}{'against':>9}{'peak GiB':>10}{'against':>9}")
    for idea, runs in results.items():
        seconds, peak = (statistics.median(r[k] for r in runs) for k in ("seconds", "peak"))
        slower = statistics.median(r["seconds"] / b["seconds"] for r, b in zip(runs, base))
        larger = statistics.median(r["peak"] / b["peak"] for r, b in zip(runs, base))
        print(f"{idea:<32}{seconds:>9.1f}{slower:>8.2f}x{peak / 2**30:>10.2f}{larger:>8.2f}x")


if __name__ == "__main__":
    main()
