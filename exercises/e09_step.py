"""9. One optimizer step over ragged batches (train.py)

A step's examples come in batches that fit in memory, and the batches differ in size. The gradient
of a step is that of the mean over everything in it:

    gradient of (sum of all losses) / (count of all things)

By hand: losses of w x with x = 1, 2, 3 in one batch and x = 10 in another. The gradient of the mean
is (1 + 2 + 3 + 10) / 4 = 4. The mean of the batches' means would have (2 + 10) / 2 = 6.
"""


def optimizer_step(optimizer, rate, batches, max_grad_norm=0.0, *others):
    """Take one step; -> (sums, norm).

    batches is an iterator, and each batch a dict {name: (sum, count)}. batch["loss"] is the summed
    loss, a tensor with gradient, and the number of things summed. Let each go through backward as
    it comes: the next one may only fit in memory then.

    Everything is in optimizer.param_groups: each group has "params" and its "lr", which is to be
    `rate`. max_grad_norm > 0 bounds the norm of the gradient of the mean, and `norm` is what it was
    before that (torch.nn.utils.clip_grad_norm_ does both). sums: for each name its
    (sum as a float, count) over all batches. If the loss or the norm is not finite, nothing
    changes, and sums is None. No gradient is left behind. `others` do not matter on one process.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor(1.0))
    >>> batches = [{"loss": (w * sum(x), len(x))} for x in ([1, 2, 3], [10])]
    >>> optimizer_step(torch.optim.SGD([w]), 0.25, iter(batches))
    ({'loss': (16.0, 4)}, 4.0)
    >>> w.item()  # 1 - 0.25 * 4
    0.0
    """
    raise NotImplementedError
