"""A million examples in little memory: the twin of a list of them.

A Python list of ids takes 8 bytes an entry, and the number that it points to 32 more, so a million
examples of 400 tokens would be 16 GB. Here an example is kept as bytes, 4 an id, and becomes an
Example again whenever it is asked for, in some microseconds. An order of examples is a list of
their places, and an example beside another's completion is made of the two when its turn comes.
"""

from array import array
from collections.abc import Callable, Sequence
from itertools import chain, islice

LABELS = None, False, True


class Lazy(Sequence):
    """A sequence as long as `keys`, whose items are make(key), made anew each time they are asked
    for; of a slice, a list of them."""

    def __init__(self, make: Callable, keys: Sequence):
        self.make, self.keys = make, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.make(key) for key in self.keys[i]]
        return self.make(self.keys[i])


class Kept(Lazy):
    """Examples of a class, kept as what `to_bytes` makes of its first five fields."""

    def __init__(self, kind: type):
        super().__init__(self.example, [])
        self.kind = kind

    def example(self, row: bytes):
        return self.kind(*from_bytes(row))

    def append(self, *fields) -> None:
        self.keys.append(to_bytes(*fields))


def to_bytes(prompt, completions, label, where, number) -> bytes:
    """Label, number, how many parts there are, how long each is; their ids; then `where` as text.
    An id that trains is kept as its complement, which is negative, and so needs no mask."""
    parts = [prompt, *([~i if trains else i for i, trains in zip(*c)] for c in completions)]
    head = [LABELS.index(label), number, len(parts), *map(len, parts)]
    return array("i", chain(head, *parts)).tobytes() + where.encode(errors="surrogatepass")


def from_bytes(row: bytes) -> tuple:
    """What `to_bytes` was given."""
    label, number, parts = array("i", row[:12])
    lengths = array("i", row[12 : 12 + 4 * parts])
    start = 12 + 4 * parts
    end = start + 4 * sum(lengths)
    ids = iter(array("i", row[start:end]))
    prompt, *rest = ([*islice(ids, length)] for length in lengths)
    completions = [([max(i, ~i) for i in part], [i < 0 for i in part]) for part in rest]
    return prompt, completions, LABELS[label], row[end:].decode(errors="surrogatepass"), number
