"""torch's flex_attention with our predicate, one kernel of a GPU: a helper of attention.py.

flex_attention compiles a function of two positions, "may this query see this key?", into a fused
attention kernel. A block mask tells the kernel where in the row that need not even be asked.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

TILE = 128  # flex_attention decides for so many queries and keys at once whether to look at them
LEAST_HEAD = 16  # numbers: triton's products have no smaller side


def has_triton() -> bool:
    """Can torch's compiler make kernels for a GPU? Windows may have no triton."""
    return importlib.util.find_spec("triton") is not None


@cache
def has_flex(device: torch.device, head: int = LEAST_HEAD) -> bool:
    """Is flex_attention one fast kernel there, for heads of so many numbers? It is made by triton,
    which on cards before Ampere (a T4, an RTX 20) has no use of the tensor cores: there it would
    take ten times as long as all the rest together."""
    if device.type != "cuda" or head < LEAST_HEAD or not has_triton():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def compiled_flex():
    """flex_attention, compiled on its own, for layers that are not."""
    from torch.nn.attention.flex_attention import flex_attention

    compiler_settings()
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@cache
def compiler_settings() -> None:
    """So that few compilations serve all rows. (These have no place among torch.compile's options.)

    A row may by chance have as many blocks of tokens as the model has heads; with duck shapes the
    compiler would take the two for one number, and compile again for the next row.
    """
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as shapes

    dynamo.specialize_float = True  # scale and softcap are constants of the model
    dynamo.recompile_limit = 64  # with and without gradient, short and long rows, windows ...
    shapes.use_duck_shape = False


def bounds(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) -> least and greatest of each TILE, the last one filled up with its last number."""
    missing = -len(numbers) % TILE
    return torch.cat([numbers, numbers[-1:].expand(missing)]).view(-1, TILE).aminmax(dim=1)


def plan(geometry, window: int | None):
    """-> flex_attention's block mask, and whether the card has little shared memory.

    The mask says which TILE x TILE pairs of tokens hold one in which the key is seen, and which
    hold only such. Of the others the predicate decides, pair by pair, inside of the kernel.

    torch's own create_block_mask asks the predicate for all T x T pairs: 20 GB of temporaries for a
    row of 32,768 tokens with a window. Here the least and greatest number of each block tell; with
    a window a block may be taken for mixed that is empty, never the other way round.
    """
    if window in geometry.block_masks:
        return geometry.block_masks[window]
    from torch.nn.attention.flex_attention import BlockMask  # late: it imports the compiler

    compiler_settings()
    end, position, tokens = geometry.until, geometry.position, len(geometry.position)
    oldest = None if window is None else position - window

    def sees(b, h, query, key):
        seen = (key <= query) & (query < end[key])
        return seen if oldest is None else seen & (position[key] > oldest[query])

    lowest, highest = bounds(end)
    first = torch.arange(len(lowest), dtype=torch.int32, device=end.device) * TILE
    query, key = first[:, None], first[None, :]
    some = (key <= query) & (highest > query)  # (blocks of queries, blocks of keys)
    every = (key < query) & (lowest >= query + TILE)  # false for an incomplete block of queries
    if window is not None:
        low, high = bounds(position)
        some &= low[:, None] - high < window
        every &= high[:, None] - low < window

    def listed(blocks):
        """-> how many of the blocks in a row are meant, and all of them, these first."""
        order = blocks.byte().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

    lists = *listed(some & ~every), *listed(every)
    mask = BlockMask.from_kv_blocks(*lists, TILE, sees, (tokens, tokens))
    geometry.block_masks[window] = mask, little_shared_memory(position.device)
    return geometry.block_masks[window]


@cache
def little_shared_memory(device: torch.device) -> bool:
    """An RTX 30, 40 or 50, an A10, L4 or L40S lets a kernel have 99 KiB of a multiprocessor's fast
    memory; an A100 163, an H100 227. (For AMD's cards flex_attention has settings of their own.)"""
    if device.type != "cuda" or torch.version.hip:
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin < 160 * 1024


def flex(query, key, value, geometry, scaling, window, softcap) -> Tensor:
    """The predicate compiled into one kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotary's in fp32

    def cap(score, b, h, q, k):
        return softcap * torch.tanh(score / softcap)

    mask, little = plan(geometry, window)
    attend = flex_attention if torch.compiler.is_compiling() else compiled_flex()
    return attend(
        query, key, value,
        score_mod=cap if softcap else None,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=kernel_options(query, little),
    )  # fmt: skip


def kernel_options(query, little_shared_memory: bool) -> dict:
    """With little shared memory flex_attention's own block sizes do not fit, or only just: a head
    of 128 numbers by 2 KiB, one of 256 by 50 KiB not. Two stages of loading instead of three, and
    smaller blocks in backward, do; in fp32, where a number is twice as long, smaller blocks of
    queries and keys too. (In backward torch's own are as small as they can be there.)"""
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # its decoding kernel fails on some rows
    # Not ROWS_GUARANTEED_SAFE, though every token sees itself: the first block of keys that a query
    # meets may hold none that it sees, and without flex_attention's guard that is NaN.
    if little_shared_memory:
        large = query.shape[3] > 128
        options["fwd_num_stages"] = 2
        if query.dtype == torch.float32:
            options |= {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16 if large else 32}
        elif large:
            options["bwd_num_stages"] = 2
            options |= {f"bwd_BLOCK_{name}": 32 for name in ("M1", "N1", "M2", "N2")}
    return options
