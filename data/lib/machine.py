"""The device that a command runs on, the precision of its matrix products, and copies to the device."""

import ctypes
import os
import sys
from contextlib import suppress

import torch

from data.lib.errors import Mistake


def pick_device(name):
    """The torch.device with this name; `auto` is cuda, then mps, then cpu. Mistake if the machine doesn't have it."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind in there if there[kind]]
    name = there[0] if name == "auto" else name
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # under torchrun each process has its own
    with suppress(RuntimeError):
        if name.split(":")[0] in there:
            return torch.empty(0, device=name).device
    raise Mistake(f"--device {name}: not on this machine, which has {', '.join(there)}")


def release_memory():
    """Give freed memory back to the system. Linux's C library would keep it, and it would pile up."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # musl has no malloc_trim


def device_of(model):
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def send(device, *tensors):
    """Copy CPU tensors to a device without synchronising. A bool tensor arrives as the indices of its True elements.

    These index in the same way, and the device doesn't have to count them, which would synchronise.
    """

    def copy(tensor):
        tensor = tensor.contiguous().pin_memory() if device.type == "cuda" else tensor
        return tensor.to(device, non_blocking=device.type == "cuda")

    return [tuple(map(copy, x.nonzero(as_tuple=True))) if x.dtype == torch.bool else copy(x) for x in tensors]


def autocast(device, dtype="auto"):
    """Context in which matrix products run in dtype, which is its `fast_dtype`.

    auto: bfloat16 if the machine multiplies it faster than float32. A CPU needs AMX or AVX-512 BF16 for that.
    """
    if dtype == "auto":
        cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = cpu.get("amx_bf16") or cpu.get("avx512_bf16")
        fast = fast or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
        dtype = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
