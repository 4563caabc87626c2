"""Several processes, one run: torchrun --nproc_per_node N train_dpo.py ...

Each process, a RANK of WORLD, holds the whole model and takes a share of every step's examples. A
step may be cut between ranks anywhere, because losses are sums and the divisor is the whole
step's: what the ranks have summed and their gradients meet in `total`, and since all of them then
do the same arithmetic their weights stay equal. So N ranks with batches of B take the step of one
process with batches of N * B. (The big libraries average within each rank and then the averages,
which gives a token more weight on the rank that has fewer of them.)

Rank 0 alone writes and speaks. With --fsdp no rank has the whole model: shards.py. Without torchrun
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
from nanoalign.logps import PackedLM
from nanoalign.packing import Example
from nanoalign.train import Batches, Sums, add, fitting

# Did torchrun start this process? Other launchers set some of these variables too.
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
RANK, WORLD = [int(os.environ[n]) for n in ("RANK", "WORLD_SIZE")] if LAUNCHED else (0, 1)
# torch 2.7 cuts no 4-bit weights, and tells a part's gradient norm for the whole's; 2.13 was tried.
CAN_SHARD = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
MESSAGE = 2**26  # numbers: gradients travel in messages of up to so many, LoRA's in a single one
SHARDED: list[PackedLM] = []  # the models of which each rank has a part (shards.py)
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
