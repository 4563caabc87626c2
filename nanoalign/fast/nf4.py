"""Weights in four bits, sooner and in little memory: the twin of nf4.rebuild and nf4.FrozenProduct.

`in_chunks` is a helper: nf4.quantize itself, a part of the weight at a time. All bits are the same.

The definitions make temporaries in fp32 that are larger than the weight itself, and each of them
travels to memory and back. On a CPU, chunks of 2**18 weights keep them in a core's second-level
cache: a 4096 x 4096 weight is quantized three times as fast. On a GPU, torch.compile fuses all of
dequantizing into one kernel. And where a whole layer is compiled, the product with a frozen weight
is one operator of torch, which the compiler takes as it is.
"""

import functools
import math

import torch
import torch.nn.functional as F

from nanoalign.fast.flex import has_triton

CHUNK = 2**18  # weights at a time
GPU_CHUNK = 2**22  # 16 MB of fp32: a GPU wants fewer and larger calls


def in_chunks(quantize, weight, blocksize):
    """quantize(weight, blocksize), chunk by chunk: in a few MB (on a GPU some 60) at any size."""
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
    """nf4.rebuild, by the quickest way there is on the device.

    `scales` are what absmax_of takes; the two tables are nf4.LEVELS and nf4.DYNAMIC_MAP.
    """
    n, packed = math.prod(shape), packed.flatten()
    if n % blocksize:  # complete the last block
        packed = F.pad(packed, (0, len(scales[0]) * blocksize // 2 - len(packed)))
    decoded_by = way_for(n, packed.device)
    weight = decoded_by(packed.view(-1, blocksize // 2), scales, levels, scale_levels, dtype)
    return weight.flatten()[:n].view(shape)


def way_for(weights: int, device: torch.device):
    """The quickest of the three below for so many weights."""
    if device.type == "cpu":
        return decode_cpu
    return fused_decode() if weights >= CHUNK else decode  # a small one has nothing to gain


def absmax_of(scales, scale_levels):
    """[absmax], or [codes, absmax2, offset] as nf4.double_quantize gives them -> absmax, fp32."""
    if len(scales) == 1:
        return scales[0]
    codes, absmax2, offset = scales
    return scale_levels[codes.int()] * absmax2.repeat_interleave(256)[: len(codes)] + offset


def decode(packed, scales, levels, scale_levels, dtype):
    """(blocks, bytes) uint8, scales of blocks -> (blocks, 2 * bytes), as one expression to fuse."""
    shifts = torch.arange(4, -1, -4, dtype=torch.int32, device=packed.device)  # high nibble first
    codes = (packed.int()[..., None] >> shifts & 15).flatten(1)
    return (levels[codes] * absmax_of(scales, scale_levels)[:, None]).to(dtype)


@functools.cache
def fused_decode():
    """decode as ONE kernel, where triton is: 4 bits are read, 16 written, nothing in between.

    Only the number of blocks varies from weight to weight, so one compilation serves all shapes of
    a model. The option keeps product and sum of a doubled scale two operations: as one, which is
    what a GPU prefers, they would be rounded once and not twice.
    """
    if not has_triton():
        return decode
    return torch.compile(decode, dynamic=True, options={"emulate_precision_casts": True})


def decode_cpu(packed, scales, levels, scale_levels, dtype):
    """decode for a CPU, faster than what inductor makes of it: a byte looks up a PAIR of levels.

    The pair is one 64-bit word, so a lookup is one load and one store; and the fp32 products of a
    chunk are rounded while they are in the cache.
    """
    absmax = absmax_of(scales, scale_levels)
    out = torch.empty(len(packed), 2 * packed.shape[1], dtype=dtype)
    step = CHUNK // out.shape[1]
    for chunk, its_absmax, its_out in zip(*(t.split(step) for t in (packed, absmax, out))):
        words = words_of(levels).index_select(0, chunk.flatten().int())
        its_out[:] = words.view(torch.float32).view(its_out.shape).mul_(its_absmax[:, None])
    return out


@functools.cache
def words_of(levels):
    """All 256 bytes as pairs of levels, high nibble first, each pair one 64-bit word."""
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], -1).view(torch.int64).flatten()


def product_with(tables):
    """nf4.FrozenProduct as ONE operator of torch, for layers that are compiled.

    A compiler that saw into it would find the same weight rebuilt in forward and in backward, do it
    once, and keep 16 bits a weight in between. It cannot see into an operator, and keeps what that
    was given: x is not needed, and the codes are in memory anyway. `tables` is nf4.tables.
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
        _, bias, packed, scales, *ctx.how, _ = inputs
        ctx.save_for_backward(packed, *scales)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx, grad):  # (..., out)
        dx = dbias = None
        packed, *scales = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            dx = product(grad, None, packed, scales, *ctx.how, True)  # (..., in)
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
