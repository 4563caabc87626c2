import torch

from nanoalign.lora import LoRALinear


@torch.no_grad()
def reference_logps(lm, examples):
    layers = [module for module in lm.modules() if isinstance(module, LoRALinear)]
    training = lm.training
    lm.eval()
    for layer in layers:
        layer.enabled = False
    try:
        return lm(examples).logps
    finally:
        for layer in layers:
            layer.enabled = True
        lm.train(training)
