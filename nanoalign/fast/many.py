"""A million examples in little memory: the twin of a list of them.

A Python list of ids takes 8 bytes an entry, and the number that it points to 32 more, so a million
examples of 400 tokens would be 16 GB. Here an example is kept as `marshal` writes it, in 5 bytes an
id and 1 a mask, and becomes an Example again whenever it is asked for, in some microseconds. An
order of examples is a list of their places, and an example beside another's completion is made of
the two when its turn comes.
"""

import marshal
from collections.abc import Callable, Sequence


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
    """Tuples of plain Python values, as bytes; an item is kind(*values)."""

    def __init__(self, kind: type):
        super().__init__(self.unpacked, [])
        self.kind = kind

    def unpacked(self, row: bytes):
        return self.kind(*marshal.loads(row))

    def append(self, *values) -> None:
        self.keys.append(marshal.dumps(values, 2))  # from version 3 on it writes references, too
