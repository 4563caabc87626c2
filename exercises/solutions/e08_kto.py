import torch


def kl_baseline(logps, ref_logps):
    return (logps - ref_logps).mean().clamp(min=0).detach()


def kto_loss(
    logps,
    ref_logps,
    desirable,
    z0,
    beta=0.1,
    loss_type="kto",
    desirable_weight=1.0,
    undesirable_weight=1.0,
    **others,
):
    ratio = logps - ref_logps
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(sign * beta * (ratio - z0))), beta * ratio.detach()
