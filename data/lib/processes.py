"""Lets several processes train one model: they have a rank and a world size, and share rows and tensors.

Each draws the whole batch from the same seed and computes some of its rows, so the result doesn't depend on world_size.
"""

import os
import sys
import time
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, because its default arguments would keep it alive
from torch.nn.parallel import DistributedDataParallel

from data.lib import errors
from data.lib.machine import device_of, send


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def command(main):
    """Run errors.command in all the processes that torchrun started. Only rank 0 prints to stdout."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return errors.command(main)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    try:
        errors.command(main)
    except RuntimeError as error:
        if "peer" in str(error):  # another process has died; torchrun reports why, and ends this one meanwhile
            time.sleep(30)
        raise
    finally:  # a thread of the group that still runs at the interpreter's shutdown could abort the process
        dist.destroy_process_group()
        time.sleep(0.1)


def gather(tensor):
    """Stack the tensors of all processes, which have the same shape: (world_size, ..). Every process has to call it."""
    if not dist.is_initialized():
        return tensor[None]
    tensors = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(tensors, tensor)
    return torch.stack(tensors)


def map_rows(function, *tensors):
    """Compute function(*tensors), (B, ..), for tensors with B rows, with each process doing some of the rows."""
    if not dist.is_initialized():
        return function(*tensors)
    B, n = len(tensors[0]), -(-len(tensors[0]) // world_size())
    rows = torch.arange(rank() * n, (rank() + 1) * n, device=tensors[0].device) % B  # the last process may repeat rows
    return gather(function(*(x[rows] for x in tensors)).contiguous()).flatten(0, 1)[:B]


def share_rows(loss_of, model, *tensors):
    """loss_of(model, *tensors), (B,), where each process computes the losses of some of the B rows."""
    return map_rows(lambda *rows: loss_of(model, *send(device_of(model), *rows)), *tensors)


def distribute(model, device, shard):
    """Wrap the model so that processes average gradients. shard: each process keeps a piece of each tensor."""
    if shard:
        from torch.distributed.fsdp import fully_shard  # takes half a second

        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # the logits are a view, which does no harm
        mesh = dist.init_device_mesh(device.type, (world_size(),))
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh)
        return model
    model.to(device)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model


@contextmanager
def gathered(model):
    """Context in which a sharded model's methods work, not only its forward, which gathers the pieces itself."""
    is_sharded = hasattr(model, "unshard")
    if is_sharded:
        model.unshard()
    yield
    if is_sharded:
        model.reshard()


def full(tensor):
    """The whole of a tensor, sharded or not. Every process has to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_on_rank_0(tensor):
    """Like `full`, but a sharded tensor is only returned on rank 0, on its CPU. The others get None."""
    if (whole := full(tensor)) is tensor:
        return tensor
    return None if rank() else whole.cpu()


def shard_like(tensor, like):
    """A whole tensor, sharded as `like` is if it has the same shape."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    # FSDP has imported dist.tensor.
    return dist.tensor.distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
