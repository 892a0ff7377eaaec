import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

THERE = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


@pytest.fixture(params=THERE)
def device(request):
    if not THERE[request.param]:
        pytest.skip(f"no {request.param} on this machine")
    return torch.device(request.param)
