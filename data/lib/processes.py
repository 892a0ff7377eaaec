"""Several processes that train one model: rank and world size, sums over all processes, sharded tensors.

torchrun starts them. Each draws the whole batch from the same seed and computes its share of the rows. So levels stay
stratified over the batch, and the result doesn't depend on the number of processes.
"""

import os
import sys
import time
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which its default arguments would keep alive
from torch.nn.parallel import DistributedDataParallel

from data.lib import errors
from data.lib.machine import device_of, send


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group():
    """Context in which the processes that torchrun started can communicate. Only rank 0 prints to stdout."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    try:
        yield
    except RuntimeError as error:
        if "peer" in str(error):  # another process has died; torchrun reports why, and ends this one meanwhile
            time.sleep(30)
        raise
    finally:  # a thread of the group that still runs at the interpreter's shutdown could abort the process
        dist.destroy_process_group()
        time.sleep(0.1)


def command(main):
    """Run errors.command in all the processes that torchrun started."""
    with process_group():
        errors.command(main)


def all_reduce_sum(tensor):
    """Sum a tensor over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def agree(minutes, stopped):
    """The minutes of rank 0, and whether any process was told to stop: the same in every process."""
    said = torch.tensor([0.0 if rank() else minutes, float(stopped)], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(said, dist.ReduceOp.MAX)
    return said[0].item(), bool(said[1])


def map_rows(function, *tensors):
    """function(*tensors), (B, ..), of tensors with B rows each, where each process computes some of the rows."""
    if not dist.is_initialized():
        return function(*tensors)
    B, n = len(tensors[0]), -(-len(tensors[0]) // world_size())  # n rows for each process, with zeros at the end
    padded = [torch.cat((x, x.new_zeros(n * world_size() - B, *x.shape[1:]))) for x in tensors]
    part = function(*(x[rank() * n : (rank() + 1) * n] for x in padded)).contiguous()
    parts = [torch.empty_like(part) for _ in range(world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)[:B]


def share_rows(loss_of, model, *tensors):
    """loss_of(model, *tensors), (B,), where each process computes the losses of some of the B rows."""
    return map_rows(lambda *rows: loss_of(model, *send(device_of(model), *rows)), *tensors)


def distribute(model, device, shard):
    """Return what to call in place of the model, so that gradients are averaged over the processes.

    shard: each process keeps a piece of every tensor, a DTensor, instead of the whole model.
    """
    if shard:
        from torch.distributed.fsdp import fully_shard  # takes half a second

        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # the logits are a view, which does no harm
        mesh = dist.init_device_mesh(device.type, (world_size(),))
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh)
        return model
    model.to(device)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model


def synchronise_gradients(network, when):
    """Set whether the next backward passes average the gradients over the processes."""
    if hasattr(network, "set_requires_gradient_sync"):  # fully_shard
        network.set_requires_gradient_sync(when)
    network.require_backward_grad_sync = when  # DistributedDataParallel


def full(tensor):
    """The whole of a tensor, sharded or not. Every process has to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_on_rank_0(tensor):
    """The same, but only rank 0 gets a sharded tensor, on its CPU. The others get None."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    tensor = tensor.full_tensor()
    return None if rank() else tensor.cpu()


def shard_like(tensor, like):
    """A whole tensor, sharded as `like` is if it has the same shape."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
