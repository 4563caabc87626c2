"""Several processes, one run: torchrun --nproc_per_node N train_dpo.py ...

Each process, a RANK of WORLD, holds the whole model and takes a share of every step's examples. A
step may be cut between ranks anywhere, because losses are sums and the divisor is the whole
step's: what the ranks have summed and their gradients meet in `total`, and since all of them then
do the same arithmetic their weights stay equal. So N ranks with batches of B take the step of one
process with batches of N * B. (The big libraries average within each rank and then the averages,
which gives a token more weight on the rank that has fewer of them.)

Rank 0 alone writes and speaks. With --fsdp no rank has the whole model: `shard`. Without torchrun
every function here gives back what it was given.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanoalign import InputError, Stopped
from nanoalign.fast.paged import parts
from nanoalign.logps import PackedLM, Scores
from nanoalign.nf4 import FrozenLinear
from nanoalign.packing import Example
from nanoalign.train import Batches, Sums, add, fitting

# Did torchrun start this process? Other launchers set some of these variables too.
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
RANK, WORLD = [int(os.environ[n]) for n in ("RANK", "WORLD_SIZE")] if LAUNCHED else (0, 1)
# torch 2.7 cuts no 4-bit weights, and tells a part's gradient norm for the whole's; 2.13 was tried.
CAN_SHARD = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
MESSAGE = 2**26  # numbers: gradients travel in messages of up to so many, LoRA's in a single one
SHARDED: list[PackedLM] = []  # the models of which each rank has a part (`shard`)
FILLER = [Example([0], [([0], [True])])]  # one token
PATIENCE = timedelta(hours=1)  # while rank 0 reads the data, say; torchrun sees a death at once


@contextlib.contextmanager
def job() -> Iterator[None]:
    """The processes that torchrun started, from their meeting to their end.

    An error on one rank ends them all: torchrun stops the others. Often several ranks fail at once,
    by the same flag or because one of them is gone; only the first to fail says why.
    """
    if not LAUNCHED:
        yield
        return
    store, rank, world = next(dist.rendezvous("env://"))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    meeting = {"store": store, "rank": rank, "world_size": world}
    dist.init_process_group(backend, timeout=PATIENCE, **meeting)
    try:
        with contextlib.ExitStack() as stack:
            if rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
        # gloo's threads need Python's lock to let go of the last message; and the group, while it
        # is destroyed, holds that lock and waits for them. So they have their turn first.
        time.sleep(0.2)
        dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        with contextlib.suppress(RuntimeError):  # the keeper of the store may be gone
            if store.add("failed ranks", 1) > 1:
                raise Stopped(2 if isinstance(error, InputError) else 1) from None
        if isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)):
            why = "another process of the job has died; checkpoints stand"
            raise InputError(f"rank {rank}: {why}") from None
        raise


def check_device(name: str) -> None:
    """Can every rank have the device that the flags ask for?"""
    if WORLD > 1 and name not in ("cpu", "cuda", "auto"):
        raise InputError(f"--device {name}: torchrun's processes take cuda, one GPU each, or cpu")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if WORLD > 1 and name != "cpu" and 0 < gpus < here:
        raise InputError(f"--nproc_per_node {here}: more processes than GPUs, of which {gpus} are")


def gather(thing) -> list:
    """What each rank has given, in their order, on every rank: an all_gather."""
    things = [thing] * WORLD
    if WORLD > 1:
        dist.all_gather_object(things, thing)
    return things


def once(do: Callable):
    """What `do` returns on rank 0, on every rank; it is called there only."""
    if WORLD == 1:
        return do()
    result = [do() if RANK == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


def own_dropout(seed: int) -> None:
    """From here on each rank draws random numbers of its own; until here, weights had to be equal.
    Rank 0 goes on with those of a single process."""
    if RANK:
        torch.manual_seed(seed + RANK)


def share(things: list, length: Callable = len) -> list:
    """This rank's of a list that all ranks have: the longest first, each to the rank that has the
    least so far, so that all take about as long. They stay in their order."""
    loads, mine = [0] * WORLD, []
    for i in sorted(range(len(things)), key=lambda i: -length(things[i])):
        least = loads.index(min(loads))
        loads[least] += length(things[i])
        if least == RANK:
            mine.append(i)
    return [things[i] for i in sorted(mine)]


def rows(examples: list[Example], size: int, tokens: int) -> Batches:
    """train.fitting, of this rank's share of the examples."""
    return level(fitting(share(examples, lambda e: e.tokens), size, tokens))


def level(batches: Batches) -> Batches:
    """As many batches on each rank, if the model is sharded: a layer is gathered by all ranks
    together, so all must pass through it equally often. Those that are added are empty."""
    most = max(gather(len(batches))) if SHARDED else 0
    return batches + [[]] * (most - len(batches))


def joined(tensors: list[Tensor]) -> Tensor:
    """Tensors (n,) end to end, those of all ranks: KTO's z0 is a mean over the whole step."""
    if WORLD == 1:
        return torch.cat(tensors)
    device = tensors[0].device if tensors else None
    lists = gather([t.tolist() for t in tensors])
    return torch.tensor([x for part in lists for row in part for x in row], device=device)


def total(sums: Sums, parameters: list[nn.Parameter] = ()) -> Sums:
    """What all ranks have summed; and each parameter's gradient becomes the sum of all ranks'.

    A parameter has none where no rank gave it one: AdamW leaves it alone, as on one process.
    """
    if WORLD == 1:
        return sums
    sums = {name: (float(value), count) for name, (value, count) in sums.items()}
    for p in parameters:
        if is_part(p) and p.grad is not None:  # FSDP has made it the ranks' mean
            p.grad *= WORLD
    replicas = [p for p in parameters if not is_part(p)]
    all_sums, all_have = zip(*gather((sums, [p.grad is not None for p in replicas])))
    somewhere = [p for p, have in zip(replicas, zip(*all_have)) if any(have)]
    for message in parts(somewhere, MESSAGE):
        add_gradients(message)
    whole: Sums = {}
    for theirs in all_sums:
        add(whole, theirs)
    return whole


def is_part(tensor: Tensor) -> bool:
    """Is it this rank's part of a whole? Where torch.distributed.tensor, whose import takes a
    second, was not needed yet, nothing is."""
    kind = sys.modules.get("torch.distributed.tensor")
    return kind is not None and isinstance(tensor, kind.DTensor)


def add_gradients(parameters: list[nn.Parameter]) -> None:
    """Every gradient becomes the sum of all ranks': one message."""
    for p in parameters:
        if p.grad is None:  # this rank had no example of the step
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(gradient.view_as(p))


def wait() -> None:
    """A barrier: until all ranks are here. What they have read, rank 0 may then write over."""
    gather(None)


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
    how = {"mesh": init_device_mesh(device.type, (WORLD,))}
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
    SHARDED.append(lm)


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
    if lm in SHARDED:
        lm.reshard()


def to_rank_0(tensor: Tensor) -> Tensor | None:
    """The whole of a tensor, of which each rank may have a part, on the CPU of rank 0. All ranks
    call it; the others get None, because a copy for each would fill the host's memory."""
    whole = tensor.full_tensor() if is_part(tensor) else tensor
    return None if RANK else whole.cpu()


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole weight, or an optimizer's state of its shape, cut as the parameter is; what has
    another shape (AdamW's step) stays whole."""
    if is_part(parameter) and tensor.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        tensor = tensor.to(parameter.device)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


def over_parts(count: Callable[[Tensor], int], tensor: Tensor) -> int:
    """The sum of `count` over the parts of a tensor."""
    if is_part(tensor):
        return sum(gather(count(tensor.to_local())))
    return count(tensor)


def whole_weights(lm: PackedLM) -> dict[str, Tensor] | None:
    """Of a model that trains in parts: name -> whole weight, on the CPU of rank 0. None of others,
    which are whole already, or of which only an adapter is saved."""
    if lm not in SHARDED or not all(p.requires_grad for p in lm.parameters()):
        return None
    found, weights = {}, {}
    for name, tensor in lm.model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:  # tied weights stay one tensor
            found[id(tensor)] = to_rank_0(tensor.detach())
        weights[name] = found[id(tensor)]
    return weights
