"""The twin of nf4.rebuild and, in compiled layers, of nf4.FrozenProduct. It takes less time and
memory, and all bits are the same.

The definitions make fp32 tensors that are larger than the weight, and each of them is written to
memory and read again. On a CPU the twin works in chunks of 2**18 weights, which stay in a core's
second-level cache. On a GPU torch.compile makes one kernel of `decode`. In a compiled layer the
product with a frozen weight is one operator of torch, which the compiler does not look into.

`in_chunks` is a helper. It calls nf4.quantize for a chunk at a time: on a CPU a 4096 x 4096 weight
is quantized three times as fast. `decoded` keeps a weight for the next pass while memory has room.
"""

import functools
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from nanoalign.fast.flex import has_triton

CHUNK = 2**18  # weights at a time
GPU_CHUNK = 2**22  # 16 MB of fp32: on a GPU few large calls are faster


def in_chunks(quantize, weight, blocksize):
    """quantize(weight, blocksize) chunk by chunk: a few MB are enough (on a GPU about 60)."""
    n, device = weight.numel(), weight.device
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(math.ceil(n / blocksize), device=device)
    blocks = (CHUNK if weight.is_cpu else GPU_CHUNK) // blocksize  # in a chunk
    weights = weight.flatten().split(blocks * blocksize)
    results = packed.split(blocks * blocksize // 2), absmax.split(blocks)
    for chunk, its_packed, its_absmax in zip(weights, *results):
        its_packed[:], its_absmax[:] = quantize(chunk, blocksize)
    return packed, absmax


def rebuild(packed, scales, shape, dtype, blocksize, levels, scale_levels):
    """nf4.rebuild in the fastest way that the device has.

    `scales` is the argument of absmax_of; the two tables are nf4.LEVELS and nf4.DYNAMIC_MAP.
    """
    n, packed = math.prod(shape), packed.flatten()
    if n % blocksize:  # fill up the last block
        packed = F.pad(packed, (0, len(scales[0]) * blocksize // 2 - len(packed)))
    decoded_by = way_for(n, packed.device)
    weight = decoded_by(packed.view(-1, blocksize // 2), scales, levels, scale_levels, dtype)
    return weight.flatten()[:n].view(shape)


def way_for(weights: int, device: torch.device):
    """The fastest of the three functions below for so many weights."""
    if device.type == "cpu":
        return decode_cpu
    return fused_decode() if weights >= CHUNK else decode  # small weights gain nothing by it


kept = None  # layer -> its decoded weight, inside decoding_once


@contextmanager
def decoding_once(on: bool):
    """In here the first pass without gradient decodes a weight, and the next ones use it again.

    The peak of memory must not rise. It is reached in the pass with gradient, which keeps x and y
    of each layer, in rows half as long. So a weight is kept only on a CPU, and only if it is
    smaller than these. With gradient checkpointing nothing of a layer is kept: `on` must be False.
    """
    global kept
    before = kept
    kept = {} if on and before is None else before
    try:
        yield
    finally:
        kept = before


def decoded(layer, x):
    """layer.dequantize() for a product with x, or the weight that an earlier pass has kept."""
    if kept is None or not x.is_cpu:
        return layer.dequantize()
    weight = kept[layer] if layer in kept else layer.dequantize()
    x_and_y = x.numel() // layer.in_features * (layer.in_features + layer.out_features)
    if weight.numel() < x_and_y / 2:
        kept[layer] = weight
    return weight


def absmax_of(scales, scale_levels):
    """[absmax] or the three tensors of nf4.double_quantize -> absmax in fp32."""
    if len(scales) == 1:
        return scales[0]
    codes, absmax2, offset = scales
    return scale_levels[codes.int()] * absmax2.repeat_interleave(256)[: len(codes)] + offset


def decode(packed, scales, levels, scale_levels, dtype):
    """(blocks, bytes) uint8, scales of blocks -> weights (blocks, 2 * bytes)."""
    shifts = torch.arange(4, -1, -4, dtype=torch.int32, device=packed.device)  # high nibble first
    codes = (packed.int()[..., None] >> shifts & 15).flatten(1)
    return (levels[codes] * absmax_of(scales, scale_levels)[:, None]).to(dtype)


@functools.cache
def fused_decode():
    """`decode` as one kernel, if there is triton. It reads 4 bits a weight and writes 16.

    Only the number of blocks differs between the weights of a model, so it is compiled once. The
    option is for doubled scales: a GPU would compute their product and sum in one operation, round
    once and not twice, and get other bits.
    """
    if not has_triton():
        return decode
    return torch.compile(decode, dynamic=True, options={"emulate_precision_casts": True})


def decode_cpu(packed, scales, levels, scale_levels, dtype):
    """`decode` for a CPU, faster than torch.compile. A byte has two codes, and one lookup reads
    both levels as a 64-bit word. A chunk is rounded while its fp32 products are in the cache."""
    absmax = absmax_of(scales, scale_levels)
    out = torch.empty(len(packed), 2 * packed.shape[1], dtype=dtype)
    step = CHUNK // out.shape[1]
    for chunk, its_absmax, its_out in zip(*(t.split(step) for t in (packed, absmax, out))):
        words = words_of(levels).index_select(0, chunk.flatten().int())
        its_out[:] = words.view(torch.float32).view(its_out.shape).mul_(its_absmax[:, None])
    return out


@functools.cache
def words_of(levels):
    """For each of the 256 bytes its two levels, high nibble first, as one 64-bit word."""
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], -1).view(torch.int64).flatten()


def product_with(tables):
    """nf4.FrozenProduct as one operator of torch, for compiled layers. `tables` is nf4.tables.

    If the compiler saw that forward and backward rebuild the same weight, it would rebuild it once
    and keep it in between, at 16 bits a weight. It can't look into an operator, and this one saves
    only codes and scales for backward, which are in memory anyway.
    """
    schema = (
        "(Tensor x, Tensor? bias, Tensor packed, Tensor[] scales, SymInt[] shape, "
        "ScalarType dtype, int blocksize, bool transposed) -> Tensor"
    )

    @torch.library.custom_op("nanoalign::nf4_product", mutates_args=(), schema=schema)
    def product(x, bias, packed, scales, shape, dtype, blocksize, transposed):
        stored = packed, scales, shape, dtype, blocksize
        weight = rebuild(*stored, *tables(packed.device)).to(x.dtype)  # (out, in)
        if transposed:
            return x @ weight
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @product.register_fake
    def _(x, bias, packed, scales, shape, dtype, blocksize, transposed):
        return x.new_empty(*x.shape[:-1], shape[1 if transposed else 0])

    def keep(ctx, inputs, output):
        _, bias, packed, scales, *ctx.format, _ = inputs  # shape, dtype, blocksize
        ctx.save_for_backward(packed, *scales)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx, grad):  # (..., out)
        dx = dbias = None
        packed, *scales = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            dx = product(grad, None, packed, scales, *ctx.format, True)  # (..., in)
        if ctx.needs_input_grad[1]:
            dbias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, dbias, None, [None] * len(scales), None, None, None, None

    product.register_autograd(backward, setup_context=keep)

    def of_layer(x, layer):
        doubled = [layer.absmax2, layer.offset] if layer.double_quant else []
        shape = [layer.out_features, layer.in_features]
        stored = layer.packed, [layer.absmax, *doubled], shape, layer.dtype, layer.blocksize
        return product(x, layer.bias, *stored, False)

    return of_layer
