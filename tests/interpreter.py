"""A GPU's kernels without a GPU: inductor writes them, triton's interpreter runs them on a CPU.

inductor can write triton for CPU tensors too, and but for a few choices, which are undone here, it
is the code that it writes for an H100. With TRITON_INTERPRET=1 in the environment before triton is
imported (conftest.py sets it) numpy executes that code, program by program. So the numbers of every
kernel are tested, and not what a compiler and a chip make of them: fused multiply-add, TF32,
shared memory, registers, races, cuBLAS, and our own branches for CUDA are out of sight.

All that is patched is private, of torch 2.13 and triton 3.7. With others the tests are skipped.
"""

import importlib.util
import inspect
import os
from contextlib import contextmanager
from importlib.metadata import version
from shutil import which
from types import SimpleNamespace

import pytest
import torch


def missing() -> str:
    """Why it can't be done here, if so."""
    if not importlib.util.find_spec("triton"):
        return "no triton"
    if not os.environ.get("TRITON_INTERPRET"):
        return "a GPU is here"
    versions = torch.__version__, version("triton")
    if not (versions[0].startswith("2.13.") and versions[1].startswith("3.7.")):
        return "torch 2.13 and triton 3.7 are what is patched, here are {} and {}".format(*versions)
    return "" if which("g++") else "no g++, which inductor's launchers want"


@contextmanager
def as_on_a_gpu():
    """In here what torch.compile makes of CPU tensors is a GPU's kernels, interpreted."""
    import torch._inductor.config as inductor
    from torch._inductor.utils import fresh_cache

    how = dict(cpu_backend="triton", compile_threads=1)  # in this process, where the patches are
    with pytest.MonkeyPatch.context() as patch, inductor.patch(how), fresh_cache():
        torch.compiler.reset()
        mend_the_interpreter(patch)
        restore = hasten_the_interpreter(patch)
        write_for_a_gpu(patch)
        write_flex_attention_for_a_gpu(patch)
        take_our_own_ways_for_a_gpu(patch)
        try:
            yield
        finally:
            restore()
            torch.compiler.reset()


def mend_the_interpreter(patch) -> None:
    """Of numbers in bfloat16 triton's interpreter knows only the bits, and of libdevice's functions
    nothing. triton 3.9 is no better: that bfloat16 is not supported was upstream's answer
    (triton-lang/triton#11585), and libdevice was offered but not taken (#10366)."""
    import numpy as np
    import triton.language as tl
    from torch._inductor.runtime.triton_helpers import libdevice
    from triton.runtime import interpreter

    Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

    def in_bfloat16(x):
        return x.dtype.scalar == tl.bfloat16

    def widened(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32) if in_bfloat16(x) else x.data

    def cast(self, x, to, *rounding):
        """The interpreter's own cuts bits off where a GPU rounds to the nearest."""
        to = to.scalar
        if x.dtype.scalar == to:
            return Handle(x.data, to)
        if to != tl.bfloat16:
            return Handle(widened(x).astype(interpreter._get_np_dtype(to)), to)
        bits = np.ascontiguousarray(x.data, np.float32).view(np.uint32)
        rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
        return Handle(np.where(np.isnan(x.data), 0x7FC0, rounded).astype(np.uint16), to)

    def dot(self, a, b, c, *how):
        """The interpreter's own multiplies the bits of bfloat16, and sums float16 in float16."""
        a, b = (widened(x).astype(c.data.dtype) for x in (a, b))
        return Handle(np.matmul(a, b) + c.data, c.dtype.scalar)

    binary = Builder.binary_op

    def binary_op(self, a, b, op):
        assert not in_bfloat16(a) and not in_bfloat16(b), f"{op} of bits"
        return binary(self, a, b, op)

    def of_libdevice(function):
        def call(x, _semantic=None):
            numbers = function(x.handle.data).astype(x.handle.data.dtype)
            return tl.tensor(Handle(numbers, x.dtype.scalar), x.type)

        return call

    for name in ("cast_impl", "create_fp_to_fp"):
        patch.setattr(Builder, name, cast)
    patch.setattr(Builder, "create_dot", dot)
    patch.setattr(Builder, "binary_op", binary_op)
    for name in ("exp", "exp2", "log", "log2", "sqrt", "tanh", "cos", "sin"):
        patch.setattr(libdevice, name, of_libdevice(getattr(np, name)))
    patch.setattr(libdevice, "rsqrt", of_libdevice(lambda x: 1 / np.sqrt(x)))


def hasten_the_interpreter(patch):
    """The same numbers in a tenth of the time. -> what to call at the end."""
    import numpy as np
    import triton.language as tl
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.runtime import interpreter

    # inductor's own maximum would be called for two numbers at a time
    reduce = interpreter.ReduceOps.apply_impl

    def reduced(self, x):
        largest = self.combine_fn is triton_helpers.maximum
        return self.min_max(x[0], np.max) if largest else reduce(self, x)

    patch.setattr(interpreter.ReduceOps, "apply_impl", reduced)

    # a program takes as long for 64 rows as for one
    init = CachingAutotuner.__init__

    def wide(self, *args, **how):
        init(self, *args, **how)
        for config in self.configs:
            if "XBLOCK" in config.kwargs:
                config.kwargs["XBLOCK"] = max(64, config.kwargs["XBLOCK"])

    patch.setattr(CachingAutotuner, "__init__", wide)

    # triton.language is patched once, and not at each call of each function
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=list))
    return scope.restore


def write_for_a_gpu(patch) -> None:
    """inductor writes triton, of an H100's kind, and not C++ with a few words of triton's."""
    import torch._inductor.ir as ir
    from torch._inductor.scheduler import BaseSchedulerNode
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    card = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    patch.setattr(driver, "_active", card)
    patch.setattr(ir, "is_cpu", lambda x: False)
    patch.setattr(BaseSchedulerNode, "is_cpu", lambda self: False)
    patch.setattr(BaseSchedulerNode, "is_gpu", lambda self: True)


def write_flex_attention_for_a_gpu(patch) -> None:
    """Its templates are chosen by device, a CPU's is another kernel and has no backward."""
    import torch._inductor.kernel.flex.flex_attention as lowering
    import torch.nn.attention.flex_attention as torch_flex
    from torch._inductor.choices import InductorChoices
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

    lower = inspect.unwrap(lowering.flex_attention)  # torch holds this very function
    constants = lower.__code__.co_consts
    assert "cpu" in constants  # else it would be a CPU's kernel that is tested
    constants = tuple("none" if c == "cpu" else c for c in constants)
    patch.setattr(lower, "__code__", lower.__code__.replace(co_consts=constants))
    patch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    apply, on_a_gpu = torch_flex._apply_kernel_options, {"OUTPUT_LOGSUMEXP": True}
    patch.setattr(torch_flex, "_apply_kernel_options", lambda *a, **k: apply(*a, **k) | on_a_gpu)
    block_sizes = CUDAConfigHeuristic()
    patch.setattr(InductorChoices, "get_config_heuristics", lambda *how: block_sizes)
    patch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))


def take_our_own_ways_for_a_gpu(patch) -> None:
    from nanoalign.fast import flex, head, nf4

    patch.setattr(flex, "has_flex", lambda device, head=16: head >= flex.LEAST_HEAD)
    patch.setattr(head, "way_for", lambda *sizes: head.one_kernel())
    patch.setattr(nf4, "way_for", lambda *sizes: nf4.fused_decode())
    for made_once in (flex.compiled_flex, head.one_kernel, nf4.fused_decode):
        made_once.cache_clear()
    # in fp32 torch's own blocks of backward are so small that there are a thousand programs
    options = flex.kernel_options
    larger = {f"bwd_BLOCK_{name}": 64 for name in ("M1", "N1", "M2", "N2")}

    def with_larger_blocks(query, *card):
        return options(query, *card) | (larger if query.dtype == torch.float32 else {})

    patch.setattr(flex, "kernel_options", with_larger_blocks)
    flex.compiler_settings()
