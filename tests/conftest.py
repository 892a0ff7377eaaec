import signal
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "experiments"), str(TESTS / "stress")]
from digits_world import digits_world, in_digits_world  # noqa: E402, F401
from model_files import data_folder, merges, mistake, mixed_lines, originals, roberta, run, use  # noqa: E402, F401
from talks import squares, talk_folder  # noqa: E402, F401
from world import in_world, world  # noqa: E402, F401  fixtures

# A job in the background starts with Ctrl-C ignored, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

THERE = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


@pytest.fixture(params=THERE)
def device(request):
    if not THERE[request.param]:
        pytest.skip(f"no {request.param} on this machine")
    return torch.device(request.param)
