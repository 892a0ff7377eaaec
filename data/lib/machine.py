"""Where a command runs, and in which precision."""

import ctypes
import os
import sys
from contextlib import suppress

import torch

from data.lib.errors import Mistake


def pick_device(name):
    """The torch.device called name; `auto` is cuda, then mps, then cpu. Mistake when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    with suppress(RuntimeError, KeyError):
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # torchrun: one for each process
        if there[device.type]:
            torch.empty(0, device=device)  # fails for a number that is not there, as in cuda:9
            return device
    raise Mistake(f"--device {name}: not on this machine; there is {', '.join(k for k in there if there[k])}")


def release_memory():
    """Give the system back what was needed for a while, which Linux's C library would keep, and pile up."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # musl's has none


def device_of(model):
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def send(device, *tensors):
    """Tensors of the CPU on a device, without waiting for it. A bool one arrives as the indices of what is
    True in it, a tuple: they index alike, and the device does not have to count them.
    """

    def there(tensor):
        if device.type != "cuda":
            return tensor.to(device)
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)

    return [
        tuple(map(there, tensor.nonzero(as_tuple=True))) if tensor.dtype == torch.bool else there(tensor)
        for tensor in tensors
    ]


def autocast(device, dtype="auto"):
    """Context in which matrix products run in dtype, its `fast_dtype`.

    auto: bfloat16 where the machine multiplies it faster than float32, which a CPU does with AMX or
    AVX-512 BF16 instructions and otherwise does not; float32 elsewhere.
    """
    if dtype == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capable = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot say
            fast = device.type == "cpu" and (capable.get("amx_bf16") or capable.get("avx512_bf16"))
        dtype = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
