"""6. The log-probs of the trained tokens (logps.py)

All losses are functions of log pi(y | x): the sum over a reply's trained tokens of

    log p(token) = logits[token] - log(sum over the vocabulary of exp(logits))

where the logits are those of the position BEFORE the token: they are a guess at what comes next.

By hand: logits [0, ln 3] make the probabilities 1/4 and 3/4. Token 1 has log(3/4) = -0.2877.
"""


def token_logps(h, head, targets):
    """log p of each target: (N,) in nats, with gradient.

    h (N, d) are hidden states, head.logits(h) their logits (N, V), targets (N,) the tokens to
    predict. Each row of h is already the position before its target. A logit may be in the
    thousands.

    >>> import torch
    >>> from nanoalign.logps import Head
    >>> head = Head(weight=torch.tensor([[0.0], [1.0]]))
    >>> h = torch.tensor([[3.0]]).log()
    >>> [round(x, 4) for x in token_logps(h, head, torch.tensor([1])).tolist()]
    [-0.2877]
    """
    raise NotImplementedError


def reply_logps(logits, ids, mask):
    """log pi(y | x) of one text: a number (), from all its logits (T, V), ids (T,), mask (T,).

    The mask says which tokens train. The first token of a text is predicted by nothing, and so it
    never counts.

    >>> import torch
    >>> logits = torch.tensor([[1.0, 3.0], [2.0, 1.0], [5.0, 1.0]]).log()
    >>> ids, mask = torch.tensor([0, 1, 1]), torch.tensor([False, True, False])
    >>> round(reply_logps(logits, ids, mask).item(), 4)  # logits [0, ln 3]
    -0.2877
    """
    raise NotImplementedError
