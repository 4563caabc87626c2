r"""2. Who sees whom in a packed row (packing.py)

A row is a forest: of a preference pair the prompt is a trunk, and the replies branch off it.

    index      0  1  2  3  4  5
    token      p  p  c  c  r  r        prompt, chosen, rejected
    position   0  1  2  3  2  3        counted along each text
    until      6  6  4  4  6  6        the end of the stretch that continues the token's text

A token sees itself and what precedes it in its own text. All that continues the text of a token
stands in one stretch of the row, which begins with the token and ends before until[token].
A layer with a sliding window lets a token see less: itself and the window - 1 tokens before it, as
positions count.
"""


def allowed(geometry, query, key, window):
    """May the token at index `query` see the one at `key`? A boolean tensor.

    geometry.until and geometry.position are (T,); query and key are tensors of indices that
    broadcast against each other; window is a number of tokens, or None for no window.

    By hand: rejected's first token (4) sees 0, 1 and itself, and neither 2 nor 3, since
    until[2] = 4. With a window of 2 it sees 1, which is 2 - 1 = 1 position away, and not 0.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> position = torch.tensor([0, 1, 2, 3, 2, 3])
    >>> until = torch.tensor([6, 6, 4, 4, 6, 6])
    >>> row = SimpleNamespace(position=position, until=until)
    >>> allowed(row, torch.tensor(4), torch.arange(6), None).int().tolist()
    [1, 1, 0, 0, 1, 0]
    >>> allowed(row, torch.tensor(4), torch.arange(6), 2).int().tolist()
    [0, 1, 0, 0, 1, 0]
    """
    raise NotImplementedError
