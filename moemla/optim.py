"""Optimizers: Muon for the matrices of the blocks, AdamW for the rest; and the learning rate's course.

Muon (Jordan 2024) replaces a matrix's momentum by the nearest matrix with all singular values equal. Each expert is a
matrix of its own. The step is scaled by 0.2 sqrt(max(rows, columns)), so that its root mean square is that of an AdamW
step and one rate serves both (Liu et al. 2025, arXiv 2502.16982). Built in chapter 5.
"""

import math
from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moemla.moe import MixtureOfExperts
from moemla.routing import Router

# The quintic a x + b x^3 + c x^5, iterated five times, brings singular values from (0, 1] to about [0.7, 1.2] (Jordan
# 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Float[Tensor, "n rows columns"], steps: int = 5) -> Float[Tensor, "n rows columns"]:
    """Each matrix with its singular values brought near one, by Newton-Schulz steps on all of them at once."""
    a, b, c = NEWTON_SCHULZ
    x = matrices
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT  # the Gram matrix of the shorter side
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for parameters of 2 dimensions (a matrix) or 3 (a stack of matrices)."""

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. ValueError for a parameter that is no matrix.

        A `closure` is called first, with gradients on; what it returns, the loss, is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape are treated together
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"parameter.shape={tuple(parameter.shape)}: Muon takes matrices")
                alike[(parameter.shape[-2:], parameter.dtype, parameter.device)].append(parameter)
            for (shape, *_), parameters in alike.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    update = parameter.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's look ahead
                    updates.append(_matrices(update).reshape(-1, *shape))
                stacked = orthogonalise(torch.cat(updates))
                scale = 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, stacked.split([len(u) for u in updates]), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    _local(parameter).add_(_part(update, parameter), alpha=-group["lr"] * scale)
        return loss


def _cut(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which a rank holds a part: FSDP2's."""
    return hasattr(tensor, "to_local")


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be cut."""
    return tensor.to_local() if _cut(tensor) else tensor


def _cut_between(tensor: Tensor) -> bool:
    """Whether a cut tensor is a stack that is cut between its matrices: this rank's are whole."""
    return tensor.dim() == 3 and all(place.is_shard(0) for place in tensor.placements)


def _matrices(update: Tensor) -> Tensor:
    """Whole matrices of an update: those here, where it is cut between them; else all, gathered on every rank."""
    if not _cut(update):
        return update
    return update.to_local() if _cut_between(update) else update.full_tensor()


def _part(update: Tensor, parameter: Tensor) -> Tensor:
    """What of the whole matrices `update` is this rank's part of the parameter."""
    if _cut(parameter) and not _cut_between(parameter):
        from torch.distributed.tensor import distribute_tensor

        whole = update.view(parameter.shape)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return update.view_as(_local(parameter))


def parameter_groups(model: nn.Module, weight_decay: float) -> tuple[list[nn.Parameter], list[dict]]:
    """(matrices of the blocks, AdamW groups for the rest).

    The rest: token and position tables, head, routers (weight decay as given), norms and biases (no weight decay). Of a
    model that is not from here, the matrices are those of its `blocks` and of every MixtureOfExperts. It may be wrapped
    (DDP, torch.compile, FSDP2). ValueError for FSDP1, which flattens matrices.
    """
    matrices, decayed, plain = [], [], []
    routers, experts = (
        {parameter for module in model.modules() if isinstance(module, kind) for parameter in module.parameters()}
        for kind in (Router, MixtureOfExperts)
    )
    for name, parameter in model.named_parameters():
        path = name.split(".")  # wrappers put names of their own in front and between
        if "_fsdp_wrapped_module" in path:
            raise ValueError("model: FSDP1 flattens its matrices; wrap it by torch.distributed.fsdp.fully_shard")
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            plain.append(parameter)
        elif ("blocks" in path or parameter in experts) and not ("router" in path or parameter in routers):
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    rest = [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]
    return matrices, [group for group in rest if group["params"]]


def make_optimizers(
    model: nn.Module,
    optimizer: str = "muon",
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[torch.optim.Optimizer]:
    """["muon": Muon for the blocks' matrices and AdamW for the rest] or ["adamw": AdamW for all].

    ValueError where the one asked for has nothing to train.
    """
    matrices, rest = parameter_groups(model, weight_decay)
    if not matrices and not rest:
        raise ValueError("model: all its parameters are frozen")
    if optimizer == "adamw":
        groups = [dict(params=matrices, weight_decay=weight_decay), *rest]
        return [torch.optim.AdamW(_by_mesh(groups), lr=lr, betas=betas, fused=True)]
    if optimizer == "muon" and not matrices:
        raise ValueError("optimizer='muon': the model has no `blocks` and no MixtureOfExperts to train; choose 'adamw'")
    if optimizer == "muon":
        adam = [torch.optim.AdamW(_by_mesh(rest), lr=lr, betas=betas, fused=True)] if rest else []
        return [Muon(matrices, lr=lr, weight_decay=weight_decay), *adam]
    raise ValueError(f"optimizer={optimizer!r}: choose 'muon' or 'adamw'")


def _by_mesh(groups: list[dict]) -> list[dict]:
    """The groups, parted so that each holds tensors of one mesh of ranks (or of none): a fused step takes no others."""
    parted = []
    for group in groups:
        meshes = defaultdict(list)
        for parameter in group["params"]:
            meshes[getattr(parameter, "device_mesh", None)].append(parameter)
        parted += [group | {"params": parameters} for parameters in meshes.values()] or [group]
    return parted


def learning_rate(step: int, *, lr: float, min_lr: float, warmup: int, steps: int) -> float:
    """Linear over `warmup` steps, from lr / warmup to lr, then half a cosine to min_lr at `steps` (section 3.3)."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))
