"""nf4.quantize and nf4.dequantize sooner, and in little memory: the same bits.

The definitions make temporaries in fp32 that are larger than the weight itself, and each of them
travels to memory and back. On a CPU, chunks of 2**18 weights keep them in a core's second-level
cache: a 4096 x 4096 weight is quantized three times as fast. On a GPU, torch.compile fuses all of
dequantizing into one kernel.
"""

import functools
import importlib.util
import math

import torch
import torch.nn.functional as F

CHUNK = 2**18  # weights at a time
GPU_CHUNK = 2**22  # 16 MB of fp32: a GPU wants fewer and larger calls


def quantize(weight, blocksize, definition):
    """definition(weight, blocksize), chunk by chunk: in a few MB (on a GPU some 60) at any size."""
    n, device = weight.numel(), weight.device
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(math.ceil(n / blocksize), device=device)
    blocks = (CHUNK if weight.is_cpu else GPU_CHUNK) // blocksize  # in a chunk
    weights = weight.flatten().split(blocks * blocksize)
    results = packed.split(blocks * blocksize // 2), absmax.split(blocks)
    for chunk, its_packed, its_absmax in zip(weights, *results):
        its_packed[:], its_absmax[:] = definition(chunk, blocksize)
    return packed, absmax


def dequantize(packed, absmax, shape, dtype, blocksize, levels):
    """nf4.dequantize, by the quickest way there is on the device."""
    n, packed = math.prod(shape), packed.flatten()
    if n % blocksize:  # complete the last block
        packed = F.pad(packed, (0, len(absmax) * blocksize // 2 - len(packed)))
    quickest = decode_cpu if packed.is_cpu else decode
    if n >= CHUNK and not packed.is_cpu:  # below, there is nothing to gain
        quickest = fused_decode()
    weight = quickest(packed.view(-1, blocksize // 2), absmax, levels, dtype)
    return weight.flatten()[:n].view(shape)


def decode(packed, absmax, levels, dtype):
    """(blocks, bytes) uint8, (blocks,) fp32 -> (blocks, 2 * bytes), as one expression to fuse."""
    shifts = torch.arange(4, -1, -4, dtype=torch.int32, device=packed.device)  # high nibble first
    codes = (packed.int()[..., None] >> shifts & 15).flatten(1)
    return (levels[codes] * absmax[:, None]).to(dtype)


@functools.cache
def fused_decode():
    """decode as ONE kernel, where triton is: 4 bits are read, 16 written, nothing in between.

    Only the number of blocks varies from weight to weight, so a model with many shapes compiles
    twice: for the first, and for any.
    """
    return torch.compile(decode) if importlib.util.find_spec("triton") else decode


def decode_cpu(packed, absmax, levels, dtype):
    """decode for a CPU, faster than what inductor makes of it: a byte looks up a PAIR of levels.

    The pair is one 64-bit word, so a lookup is one load and one store; and the fp32 products of a
    chunk are rounded while they are in the cache.
    """
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
