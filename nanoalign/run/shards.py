"""A model that no device holds whole: --fsdp, with torchrun.

FSDP2 (torch's fully_shard) cuts each decoder layer's weights between the ranks, gathers a layer
when it is its turn to compute, and lets go of it again. What a rank keeps of a cut tensor is a
DTensor, which knows the whole one's shape. Files hold whole tensors: a checkpoint goes on on any
number of ranks, with the flag or without.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanoalign.logps import PackedLM, Scores
from nanoalign.nf4 import FrozenLinear
from nanoalign.packing import Example
from nanoalign.run import ranks

FILLER = [Example([0], [([0], [True])])]  # one token


def shard(lm: PackedLM, device: torch.device) -> None:
    """Leave each rank its part of the weights: FSDP2, decoder layer by decoder layer.

    Where all weights train they stay fp32, as do their AdamW states, of which each rank has its
    part too; a layer computes with gathered copies in `lm.autocast`, and its gradients are summed
    in fp32. With LoRA only what is frozen is cut, NF4 codes and scales as well. What trains is
    small: each rank has all of it and trains it as without FSDP, and `policy.reference` stays what
    it is without: a switch, or a copy.
    """
    from torch.distributed.device_mesh import init_device_mesh  # late: a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    trained = {p for p in lm.parameters() if p.requires_grad}
    all_train = len(trained) == len(list(lm.parameters()))
    for module in [m for m in lm.modules() if isinstance(m, FrozenLinear)]:
        for name, buffer in [(n, b) for n, b in module.named_buffers() if b.dim()]:
            delattr(module, name)  # only parameters are cut
            module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    how = {"mesh": init_device_mesh(device.type, (ranks.WORLD,))}
    how["ignored_params"] = set() if all_train else trained
    for parameter in how["ignored_params"]:
        parameter.data = parameter.data.to(device)
    compute = lm.autocast if all_train else None
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    for layer in lm.model.get_decoder().layers:
        fully_shard(layer, mp_policy=policy if compute else MixedPrecisionPolicy(), **how)
    fully_shard(lm, **how)  # the rest (embedding, last norm, head) is gathered for the whole row
    lm.register_forward_pre_hook(_filled)
    lm.register_forward_hook(_emptied)
    ranks.SHARDED.append(lm)


def _filled(lm: PackedLM, given: tuple) -> tuple:
    """An empty batch passes through the layers as FILLER: all ranks gather a layer together."""
    examples, *more = given
    return examples or FILLER, *more


def _emptied(lm: PackedLM, given: tuple, scores: Scores) -> Scores:
    """What was filled in has no scores."""
    return scores.take([]) if given[0] is FILLER else scores


def settle(lm: PackedLM) -> None:
    """Let go of what a pass without gradient has left gathered, so that `lm.parameters()` are this
    rank's parts again."""
    if lm in ranks.SHARDED:
        lm.reshard()


def to_rank_0(tensor: Tensor) -> Tensor | None:
    """The whole of a tensor, of which each rank may have a part, on the CPU of rank 0. All ranks
    call it; the others get None, because a copy for each would fill the host's memory."""
    whole = tensor.full_tensor() if ranks.is_part(tensor) else tensor
    return None if ranks.RANK else whole.cpu()


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole weight, or an optimizer's state of its shape, cut as the parameter is; what has
    another shape (AdamW's step) stays whole."""
    if ranks.is_part(parameter) and tensor.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        tensor = tensor.to(parameter.device)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


def over_parts(count: Callable[[Tensor], int], tensor: Tensor) -> int:
    """The sum of `count` over the parts of a tensor."""
    if ranks.is_part(tensor):
        return sum(ranks.gather(count(tensor.to_local())))
    return count(tensor)


def whole_weights(lm: PackedLM) -> dict[str, Tensor] | None:
    """Of a model that trains in parts: name -> whole weight, on the CPU of rank 0. None of others,
    which are whole already, or of which only an adapter is saved."""
    if lm not in ranks.SHARDED or not all(p.requires_grad for p in lm.parameters()):
        return None
    found, weights = {}, {}
    for name, tensor in lm.model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:  # tied weights stay one tensor
            found[id(tensor)] = to_rank_0(tensor.detach())
        weights[name] = found[id(tensor)]
    return weights
