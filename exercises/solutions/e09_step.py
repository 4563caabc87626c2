import math

import torch


def optimizer_step(optimizer, rate, batches, max_grad_norm=0.0, *others):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sums = {}
    for batch in batches:
        batch["loss"][0].backward()
        for name, (value, count) in batch.items():
            old, number = sums.get(name, (0.0, 0))
            sums[name] = old + torch.as_tensor(value).item(), number + count
    total, count = sums["loss"]
    for p in parameters:
        if p.grad is not None:
            p.grad /= count
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
    finite = math.isfinite(norm) and math.isfinite(total)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad()
    return sums if finite else None, norm
