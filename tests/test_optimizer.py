"""Muon equals torch's, takes the layers' matrices, and multiplies in the precision of the run."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import ATTENTIONS, rng, tiny_model

from data.lib.flags import Span
from data.lib.optimizer import Muon, orthogonalised
from data.lib.training import Run
from sample import denoise
from train import TrainConfig, draw_batch, update

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (24, 8)]


def optimise(optimizer_of, steps=4):
    """Matrices after some steps on random gradients, with weight decay."""
    matrices = [torch.randn(shape, generator=rng(i)).requires_grad_() for i, shape in enumerate(SHAPES)]
    optimizer = optimizer_of(matrices)
    for step in range(steps):
        for i, p in enumerate(matrices):
            p.grad = torch.randn(p.shape, generator=rng(100 * step + i))
        optimizer.step()
    starts = [torch.randn(shape, generator=rng(i)) for i, shape in enumerate(SHAPES)]
    return torch.cat([(p.detach() - start).flatten() for p, start in zip(matrices, starts)])


def torch_muon(matrices):
    return torch.optim.Muon(matrices, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float32, 0.02)])
def test_muon_is_that_of_torch(dtype, tolerance):
    """torch computes in bfloat16, so they differ by rounding."""
    expected = optimise(torch_muon)
    moved = optimise(lambda matrices: Muon(matrices, 0.1, 0.1, dtype))
    assert (moved - expected).norm() < tolerance * expected.norm()


def test_muon_s_steps_are_nearly_orthogonal():
    """Their singular values are near 1, whatever those of the gradient, tall or wide (2502.16982, sec. 2.1)."""
    for shape in ((2, 16, 16), (2, 16, 40), (2, 40, 16)):
        x = torch.randn(shape, generator=rng()) * torch.tensor([1.0, 1e-6])[:, None, None]
        values = torch.linalg.svdvals(orthogonalised(x, torch.float32))
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_muon_takes_the_layers_matrices_and_adamw_the_rest():
    model = tiny_model()
    adamw, muon = Run(TrainConfig(max_iters=1), model, torch.device("cpu")).optimizer.parts
    matrices = {id(p) for p in muon.param_groups[0]["params"]}
    assert matrices == {id(p) for p in model.layers.parameters() if p.ndim == 2}
    decayed, not_decayed = adamw.param_groups
    assert not_decayed["weight_decay"] == 0
    assert all(p.ndim == 1 for p in not_decayed["params"])
    assert len(decayed["params"]) + len(not_decayed["params"]) + len(matrices) == len(list(model.parameters()))


class Products(TorchDispatchMode):
    """Notes the precision in which each matrix product, convolution and attention is computed."""

    names = "mm", "addmm", "bmm", "baddbmm", "addbmm", "linear", "matmul", "dot", "mv", "addmv"
    names += "convolution", "convolution_backward"

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._overloadpacket.__name__
        if name in self.names or "scaled_dot_product" in name:
            self.seen.setdefault(args[0].dtype, set()).add(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_every_product_is_in_the_precision_of_the_run(attention, dtype, optimizer, dropout):
    """This includes the optimizer and sampling. Another precision can take a hundred times as long."""
    model = tiny_model(V=8, T=16, dropout=dropout, **attention)
    config = TrainConfig(batch_size=4, context=16, max_iters=9, dtype=dtype, optimizer=optimizer, prompt_len=Span(0, 3))
    run = Run(config, model.train(), torch.device("cpu"))
    with Products() as training:
        update(run, draw_batch(np.arange(200, dtype=np.uint16) % 8, config, rng(), model.config))
    with Products() as sampling, run.precision:
        list(denoise(model.eval(), torch.full((2, 16), 8), 4, "confidence"))
    assert {*training.seen} == {*sampling.seen} == {getattr(torch, dtype)}
    everything = set().union(*training.seen.values())
    assert {"mm", "convolution", "convolution_backward"} <= everything
    assert ("baddbmm" in everything) == (optimizer == "muon")
