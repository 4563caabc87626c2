"""What a run settles with its card. Cards are pretended here: what they say is what counts."""

from argparse import Namespace

import pytest
import torch

from nanoalign.formats.weights import auto_dtype
from nanoalign.run.device import use_tf32

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    "stored, capability, device, expected",
    [
        (torch.bfloat16, (7, 5), CUDA, torch.float16),
        (torch.bfloat16, (7, 5), CPU, torch.bfloat16),
        (torch.bfloat16, (8, 0), CUDA, torch.bfloat16),
        (torch.float32, (7, 5), CUDA, torch.float32),
        (None, (9, 0), CUDA, torch.float32),
    ],
)
def test_dtype_auto(stored, capability, device, expected, monkeypatch, capsys):
    """The checkpoint's, but float16 on a card that can't multiply bfloat16; and then it says so."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert auto_dtype("M", Namespace(dtype=stored), device) == expected
    assert ("float16 is used" in capsys.readouterr().out) == (expected == torch.float16)


def test_tf32(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for tf32 in (True, False):
        for device in (CUDA, CPU):
            use_tf32(Namespace(tf32=tf32), Namespace(device=device, autocast=torch.float32))
    assert asked == ["high", "highest"]
    assert "--tf32 false keeps all 23" in capsys.readouterr().out
