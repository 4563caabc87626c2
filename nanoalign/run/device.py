"""What a run settles with the device that it computes on."""

import torch

from nanoalign.logps import PackedLM
from nanoalign.run.flags import Config


def computes_in(lm: PackedLM) -> torch.dtype:
    return lm.autocast or lm.model.get_input_embeddings().weight.dtype


def use_tf32(cfg: Config, lm: PackedLM) -> None:
    """On CUDA, let float32 products run on the tensor cores, unless the flag forbids it.

    They read a factor's first 10 bits and add up in float32 (TF32); all 23 bits take several times
    as long. bfloat16, in which models are trained as a rule, has 7.
    """
    if lm.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
        if cfg.tf32 and computes_in(lm) == torch.float32:
            print("float32 products keep 10 bits of a factor (TF32); --tf32 false keeps all 23")
