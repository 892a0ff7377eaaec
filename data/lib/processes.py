"""Several processes, which torchrun starts, and one model: what each has to know of the others.

Each draws the whole batch from the one seed and takes its share, so that levels stay stratified over the
batch and nothing depends on the number of processes. A process that is alone takes all of it.
"""

import os
import sys
import time
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which its defaults would keep alive: see together()
from torch.nn.parallel import DistributedDataParallel

from data.lib import errors
from data.lib.machine import device_of, send

# --- who is there --------------------------------------------------------------------------------


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def together():
    """Context in which the processes that torchrun started can talk to each other. The first alone prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    try:
        yield
    except RuntimeError as error:
        if "peer" in str(error):  # another process has died: torchrun says why, and ends this one
            time.sleep(30)
        raise
    finally:
        # A thread of the group that has a tensor left to free while the interpreter shuts down aborts the
        # process. These threads end here with the group; where fully_shard remembers it they get time.
        dist.destroy_process_group()
        time.sleep(0.1)


def total(tensor):
    """The sum over all processes, in each of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def share_rows(loss_of, model, *tensors):
    """loss_of(model, *tensors), (B,) on the model's device, of tensors with B rows. Each process computes
    some of the rows, and leaves the others 0, so that the sum over the processes has all of them.
    """
    device, B = device_of(model), len(tensors[0])
    losses, first = torch.zeros(B, device=device), rank() % B
    own = slice(first, None, size())
    # Every process makes a pass, because a sharded model needs them all; with few rows some passes repeat a
    # row.
    loss = loss_of(model, *send(device, *(tensor[own] for tensor in tensors)))  # (B / size,)
    if first == rank():
        losses[own] = loss
    return losses


def command(main):
    """errors.command, in all the processes that torchrun started."""
    with together():
        errors.command(main)


def agree(minutes, stopped):
    """The minutes of the first process, and whether any was told to stop: the same in each of them."""
    if not dist.is_initialized():
        return minutes, stopped
    said = torch.tensor([0.0 if rank() else minutes, float(stopped)], dtype=torch.float64)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return said[0].item(), bool(said[1])


# --- one model in several processes --------------------------------------------------------------
#
# DistributedDataParallel keeps all of the model in each process, fully_shard a piece of every tensor, which
# is then a DTensor. A checkpoint has whole tensors, whatever wrote it and whatever reads it.


def spread(model, device, shard):
    """What is called in place of a model, so that its gradients are the mean over the processes."""
    if shard:
        from torch.distributed.fsdp import fully_shard  # half a second

        # Logits without their padding are a view, which nothing changes before the backward pass has begun.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        mesh = dist.init_device_mesh(device.type, (size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    model.to(device)
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)  # no copy before the mean


def average(network, when):
    """Say whether the passes to come end with gradients that are means over the processes."""
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(when)
    network.require_backward_grad_sync = when  # as DistributedDataParallel calls it


def shared_out(function, x):
    """function(x), row by row of x (n, ...), with some of the rows in each process."""
    if not dist.is_initialized():
        return function(x)
    n = -(-len(x) // size())
    mine = torch.zeros_like(x[:1]).repeat(n, *[1] * (x.ndim - 1))  # the last ones have fewer, or none
    own = x[rank() * n : (rank() + 1) * n]
    mine[: len(own)] = own
    part = function(mine).contiguous()
    parts = [torch.empty_like(part) for _ in range(size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)[: len(x)]


def is_piece(tensor):
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """All of a tensor that is sharded or not. Every process has to ask."""
    return tensor.full_tensor() if is_piece(tensor) else tensor


def gathered(tensor):
    """All of a tensor: of one that is sharded in the first process alone, on the CPU; None in the others.
    Every process has to ask.
    """
    if not is_piece(tensor):
        return tensor
    tensor = tensor.full_tensor()
    return None if rank() else tensor.cpu()


def piece_of(tensor, like):
    """Of a whole tensor, what this process keeps, if it is sharded as `like` is; a DTensor then."""
    if not (is_piece(like) and torch.is_tensor(tensor) and tensor.shape == like.shape):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
