"""Muon, and the pair of Muon and AdamW that train.py uses like one optimizer."""

from collections import defaultdict

import torch

from data.lib.processes import full, full_on_rank_0, map_rows, shard_like


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps, scaled so that AdamW's learning rate fits (Jordan 2024; 2502.16982 eq. 4)."""

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype  # torch.optim.Muon always takes bfloat16, which can be a hundred times slower on a CPU

    @torch.no_grad()
    def step(self):
        (group,), by_shape = self.param_groups, defaultdict(list)
        for p in group["params"]:
            by_shape[p.shape].append(p)
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        for (A, B), matrices in by_shape.items():
            averages = [self.state[p]["momentum_buffer"] for p in matrices]
            torch._foreach_lerp_(averages, [p.grad for p in matrices], 1 - group["momentum"])
            nesterov = [full(p.grad.lerp(x, group["momentum"])) for p, x in zip(matrices, averages)]
            updates = map_rows(lambda x: orthogonalised(x, self.dtype), torch.stack(nesterov))  # (n, A, B)
            updates = [shard_like(update, p) for update, p in zip(updates, matrices)]
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, updates, alpha=-group["lr"] * 0.2 * max(A, B) ** 0.5)  # RMS about 0.2


def orthogonalised(x, dtype):
    """Move all singular values of matrices x (n, A, B) to about 1, by five Newton-Schulz steps (Jordan 2024)."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = wide @ wide.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, gram, wide, beta=3.4445)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


class Optimizers:
    """Muon for the matrices of layers and drafter, and AdamW for the rest, or AdamW for everything."""

    def __init__(self, model, config, dtype):
        trained, inner = [p for p in model.parameters() if p.requires_grad], {*model.layers.parameters()}
        inner |= {*model.drafter.parameters()} if model.drafter is not None else set()
        matrices = [p for p in trained if p in inner and p.ndim == 2 and config.optimizer == "muon"]
        rest = [p for p in trained if not any(p is matrix for matrix in matrices)]
        decayed, biases = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": biases, "weight_decay": 0.0}]
        self.parts = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)]
        if matrices:
            self.parts += [Muon(matrices, config.lr, config.weight_decay, dtype)]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def state(self):
        """The state of each optimizer, by parameter number, unsharded. Every process has to call it."""
        states = [part.state_dict()["state"].items() for part in self.parts]
        return [{i: {k: full_on_rank_0(x) for k, x in kept.items()} for i, kept in state} for state in states]

    def load(self, states):
        """Continue from what `state` returned, but with the present hyperparameters. ValueError if it doesn't fit."""
        for part, state in zip(self.parts, states, strict=True):
            parameters = [p for group in part.param_groups for p in group["params"]]
            for i, kept in state.items():
                p = parameters[i]
                adamw = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                expected = {"momentum_buffer": p.shape} if isinstance(part, Muon) else adamw
                if {name: x.shape for name, x in kept.items()} != expected:
                    raise ValueError("the state of an optimizer doesn't fit its parameters")
                part.state[p] = {name: shard_like(x.to(p.device, p.dtype), p) for name, x in kept.items()}
