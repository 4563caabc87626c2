"""One run on several processes: torchrun --nproc_per_node N train_dpo.py ...

Each process has the whole model and computes a share of every step's examples. `total` adds up the
sums and the gradients of all ranks, and each rank divides them by the count of the whole step. So
all ranks make the same update, and N ranks with batches of B make the step of one process with
batches of N * B. (The big libraries take the mean of each rank's mean. Then a token counts more on
a rank that has fewer tokens.)

Only rank 0 writes files and prints. Without torchrun there is one rank, which has nothing to
exchange.

--fsdp is for a model that is too large for each device: `shard` leaves each rank a part of it. Each
decoder layer is gathered when it computes and freed again. The parts are DTensors, which know the
shape of the whole tensor. Files always hold whole tensors, so a checkpoint can be resumed on any
number of ranks, with --fsdp or without.
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
# In torch 2.7 4-bit weights can't be cut, and gradient norms are those of a part. 2.13 is tested.
CAN_SHARD = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
MESSAGE = 2**26  # gradients are exchanged in messages of at most so many numbers
SHARDED: list[PackedLM] = []  # the models that `shard` has cut
FILLER = [Example([0], [([0], [True])])]  # stands in for an empty batch
PATIENCE = timedelta(hours=1)  # for rank 0 to read the data; torchrun sees a dead rank at once


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Connect the processes that torchrun has started, and disconnect them at the end. An error on
    one rank ends the job: torchrun stops the others. If several ranks fail, for the same reason or
    because one is gone, only the first says why."""
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
        # Without this pause the job may hang. destroy_process_group holds Python's lock and waits
        # for gloo's threads, which need the lock to free their last message.
        time.sleep(0.2)
        dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        with contextlib.suppress(RuntimeError):  # the process that keeps the store may be gone
            if store.add("failed ranks", 1) > 1:
                raise Stopped(2 if isinstance(error, InputError) else 1) from None
        if isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)):
            why = "another process of the job has died; checkpoints are kept"
            raise InputError(f"rank {rank}: {why}") from None
        raise


def check_device(name: str) -> None:
    """InputError if not every rank can have the device that the flags ask for."""
    if WORLD > 1 and name not in ("cpu", "cuda", "auto"):
        raise InputError(f"--device {name}: torchrun's processes take cuda, one GPU each, or cpu")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if WORLD > 1 and name != "cpu" and 0 < gpus < here:
        raise InputError(f"--nproc_per_node {here}: more processes than GPUs ({gpus})")


def gather(thing) -> list:
    """-> every rank's `thing`, in the order of ranks. All ranks must call it together."""
    things = [thing] * WORLD
    if WORLD > 1:
        dist.all_gather_object(things, thing)
    return things


def once(do: Callable):
    """Call `do` on rank 0 only. -> what it returns there, on every rank."""
    if WORLD == 1:
        return do()
    result = [do() if RANK == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


def share(things: list, length: Callable = len) -> list:
    """The things of a list that this rank takes, in their order. All ranks have the same list. The
    longest is dealt first, each to the rank with the least so far, so all take about as long."""
    loads, mine = [0] * WORLD, []
    for i in sorted(range(len(things)), key=lambda i: -length(things[i])):
        rank = loads.index(min(loads))
        loads[rank] += length(things[i])
        if rank == RANK:
            mine.append(i)
    return [things[i] for i in sorted(mine)]


def rows(examples: list[Example], size: int, tokens: int) -> Batches:
    """This rank's share of the examples, in batches that fit in memory (train.fitting)."""
    return level(fitting(share(examples, lambda e: e.tokens), size, tokens))


def level(batches: Batches) -> Batches:
    """Add empty batches until each rank has as many, if a model is sharded. All ranks gather a
    layer together, so each must run the model equally often."""
    most = max(gather(len(batches))) if SHARDED else 0
    return batches + [[]] * (most - len(batches))


def joined(tensors: list[Tensor]) -> Tensor:
    """Concatenate the (n,) tensors of all ranks. KTO's z0 is a mean over the whole step."""
    if WORLD == 1:
        return torch.cat(tensors)
    device = tensors[0].device if tensors else None
    of_ranks = gather([t.tolist() for t in tensors])
    return torch.tensor([x for lists in of_ranks for xs in lists for x in xs], device=device)


def total(sums: Sums, parameters: list[nn.Parameter] = ()) -> Sums:
    """Add up the sums of all ranks, and, in place, the gradients of the parameters.

    A parameter without a gradient on any rank still has none. AdamW then skips it, as it does on
    one process.
    """
    if WORLD == 1:
        return sums
    sums = {name: (float(value), count) for name, (value, count) in sums.items()}
    for p in parameters:
        if is_part(p) and p.grad is not None:  # FSDP has already taken the mean over ranks
            p.grad *= WORLD
    replicas = [p for p in parameters if not is_part(p)]
    all_sums, has_gradient = zip(*gather((sums, [p.grad is not None for p in replicas])))
    somewhere = [p for p, on_rank in zip(replicas, zip(*has_gradient)) if any(on_rank)]
    for message in parts(somewhere, MESSAGE):
        add_gradients(message)
    sums_of_all: Sums = {}
    for sums in all_sums:
        add(sums_of_all, sums)
    return sums_of_all


def is_part(tensor: Tensor) -> bool:
    """Is the tensor a DTensor, this rank's part of a whole one? The class takes a second to import.
    If nobody has imported it, there is none."""
    kind = sys.modules.get("torch.distributed.tensor")
    return kind is not None and isinstance(tensor, kind.DTensor)


def add_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by the sum over all ranks, in a single message."""
    for p in parameters:
        if p.grad is None:  # this rank may have no example of the step
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(gradient.view_as(p))


def wait() -> None:
    """Wait until all ranks are here (a barrier)."""
    gather(None)


def shard(lm: PackedLM, device: torch.device) -> None:
    """Cut a model between the ranks with FSDP2 (torch's fully_shard), layer by layer.

    If all weights train, weights and AdamW's states are in fp32 and each rank has a part of both. A
    layer computes with gathered copies in `lm.autocast`, and its gradients are summed in fp32.

    With LoRA only frozen weights are cut, and the codes and scales of NF4. What trains is small:
    each rank has all of it. So `policy.reference` works as without --fsdp.
    """
    from torch.distributed.device_mesh import init_device_mesh  # takes a second to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    trained = {p for p in lm.parameters() if p.requires_grad}
    all_train = len(trained) == len(list(lm.parameters()))
    for module in [m for m in lm.modules() if isinstance(m, FrozenLinear)]:
        for name, buffer in [(n, b) for n, b in module.named_buffers() if b.dim()]:
            delattr(module, name)  # FSDP cuts parameters only
            module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    uncut = set() if all_train else trained
    for parameter in uncut:
        parameter.data = parameter.data.to(device)
    options = {"mesh": init_device_mesh(device.type, (WORLD,)), "ignored_params": uncut}
    compute = lm.autocast if all_train else None
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    for layer in lm.model.get_decoder().layers:
        fully_shard(layer, mp_policy=policy if compute else MixedPrecisionPolicy(), **options)
    fully_shard(lm, **options)  # embedding, last norm and head are gathered for the whole row
    lm.register_forward_pre_hook(_fill_empty_batch)
    lm.register_forward_hook(_drop_filler)
    SHARDED.append(lm)


def _fill_empty_batch(lm: PackedLM, args: tuple) -> tuple:
    """Let an empty batch run through the layers too: all ranks gather a layer together."""
    examples, *more = args
    return examples or FILLER, *more


def _drop_filler(lm: PackedLM, args: tuple, scores: Scores) -> Scores:
    """An empty batch has no scores."""
    return scores.take([]) if args[0] is FILLER else scores


def to_rank_0(tensor: Tensor) -> Tensor | None:
    """Gather a tensor from all ranks' parts, on the CPU of rank 0. All ranks must call it together.
    The others get None: a copy for each would fill the memory."""
    whole = tensor.full_tensor() if is_part(tensor) else tensor
    return None if RANK else whole.cpu()


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Cut a whole weight, or an optimizer's state of its shape, as `parameter` is cut. A tensor of
    another shape (AdamW's step) stays whole."""
    if is_part(parameter) and tensor.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        tensor = tensor.to(parameter.device)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


def whole_weights(lm: PackedLM) -> dict[str, Tensor] | None:
    """Name -> whole weight, on the CPU of rank 0, if all weights train and are sharded. Else None:
    the weights are whole already, or only the adapter is saved."""
    if lm not in SHARDED or not all(p.requires_grad for p in lm.parameters()):
        return None
    found, weights = {}, {}
    for name, tensor in lm.model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:  # tied weights stay one tensor
            found[id(tensor)] = to_rank_0(tensor.detach())
        weights[name] = found[id(tensor)]
    return weights
