"""5. NF4's codes and scales (nf4.py; arXiv 2305.14314)

Each run of 64 weights (the rows of a matrix one after another) is divided by its largest magnitude,
its absmax, and each weight becomes the code of the nearest one of 16 levels from -1 to 1:

    absmax_b = max |w| over block b
    code = the i with the least |LEVELS[i] - w / absmax_b|

Two codes make a byte, the first one in its upper half.

By hand, in a block of two: weights 0.5 and -2.0. absmax = 2; 0.5 / 2 = 0.25, whose nearest level is
0.2461, LEVELS[10]; -2 / 2 = -1 is LEVELS[0]. The byte is 16 * 10 + 0 = 160.
"""

from nanoalign.nf4 import LEVELS  # noqa: F401, (16,) in fp32, from -1 to 1


def quantize(weight, blocksize=64):
    """weight, of any shape -> packed uint8 [(n + 1) // 2, 1], absmax fp32 [blocks].

    n is the number of weights. The last block may be shorter. A block of zeros has the code of
    zero, 7. If n is odd, the lower half of the last byte is 7 too.

    >>> import torch
    >>> packed, absmax = quantize(torch.tensor([0.5, -2.0]), blocksize=2)
    >>> packed.tolist(), absmax.tolist()
    ([[160]], [2.0])
    """
    raise NotImplementedError
