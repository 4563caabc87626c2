"""NF4: a frozen weight in four bits, and the linear layer that computes with it.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314) is LoRA on such weights. Four bits give 16 levels:
quantiles of a normal distribution. Trained weights are close to normal, so all levels are used
about equally often. One level is zero (appendix E), or weights that are zero would become noise.
From -1 to 0 there are 8 levels and from 0 to 1 there are 9, and both count the zero.

Each block of 64 weights, in row-major order, is divided by its largest magnitude, the absmax. So an
outlier spoils 63 other weights and not the matrix. On normal weights the rms error is 9.2 %. The
bits per weight:

    plain     4 + 32 / 64                            = 4.500
    doubled   4 +  8 / 64 + 32 / (64 * 256)          = 4.127

"Doubled": the absmax values, minus their mean, are quantized to 8 bits in blocks of 256. A 7 B
model takes 14 GB in bf16, and 3.9 or 3.6 GB here. The bytes equal those of bitsandbytes.
"""

import functools
import math
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoalign import InputError
from nanoalign.fast import nf4 as fast  # `rebuild`, but quicker
from nanoalign.fast.nf4 import decoded, in_chunks, product_with

# fmt: off
LEVELS = torch.tensor([  # as published; every NF4 file holds these fp32 values
    -1.0, -0.696192801, -0.525073051, -0.394917488, -0.284441382, -0.18477343, -0.0910500363,
    0.0, 0.0795802996, 0.160930201, 0.246112302, 0.337915242, 0.440709829, 0.562617004,
    0.722956836, 1.0,
])
# fmt: on
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / 2  # (15,); a value's code: how many are below it
TINY = 1e-38  # divide by this at least: the absmax of a block of zeros is 0


def derive_levels() -> Tensor:
    """LEVELS computed from their definition (appendix E); equal to the constants within 1e-6."""
    tail = 1 - (1 / 32 + 1 / 30) / 2  # not 1: the normal quantile of 1 is infinite

    def half(n):  # n quantiles from `tail` down to the median, which is left out
        return [NormalDist().inv_cdf(tail + (0.5 - tail) * i / n) for i in range(n)]

    negative, positive = [-q for q in half(7)], half(8)[::-1]
    return torch.tensor(negative + [0.0] + positive) / positive[-1]


def quantize(weight: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """A weight of any shape and float dtype -> packed uint8 ((n+1)//2, 1), absmax fp32 (blocks,).
    A code is the level nearest to w / absmax, the lower one of two; high nibble first."""
    n = weight.numel()
    x = F.pad(weight.detach().flatten().float(), (0, -n % blocksize)).view(-1, blocksize)
    absmax = x.abs().amax(1)
    # bitsandbytes multiplies by 1 / absmax. A division would differ in the last bit.
    scaled = x * (1 / absmax.clamp(min=TINY))[:, None]
    if n % blocksize:  # but bitsandbytes divides in an incomplete last block, and its absmax > 0
        scaled[-1] = x[-1] / absmax[-1].clamp_(min=TINY)
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint in MIDPOINTS.tolist():  # faster than a binary search for each weight
        codes += scaled > midpoint
    packed = codes[:, 0::2] << 4 | codes[:, 1::2]
    return packed.view(-1, 1)[: (n + 1) // 2], absmax


def dequantize(packed, absmax, shape, dtype, blocksize: int = 64) -> Tensor:
    """quantize backwards: level * absmax in fp32, rounded to dtype -> a tensor of `shape`."""
    n = math.prod(shape)
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[:n]
    scales = absmax.repeat_interleave(blocksize)[:n]
    return (tables(absmax.device)[0][codes.int()] * scales).to(dtype).view(shape)


def dynamic_map() -> Tensor:
    """The 256 levels of 8-bit scales (Dettmers, arXiv 1511.04561): 0, 1, and +-7 decades. Decade i
    (0 to 6) has 2**i numbers: the midpoints of an even grid over (0.1, 1), times 10**(i-6)."""
    values = [0.0, 1.0]
    for i in range(7):
        grid = torch.linspace(0.1, 1, 2**i + 1)
        positive = (10 ** (i - 6) * ((grid[:-1] + grid[1:]) / 2)).tolist()
        values += positive + [-v for v in positive]
    return torch.tensor(sorted(values))


DYNAMIC_MAP = dynamic_map()


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """LEVELS and DYNAMIC_MAP on a device. They are copied once."""
    return LEVELS.to(device), DYNAMIC_MAP.to(device)


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax fp32 (n,) -> codes uint8 (n,), absmax2 fp32 (n / 256, rounded up), offset fp32 ().
    offset = mean(absmax), absmax2 = max |absmax - offset| of 256; a code is the nearest level."""
    n, offset = len(absmax), absmax.mean()
    x = F.pad(absmax - offset, (0, -n % 256)).view(-1, 256)
    absmax2 = x.abs().amax(1)
    x = x * (1 / absmax2.clamp(min=TINY))[:, None]
    table = tables(absmax.device)[1]
    codes = torch.bucketize(x, (table[1:] + table[:-1]) / 2, out_int32=True)
    return codes.to(torch.uint8).flatten()[:n], absmax2, offset


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """DYNAMIC_MAP[code] * absmax2 + offset in fp32, rounded twice as in bitsandbytes."""
    scale = absmax2.repeat_interleave(256)[: len(codes)]
    return tables(codes.device)[1][codes.int()] * scale + offset


def rebuild(packed, scales: list[Tensor], shape, dtype, blocksize, *tables) -> Tensor:
    """A weight from its codes and scales. Scales: [absmax], or what double_quantize returns."""
    absmax = scales[0] if len(scales) == 1 else double_dequantize(*scales)
    return dequantize(packed, absmax, shape, dtype, blocksize)


class FrozenProduct(torch.autograd.Function):
    """x W' + b. W is rebuilt in forward, and again in backward, to save memory. It is first rounded
    to the dtype that it had before quantization, so a merged model has the same weights."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        return F.linear(x, decoded(layer, x).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):  # (..., out)
        need_x, need_bias, _ = ctx.needs_input_grad
        dx = grad @ ctx.layer.dequantize().to(grad.dtype) if need_x else None  # (..., in)
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
        return dx, dbias, None


class FrozenLinear(nn.Module):
    """nn.Linear with a frozen weight in another format; its bias may train. A format is a subclass:
    pack(weight) stores a weight (out, in) in buffers, dequantize() rebuilds it in `self.dtype`."""

    def __init__(self, in_features: int, out_features: int, dtype=torch.bfloat16):
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, name="weight", **settings) -> "FrozenLinear":
        """Make one from an nn.Linear. InputError, with `name`: the weight has NaN or infinity."""
        weight = linear.weight.detach()
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise InputError(f"{name}: holds NaN or infinity, cannot be quantized")
        layer = cls(linear.in_features, linear.out_features, weight.dtype, **settings)
        layer.pack(weight)
        layer.bias = linear.bias
        return layer

    def merge(self) -> nn.Linear:
        """An nn.Linear that computes the same, in `self.dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        linear.bias = self.bias
        return linear

    # Not compiled: the compiler would keep the rebuilt weight from forward to backward.
    @getattr(torch, "_disable_dynamo", torch.compiler.disable)
    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out), in x's dtype
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return FrozenProduct.apply(x, bias, self)

    def _apply(self, fn, recurse=True):
        """Give fp32 scales to `fn` as integers: `.to(dtype)` would round them otherwise."""

        def on_bits(t):
            scale = t.dtype == torch.float32 and any(t is b for b in self.buffers())
            return fn(t.view(torch.int32)).view(torch.float32) if scale else fn(t)

        return super()._apply(on_bits, recurse)

    def extra_repr(self) -> str:
        bits = 8 * sum(b.nbytes for b in self.buffers()) / (self.in_features * self.out_features)
        return f"{nn.Linear.extra_repr(self)}, {bits:.2f} bits per weight"


class NF4Linear(FrozenLinear):
    """A linear layer with its weight in NF4: codes in `packed`, scales in `absmax` and others."""

    product = staticmethod(product_with(tables))  # FrozenProduct as one operator, to be compiled

    def __init__(self, *size, double_quant=False, blocksize=64):
        super().__init__(*size)
        self.double_quant, self.blocksize = double_quant, blocksize

    def pack(self, weight: Tensor) -> None:
        packed, absmax = in_chunks(quantize, weight, self.blocksize)
        scales = double_quantize(absmax) if self.double_quant else [absmax]
        for name, buffer in zip(("packed", "absmax", "absmax2", "offset"), (packed, *scales)):
            self.register_buffer(name, buffer)

    def dequantize(self) -> Tensor:
        scales = [self.absmax, self.absmax2, self.offset] if self.double_quant else [self.absmax]
        shape, maps = (self.out_features, self.in_features), tables(self.packed.device)
        return fast.rebuild(self.packed, scales, shape, self.dtype, self.blocksize, *maps)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self) if torch.compiler.is_compiling() else super().forward(x)
