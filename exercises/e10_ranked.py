"""10. Ranked replies (data.py, packing.py)

Of K replies to a prompt, ranked, every two that differ in rank make a pair for DPO: with K = 3 and
no ties 3 pairs. The prompt and each reply are computed once, and the loss picks their log-probs out
of one list, which holds all completions of a batch:

    example    0        1
    completion 0  1     0  1  2
    place      0  1     2  3  4

By hand: ranks 0, 1, 1 (the last two tied) make the pairs (0, 1) and (0, 2). If example 0 has the
pair (0, 1), and example 1 the pairs (0, 1) and (0, 2), the better ones are at 0, 2, 2 and the worse
ones at 1, 3, 4.
"""


def ranked_pairs(ranks):
    """The pairs of one example, [(better, worse), ...], numbers of completions, in any order.

    ranks: one number for each completion, and less is better.

    >>> sorted(ranked_pairs([0, 1, 1]))
    [(0, 1), (0, 2)]
    """
    raise NotImplementedError


def pairs_of(batch):
    """-> (places of the better completions, places of the worse ones): two lists, one entry for
    each pair of the batch, in the order of the examples and their pairs.

    An example has `count`, the number of its completions, and `pairs`, [(better, worse), ...].

    >>> from types import SimpleNamespace as Example
    >>> pairs_of([Example(count=2, pairs=[(0, 1)]), Example(count=3, pairs=[(0, 1), (0, 2)])])
    ([0, 2, 2], [1, 3, 4])
    """
    raise NotImplementedError
