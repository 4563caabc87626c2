"""What one of torchrun's processes does in test_ranks.py: one run after another.

    python -m torch.distributed.run --nproc_per_node 2 tests/ranks_worker.py RUNS.json

RUNS.json lists [method, flags]. The method "parts" is not run: rank 0 says which share of the
model's bytes it has.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
sys.modules["matplotlib"] = None  # no curves: they take longer than the tiny runs

import torch  # noqa: E402
import transformers  # noqa: E402
from scripts import argv, call  # noqa: E402

from nanoalign.run import ranks  # noqa: E402
from nanoalign.run.flags import SFTConfig, parse  # noqa: E402
from nanoalign.run.policy import load_policy  # noqa: E402

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with ranks.job():
        for method, given in json.loads(Path(sys.argv[1]).read_text()):
            if method == "parts":
                lm = load_policy(parse(SFTConfig, argv(given), {})).lm
                tensors = [*lm.parameters(), *lm.buffers()]
                whole = sum(t.numel() * t.element_size() for t in tensors)
                print("has", sum(getattr(t, "_local_tensor", t).nbytes for t in tensors) / whole)
            else:
                call(method, given)
            ranks.wait()
