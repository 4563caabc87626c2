"""A helper of model.py: it switches compiled layers off during generation.

Layers are compiled for packed rows, which have a geometry and no KV cache. Generation would compile
them again for prompts and for single tokens, and that takes longer than most generations.
"""

from contextlib import contextmanager


@contextmanager
def uncompiled(model):
    """In `with uncompiled(model): ...` the layers run without the compiler."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None  # nn.Module.compile sets it, and has no way to undo it
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
