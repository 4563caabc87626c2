"""A helper of attention.py: attention over a packed row in one kernel of a GPU.

torch's flex_attention compiles a function of two positions, "may this query see this key?", into
an attention kernel. A block mask says for which blocks of the row the answer is always yes or no.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

TILE = 128  # tokens: the side of a block of a block mask
LEAST_HEAD = 16  # the smallest size of a head that triton's matrix products take


def has_triton() -> bool:
    """Can torch's compiler make kernels for a GPU? It needs triton, which Windows may lack."""
    return importlib.util.find_spec("triton") is not None


@cache
def has_flex(device: torch.device, head: int = LEAST_HEAD) -> bool:
    """Is flex_attention fast on a device, for heads of this size? On cards before Ampere (a T4, an
    RTX 20) triton does not use the tensor cores, and flex_attention would take ten times as long as
    everything else together."""
    if device.type != "cuda" or head < LEAST_HEAD or not has_triton():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def compiled_flex():
    """flex_attention compiled by itself, for layers that are not compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    compiler_settings()
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@cache
def compiler_settings() -> None:
    """Set options without which the compiler would compile again for many rows. torch.compile does
    not take them as arguments.

    If a row has by chance as many blocks as the model has heads, "duck shapes" would treat both as
    one number, and the next row would be compiled again.
    """
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as shapes

    dynamo.specialize_float = True  # scale and softcap are constants of the model
    dynamo.recompile_limit = 64  # with and without gradient, short and long rows, windows ...
    shapes.use_duck_shape = False


def bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) -> the least and the greatest value of each block of TILE."""
    missing = -len(values) % TILE  # the last block is filled up with its last value
    return torch.cat([values, values[-1:].expand(missing)]).view(-1, TILE).aminmax(dim=1)


def plan(geometry, window: int | None):
    """-> flex_attention's block mask, and whether the card has little shared memory.

    A block is TILE queries by TILE keys. The mask lists blocks in which every query sees every key,
    and blocks in which the kernel has to ask for each pair. All other blocks are skipped.

    torch's create_block_mask asks for all T x T pairs. For a row of 32,768 tokens with a window it
    needs 20 GB for that. Here the least and greatest values of each block are enough. With a window
    an empty block may be listed as one to ask for; this costs time, but the result is right.
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
        """-> for each block of queries: how many blocks of keys are True, and all, those first."""
        order = blocks.byte().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

    lists = *listed(some & ~every), *listed(every)
    mask = BlockMask.from_kv_blocks(*lists, TILE, sees, (tokens, tokens))
    geometry.block_masks[window] = mask, little_shared_memory(position.device)
    return geometry.block_masks[window]


@cache
def little_shared_memory(device: torch.device) -> bool:
    """Has a card little shared memory? A kernel gets 99 KiB of it on an RTX 30, 40 or 50, an A10,
    L4 or L40S, but 163 on an A100 and 227 on an H100. For AMD flex_attention has other settings."""
    if device.type != "cuda" or torch.version.hip:
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin < 160 * 1024


def flex(query, key, value, geometry, scaling, window, softcap) -> Tensor:
    """Attention by flex_attention; arguments and result as in packing.attention."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary gives fp32 under autocast

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
    """flex_attention's options for a card. With little shared memory its default blocks just fit
    for heads of 128, and need 50 KiB too much for heads of 256. So data is loaded in two stages and
    not three, and in backward blocks are smaller. In fp32 a number takes twice the memory, so
    forward's blocks are smaller, too; backward's default blocks are small there already."""
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # its decoding kernel fails on some rows
    # Not ROWS_GUARANTEED_SAFE, though each token sees itself. If a query sees no key of the first
    # block that it meets, the result is NaN without flex_attention's guard.
    if little_shared_memory:
        large = query.shape[3] > 128
        options["fwd_num_stages"] = 2
        if query.dtype == torch.float32:
            options |= {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16 if large else 32}
        elif large:
            options["bwd_num_stages"] = 2
            options |= {f"bwd_BLOCK_{name}": 32 for name in ("M1", "N1", "M2", "N2")}
    return options
