"""The optimizers and the learning rate."""

import math

import torch
from torch import Tensor, nn


def cosine_lr(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up, then a cosine down to peak / 10."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def parameter_groups(model: nn.Module, weight_decay: float, muon: bool) -> list[dict]:
    """Every trainable parameter in exactly one group: matrices decay, norm weights do not.

    With `muon`, matrices between activations go into a group that Muon updates; embeddings and the router,
    whose rows mean single tokens and experts, stay with AdamW.
    """
    matrices, others, vectors = [], [], []
    for name, parameter in model.named_parameters():  # a tied parameter comes once
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif "tok_embeddings" in name or "output" in name or name.endswith("gate.weight"):
            others.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "muon": muon},
        {"params": others, "weight_decay": weight_decay, "muon": False},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices with AdamW for the rest.

    A fused optimizer takes it on itself to skip a step whose float16 gradients overflowed; Muon leaves that to the
    GradScaler.
    """
    groups = parameter_groups(model, weight_decay, muon=name == "muon")
    device = next(model.parameters()).device.type
    cls = Muon if name == "muon" else torch.optim.AdamW
    return cls(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=cls is not Muon and device in ("cuda", "cpu"))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked `muon` are updated along the orthogonalized momentum instead.

    The update is scaled to the size AdamW's would have, so one learning rate and one weight decay serve both.
    Source: Jordan et al. 2024, "Muon"; Liu et al. 2025, "Muon is scalable for LLM training", equation 4.
    """

    momentum = 0.95

    @staticmethod
    def direction(momentum: Tensor) -> Tensor:
        """The orthogonalized momentum; FSDP, whose tensors are slices, puts its own in this place."""
        return orthogonalize(momentum)

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        loss = super().step(closure)
        self.param_groups = groups
        for group in groups:
            if not group["muon"]:
                continue
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
                ahead = parameter.grad.lerp(state["momentum"], self.momentum)  # Nesterov
                scale = 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(self.direction(ahead), alpha=-group["lr"] * scale)
        return loss


def has_bfloat16(device: torch.device) -> bool:
    """True where products of bfloat16 are hardware instructions: GPUs from sm80 on, CPUs with avx512_bf16 or amx_bf16.

    Elsewhere they are many times slower than those of float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return device.type == "cpu" and any(check is not None and check() for check in checks)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of the matrix's singular value decomposition, by Newton-Schulz iteration.

    Source: Jordan et al. 2024: the quintic with coefficients that bring singular values near 1 in five steps.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if has_bfloat16(matrix.device) else matrix.float()  # precise enough, and twice as fast
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide if x.shape[0] <= x.shape[1] else wide.T).type_as(matrix)
