"""The device that a command runs on, the precision of its matrix products, and copies to the device."""

import ctypes
import math
import os
import sys

import torch

from data.lib.errors import Mistake


def pick_device(name):
    """The torch.device with this name; `auto` is cuda, then mps, then cpu. Mistake if the machine doesn't have it."""
    if name == "auto":
        name = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # under torchrun each process has its own
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError):  # a torch without CUDA raises the first
        raise Mistake(f"--device {name}: not on this machine") from None


def memory_of(device):
    """The bytes of memory that a device has; infinite if the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return math.inf


def release_memory():
    """Return freed memory to the system. Linux's C library would keep it, and a long run would grow."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # musl has none


def device_of(model):
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def send(device, *tensors):
    """Copy CPU tensors to a device without synchronising. A bool tensor is sent as the indices of its True values."""

    def copy(x):
        return x.contiguous().pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    return [tuple(map(copy, x.nonzero(as_tuple=True))) if x.dtype == torch.bool else copy(x) for x in tensors]


def autocast(device, dtype="auto"):
    """Run matrix products in dtype, which is then `fast_dtype`. auto: bfloat16 if that is fast, or float32."""
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cpu":
            fast = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
        dtype = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
