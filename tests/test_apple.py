"""Apple's GPU, of which there is none here: by torch's own list it has every operator of a run.

Its kernels themselves can't be tested so. What is known of them to be wrong is named where it is
gone around: fast/transfer.py, attention.py and head.py.
"""

import sys
from pathlib import Path

import pytest
import torch
import torchgen
from scripts import call
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

from nanoalign.fast import nf4
from nanoalign.fast.dropout import Dropout


class Operators(TorchDispatchMode):
    """The names of all operators of torch that run, and those that meet 64-bit floats."""

    def __init__(self):
        super().__init__()
        self.names, self.doubles = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__.removesuffix(".default")
        self.names |= {name} if function.namespace == "aten" else set()
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.doubles.add(name)
        return out


def apples() -> set[str]:
    """The operators that have a kernel for Apple's GPU, by the list that torch is built from."""
    native = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(native / "native_functions.yaml"), str(native / "tags.yaml"))
    functions = {str(f.func.name): f for f in parsed.native_functions}
    kernels = parsed.backend_indices[DispatchKey.MPS]

    def there(f) -> bool:
        made_of_others = f.has_composite_kernel
        delegate = f.structured_delegate and functions[str(f.structured_delegate)]
        return made_of_others or kernels.has_kernel(f) or bool(delegate and there(delegate))

    return {name for name, f in functions.items() if there(f)}


@pytest.mark.parametrize(
    "method, more",
    [
        ("sft", dict(load_in_4bit=True, dtype="bfloat16")),
        ("dpo", dict(load_in_4bit=True, dtype="float16", gradient_checkpointing=True)),
        ("kto", dict(use_peft=False, dtype="bfloat16", generate_during_eval=True)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_it_has_all_operators(method, more, model_dir, data, tmp_path, monkeypatch):
    """Of whole runs with evaluation, generation and checkpoints, on the CPU by the ways that are
    not a CPU's own. And it has no 64-bit floats."""
    monkeypatch.setattr(nf4, "way_for", lambda *sizes: nf4.decode)
    monkeypatch.setattr(Dropout, "forward", nn.Dropout.forward)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with Operators() as run:
        call(method, dict(
            model_name_or_path=model_dir, dataset_name=data / f"{method}.jsonl",
            output_dir=tmp_path / "out", device="cpu", max_steps=2, save_steps=1, eval_steps=1,
            eval_fraction=0.2, per_device_train_batch_size=4, **more,
        ))  # fmt: skip
    own = {"_scaled_dot_product_flash_attention_for_cpu"}  # its own it has, in generation
    assert len(run.names) > 100 and not run.names - apples() - own and not run.doubles
