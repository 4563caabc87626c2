"""8. KTO's reference point and its loss (losses.py; arXiv 2402.01306, eq. 8)

KTO judges a single reply, thumbs up or down, against how far the policy has moved on average:

    z0   = max(0, mean of log pi(y' | x) - log pi_ref(y' | x)), y' the replies to other prompts
    up   : loss = desirable_weight * (1 - sigmoid(beta * (log pi - log pi_ref - z0)))
    down : loss = undesirable_weight * (1 - sigmoid(beta * (z0 - (log pi - log pi_ref))))

By hand: log-ratios of y' 3 and -1 have the mean 1, so z0 = 1. A thumbs-up reply with
log pi - log pi_ref = 3 and beta = 0.5 costs 1 - sigmoid(0.5 * (3 - 1)) = 1 - 0.7311 = 0.2689;
with thumbs down it costs 1 - sigmoid(0.5 * (1 - 3)) = 0.7311. Its reward is 0.5 * 3 = 1.5.
"""


def kl_baseline(logps, ref_logps):
    """z0: (B,), (B,) -> (), without gradient.

    >>> import torch
    >>> kl_baseline(torch.tensor([-2.0, -6.0]), torch.tensor([-5.0, -5.0])).item()
    1.0
    """
    raise NotImplementedError


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
    """-> losses and rewards, each (B,). desirable (B,) bool; a reward is beta times the log-ratio,
    for both labels, and carries no gradient. loss_type and `others` belong to other losses.

    >>> import torch
    >>> logps, ref = torch.tensor([-2.0, -2.0]), torch.tensor([-5.0, -5.0])
    >>> losses, rewards = kto_loss(logps, ref, torch.tensor([True, False]), torch.tensor(1.0), 0.5)
    >>> [round(x, 4) for x in losses.tolist()], rewards.tolist()
    ([0.2689, 0.7311], [1.5, 1.5])
    """
    raise NotImplementedError
