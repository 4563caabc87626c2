"""A model whose layers are compiled, as it is without: a helper of model.py.

A compiled layer is for rows: it has been compiled for a row's geometry and without a KV cache. In
generation it would be compiled again, for prompts and for single tokens, which takes longer than
most generations do.
"""

from contextlib import contextmanager


@contextmanager
def uncompiled(model):
    """In here the model's layers run as they were written."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None  # where nn.Module.compile has put it; it has no undo
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
