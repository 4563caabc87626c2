"""7. DPO's loss (losses.py; arXiv 2305.18290, eq. 7)

Of two replies the chosen one should gain on the rejected one, relative to the reference:

    margin = (log pi(chosen) - log pi_ref(chosen)) - (log pi(rejected) - log pi_ref(rejected))
    loss   = -log sigmoid(beta * margin)
    reward of a reply = beta * (log pi - log pi_ref)

By hand: log pi = -4 and -6, log pi_ref = -5 and -5, beta = 0.5. The margin is (1) - (-1) = 2,
the loss -log sigmoid(1) = log(1 + exp(-1)) = 0.3133, the rewards are 0.5 and -0.5.
"""


def dpo_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    chosen_lengths=1,
    rejected_lengths=1,
    beta=0.1,
    **others,
):
    """-> losses, chosen rewards, rejected rewards, each (B,). The rewards carry no gradient.

    All log-probs (B,) in nats. The lengths and `others` belong to other losses. A margin may be
    a thousand nats, to either side.

    >>> import torch
    >>> a, b, c = torch.tensor([-4.0]), torch.tensor([-6.0]), torch.tensor([-5.0])
    >>> [round(x.item(), 4) for x in dpo_loss(a, b, c, c, beta=0.5)]
    [0.3133, 0.5, -0.5]
    """
    raise NotImplementedError
