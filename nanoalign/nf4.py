"""NF4: a frozen weight in four bits, and the linear layer that trains through it (QLoRA).

arXiv 2305.14314. Fine-tuning with LoRA never changes the base weights, so they need only be good
enough to compute with. Four bits give 16 levels; the question is where to put them.

**The levels are quantiles of a normal.** The weights of a trained network are, in any small
neighbourhood, close to normal with mean zero. A code carries most when all its values are used
equally often, so the levels go where a normal has equal probability between them: at its
quantiles, scaled to [-1, 1]. Two details (appendix E) make NF4 what it is:

  - Zero is a level. Evenly spaced quantiles of a symmetric law straddle the median, and every
    weight that is exactly zero (padding, pruning) would come back as noise. So the two halves are
    spaced separately, from a tail to the median at probability 1/2, and both end in the zero.
  - 16 is even, so with a shared zero the halves cannot be alike: the negative side has 8 levels
    with the zero, the positive side 9. 8 + 9 - 1 = 16.

  The quantile of probability 1 is infinite, so the tail starts half a step inside: at
  1 - (1/32 + 1/30) / 2 = 0.9677, the mean of what 16 and 15 intervals would ask for.

**The scale is local.** Each run of 64 weights (row-major, straddling rows where it must) is divided
by its own largest magnitude, its absmax, so one outlier spoils 63 neighbours and not a matrix. A
weight is then code and scale; on normal weights the rms error is 9.2 % of the rms weight.

**The arithmetic**, in bits per weight:

    plain     4 + 32 / 64                            = 4.500
    doubled   4 +  8 / 64 + 32 / (64 * 256)          = 4.127

"Doubled" quantizes the scales too: they are all positive and much alike, so their mean is taken
off and the rest stored in 8 bits, 256 to a block. A 7 B model: 14 GB in bf16, 3.9 or 3.6 GB here.

**Training through it.** y = x W' needs dx = dy W, and W is rebuilt from four bits both times: the
dense weight lives for one matrix product, and backward remembers only the packed one.

**What bitsandbytes does instead.** The same bytes: our packed codes and scales are bit for bit its
own, and a layer goes to disk under its keys and back. It does the work in C++ and CUDA; here it is
one expression that torch.compile fuses, or a loop that stays in a CPU's cache. And it has traps:

  - its CPU code rounds doubled scales through a coarser table than its CUDA code, and one code in a
    thousand is off by one; we take the nearest, always;
  - on AVX512, its dequantize is wrong where a row is no multiple of the block (but is one of 16);
  - with bf16 weights and fp32 input, its forward uses the weight before rounding to bf16 and its
    backward the one after; here both use the one after, which is also what a merge would save.
"""

import functools
import importlib.util
import math
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import nn

from nanoalign import InputError

# ------------------------------------------------------------------------------------ the levels

LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)  # (16,), as published: every NF4 file holds these very numbers
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / 2  # (15,): code = how many of them lie below the value

# All 256 bytes as pairs of levels (high nibble first), a pair being one 64-bit word: see decode_cpu
_BYTE = torch.arange(256)
WORDS = torch.stack([LEVELS[_BYTE >> 4], LEVELS[_BYTE & 15]], -1).view(torch.int64).flatten()

CHUNK = 2**18  # weights handled at a time: their fp32 values fit in a core's second-level cache
GPU_CHUNK = 2**22  # 16 MB of them: a GPU wants fewer and larger calls


def derive_levels() -> torch.Tensor:
    """LEVELS from their definition (arXiv 2305.14314, appendix E), to 1e-6 of the constants."""
    tail = 1 - (1 / 32 + 1 / 30) / 2

    def half(n):  # n quantiles from the tail towards the median, which is left out
        return [NormalDist().inv_cdf(tail + (0.5 - tail) * i / n) for i in range(n)]

    negative, positive = [-q for q in half(7)], half(8)[::-1]
    return torch.tensor(negative + [0.0] + positive) / positive[-1]


# --------------------------------------------------------------------------- weight <-> four bits


def quantize_nf4(weight, blocksize=64, name="weight"):
    """weight, any shape and float dtype -> packed uint8 [(n+1)//2, 1], absmax fp32 [blocks].

    absmax_b = max |w| over block b; code = the level nearest to w / absmax_b, and the lower one
    halfway; byte i = code[2i] << 4 | code[2i+1]. Besides its results it needs a few MB (on a
    GPU some 60), whatever the size of the weight. InputError, with the tensor's name, if a value is
    not finite.
    """
    flat, n = weight.detach().flatten(), weight.numel()
    chunk = CHUNK if weight.is_cpu else GPU_CHUNK
    blocks, step = math.ceil(n / blocksize), chunk // blocksize
    packed = torch.empty(blocks, blocksize // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, device=weight.device, dtype=torch.float32)
    for i in range(0, blocks, step):
        x = flat[i * blocksize : (i + step) * blocksize].float()
        missing = -len(x) % blocksize
        x = F.pad(x, (0, missing)).view(-1, blocksize)  # zeros leave absmax alone
        scale = x.abs().amax(1)
        # by the reciprocal, not a division: the two differ in the last bit, and bytes must match
        scaled = x * (1 / scale.clamp(min=1e-38))[:, None]
        if missing:  # but an incomplete last block is divided, and its scale is never zero
            scaled[-1] = x[-1] / scale[-1].clamp_(min=1e-38)
        absmax[i : i + step] = scale
        codes = torch.zeros_like(x, dtype=torch.uint8)
        for midpoint in MIDPOINTS.tolist():  # 15 vector comparisons beat a binary search
            codes += scaled > midpoint
        packed[i : i + step] = codes[:, 0::2] << 4 | codes[:, 1::2]
    if not absmax.isfinite().all():
        raise InputError(f"{name}: holds NaN or infinity, cannot be quantized to NF4")
    return packed.view(-1, 1)[: (n + 1) // 2], absmax


def dequantize_nf4(packed, absmax, shape, dtype, blocksize=64):
    """The inverse: level * absmax in fp32, rounded once to dtype. Returns a tensor of `shape`."""
    n, packed = math.prod(shape), packed.flatten()
    if n % blocksize:  # complete the last block
        packed = F.pad(packed, (0, len(absmax) * blocksize // 2 - len(packed)))
    packed = packed.view(-1, blocksize // 2)
    if packed.is_cpu:
        weight = decode_cpu(packed, absmax, dtype)
    else:
        fastest = fused_decode() if n >= CHUNK else decode  # nothing to gain on a small weight
        weight = fastest(packed, absmax, tables(packed.device)[0], dtype)
    return weight.flatten()[:n].view(shape)


def decode(packed, absmax, levels, dtype):
    """(blocks, bytes) uint8, (blocks,) fp32 -> (blocks, 2 * bytes): what dequantizing means."""
    shifts = torch.arange(4, -1, -4, dtype=torch.int32, device=packed.device)  # high nibble first
    codes = (packed.int()[..., None] >> shifts & 15).flatten(1)
    return (levels[codes] * absmax[:, None]).to(dtype)


@functools.cache
def fused_decode():
    """decode as ONE kernel, where triton is: 4 bits are read, 16 written, nothing in between.

    It is compiled at its first call. Of (blocks, bytes) only `blocks` varies from weight to
    weight, so a model with many shapes compiles twice: for the first, and for any.
    """
    return torch.compile(decode) if importlib.util.find_spec("triton") else decode


def decode_cpu(packed, absmax, dtype):
    """decode for a CPU, faster than what inductor makes of it: a byte looks up a PAIR of levels.

    The pair is one 64-bit word, so a lookup is one load and one store; and the fp32 products of a
    chunk are rounded while they are in the cache, instead of travelling to memory and back.
    """
    out = torch.empty(len(packed), 2 * packed.shape[1], dtype=dtype)
    step = CHUNK // out.shape[1]
    for i in range(0, len(packed), step):
        words = WORDS.index_select(0, packed[i : i + step].flatten().int())
        levels = words.view(torch.float32).view(-1, out.shape[1])
        out[i : i + step] = levels.mul_(absmax[i : i + step, None])
    return out


# ------------------------------------------------------------------------- scales <-> eight bits


def dynamic_map() -> torch.Tensor:
    """The 256 levels for scales (Dettmers, arXiv 1511.04561): 7 decades, finer towards 1.

    Decade i of 0..6 holds 2**i numbers on each side of zero, the midpoints of an even grid over
    (0.1, 1) times 10**(i-6); with 0 and 1 that makes 127 + 1 + 128.
    """
    values = [0.0, 1.0]
    for i in range(7):
        grid = torch.linspace(0.1, 1, 2**i + 1)
        positive = (10 ** (i - 6) * ((grid[:-1] + grid[1:]) / 2)).tolist()
        values += positive + [-v for v in positive]
    return torch.tensor(sorted(values))


DYNAMIC_MAP = dynamic_map()


@functools.cache
def tables(device):
    """LEVELS and DYNAMIC_MAP on a device, copied there once."""
    return LEVELS.to(device), DYNAMIC_MAP.to(device)


def double_quantize(absmax):
    """absmax fp32 [blocks] -> codes uint8 [blocks], absmax2 fp32 [blocks/256 up], offset fp32 [].

    offset = mean(absmax); code = the entry of DYNAMIC_MAP nearest to (absmax - offset) / absmax2.
    """
    n, offset = len(absmax), absmax.mean()
    x = F.pad(absmax - offset, (0, -n % 256)).view(-1, 256)
    absmax2 = x.abs().amax(1)
    x = x * (1 / absmax2.clamp(min=1e-38))[:, None]
    table = tables(absmax.device)[1]
    codes = torch.bucketize(x, (table[1:] + table[:-1]) / 2, out_int32=True)
    return codes.to(torch.uint8).flatten()[:n], absmax2, offset


def double_dequantize(codes, absmax2, offset):
    """map[code] * absmax2 + offset, in fp32, as two operations (a fused one rounds differently)."""
    scale = absmax2.repeat_interleave(256)[: len(codes)]
    return tables(codes.device)[1][codes.int()] * scale + offset


# --------------------------------------------------------------------------------------- the layer


def dense(packed, scales, shape, dtype, blocksize):
    """The weight itself, from scales = (absmax,) or the doubled (codes, absmax2, offset)."""
    absmax = scales[0] if len(scales) == 1 else double_dequantize(*scales)
    return dequantize_nf4(packed, absmax, shape, dtype, blocksize)


class NF4Product(torch.autograd.Function):
    """x W' + b with a frozen W that is rebuilt in forward and again in backward, never kept.

    W is rounded to the dtype it was quantized from and only then cast to the input's, so every
    compute dtype sees the same weights, and a merged model is the one that was trained.
    """

    @staticmethod
    def forward(ctx, x, bias, layout, packed, *scales):
        ctx.save_for_backward(packed, *scales)  # buffers of the layer: nothing new is held
        ctx.layout = layout
        return F.linear(x, dense(packed, scales, *layout).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):  # (..., out)
        packed, *scales = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = grad @ dense(packed, scales, *ctx.layout).to(grad.dtype)  # (..., in)
        if ctx.needs_input_grad[1]:
            dbias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return dx, dbias, None, None, *[None] * len(scales)


class NF4Linear(nn.Module):
    """nn.Linear whose weight is frozen in four bits; the bias trains if it requires grad.

    The constructor allocates only packed buffers; `pack` fills them from a weight, which may come
    and go one tensor at a time. `dtype` is the one dequantized weights are rounded to.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=False,
        dtype=torch.bfloat16,
        blocksize=64,
        double_quant=False,
        device=None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.blocksize, self.double_quant = dtype, blocksize, double_quant
        n = in_features * out_features
        blocks = math.ceil(n / blocksize)

        def buffer(name, dtype, *shape):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

        buffer("packed", torch.uint8, (n + 1) // 2, 1)
        buffer("absmax", torch.uint8 if double_quant else torch.float32, blocks)
        if double_quant:
            buffer("absmax2", torch.float32, math.ceil(blocks / 256))
            buffer("offset", torch.float32)
        bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear, blocksize=64, double_quant=False, name="weight"):
        """Quantize an nn.Linear. The bias is shared with it."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            False,
            linear.weight.dtype,
            blocksize,
            double_quant,
            device="meta",
        )
        layer.pack(linear.weight, name)
        layer.bias = linear.bias
        return layer

    def pack(self, weight, name="weight"):
        """Quantize weight (out, in) into this layer, on the weight's device."""
        if weight.shape != (self.out_features, self.in_features):
            raise InputError(
                f"{name}: shape {tuple(weight.shape)}, expected "
                f"{(self.out_features, self.in_features)}"
            )
        self.packed, self.absmax = quantize_nf4(weight, self.blocksize, name)
        if self.double_quant:
            self.absmax, self.absmax2, self.offset = double_quantize(self.absmax)

    def scales(self):
        return (self.absmax, self.absmax2, self.offset) if self.double_quant else (self.absmax,)

    def layout(self):
        return (self.out_features, self.in_features), self.dtype, self.blocksize

    def dequantize(self):
        """The dense weight, (out, in) in self.dtype."""
        return dense(self.packed, self.scales(), *self.layout())

    # Traced into a graph, forward and backward would hold the same expression twice: the compiler
    # would compute it once and keep the dense weight. So a compiled model calls this as it stands.
    # (torch.compiler.disable would import the compiler here and now, for a second.)
    @torch._disable_dynamo
    def forward(self, x):  # (..., in) -> (..., out), in x's dtype
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return NF4Product.apply(x, bias, self.layout(), self.packed, *self.scales())

    def _apply(self, fn, recurse=True):
        """`.to(dtype)` must not round a scale, 64 weights at once: it meets the scales as bits."""

        def on_bits(t):
            if t.dtype == torch.float32 and any(t is b for b in self.buffers()):
                return fn(t.view(torch.int32)).view(torch.float32)
            return fn(t)

        return super()._apply(on_bits, recurse)

    def extra_repr(self):
        bits = 8 * sum(b.nbytes for b in self.buffers()) / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {bits:.2f} bits per weight"
        )
