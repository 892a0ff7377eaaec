"""Muon, and the optimizers of a run, used like one."""

from collections import defaultdict

import torch

from data.lib.processes import gathered, piece_of, shared_out, whole


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is a matrix with singular values near 1 (Jordan 2024; 2502.16982).

    The step's size is that of AdamW's (2502.16982, eq. 4), so one learning rate serves both. This is
    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" but for two things: products are in `dtype`, the
    run's own, where torch's are in bfloat16, which a CPU without instructions for it multiplies a
    hundred times slower; and matrices of one shape are one product, or one in each process.
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for (A, B), matrices in alike.items():
                for p in matrices:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                averages = [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(averages, [p.grad for p in matrices], 1 - group["momentum"])
                ahead = [p.grad.lerp(x, group["momentum"]) for p, x in zip(matrices, averages)]  # Nesterov's
                ahead = torch.stack([whole(x) for x in ahead])
                updates = shared_out(lambda x: orthogonalised(x, self.dtype), ahead)
                updates = [piece_of(update, p) for update, p in zip(updates, matrices)]
                size = 0.2 * max(A, B) ** 0.5  # so that the root of the mean square is some 0.2, as AdamW's
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates, alpha=-group["lr"] * size)


class Optimizers:
    """Muon on the layers' matrices and AdamW on everything else, or AdamW on everything, used like one
    optimizer.
    """

    def __init__(self, model, config, dtype):
        matrices = [p for p in model.layers.parameters() if p.ndim == 2 and config.optimizer == "muon"]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.parts = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)]
        if matrices:
            self.parts += [Muon(matrices, config.lr, config.weight_decay, dtype)]

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self):
        return [with_state(part.state_dict(), gathered) for part in self.parts]

    def load(self, states):
        """Take the state of earlier ones, but the hyperparameters of these. ValueError if they don't fit."""
        for part, saved in zip(self.parts, states, strict=True):
            groups = part.state_dict()["param_groups"]
            if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved["param_groups"]]:
                raise ValueError("another optimizer had them")
            saved = {"state": saved["state"], "param_groups": groups}
            parameters = [p for group in part.param_groups for p in group["params"]]
            for i, kept in saved["state"].items():
                shape = dict.fromkeys(kept, parameters[i].shape) | {"step": ()}
                if any(tensor.shape != shape[name] for name, tensor in kept.items()):
                    raise ValueError("an optimizer's state is not of its parameter's shape")
            part.load_state_dict(with_state(saved, piece_of, parameters))


def with_state(saved, function, parameters=None):
    """An optimizer's state_dict with function(tensor), or function(tensor, parameter), for each tensor."""
    state = {
        i: {name: function(tensor, *([parameters[i]] if parameters else [])) for name, tensor in kept.items()}
        for i, kept in saved["state"].items()
    }
    return {**saved, "state": state}


def orthogonalised(x, dtype):
    """Matrices x (n, A, B) with all their singular values moved to about 1, in dtype, by five steps of a
    polynomial that has its steepest rise at 0 (Newton and Schulz; coefficients of Jordan 2024).
    """
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = wide @ wide.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, gram, wide, beta=3.4445)
    return wide if x.shape[1] <= x.shape[2] else wide.mT
