"""Weights of clusters by their size and by how hard they are, from a bank of every image's last loss.

BPA (Seo et al., CVPR 2022) and ClusterFix (Capitani et al., WACV 2024, eq. 4-5 and 8): omega_k moves towards s_k / N_k,
with N_k the size of cluster k and s_k the mean of its images' losses.
"""

from typing import Any

import torch
from torch import Tensor

EVERY = 10
"""Steps between two updates of omega, as in BPA's released code."""


class ClusterWeights:
    """Bank of losses (n,) and weights omega (G,) of clusters (n,), numbered from 0 without a gap.

    Every ten steps `omega <- (1 - momentum) omega + momentum s / N`, from 1 / N at first; with `by_size` off it is s
    itself that omega moves towards, from 1. Nothing moves until every image has a loss, so that s is always the mean
    over the whole cluster: the first epoch weighs by size alone. `cap` bounds omega at so many times its mean (0: not).
    """

    def __init__(self, cluster: Tensor, *, momentum: float, by_size: bool = True, cap: float = 0.0) -> None:
        self.cluster, self.momentum, self.cap = cluster, momentum, cap
        self.sizes = cluster.bincount().float()
        self.divisor = self.sizes if by_size else torch.ones_like(self.sizes)
        self.omega = 1 / self.divisor
        self.bank = torch.full((len(cluster),), -1.0, device=cluster.device)
        """Losses, -1 where an image has not been seen."""
        self.steps = 0

    def of(self, index: Tensor) -> Tensor:
        """Weights (B,) of images, with mean 1 in the batch."""
        omega = self.omega.clamp(max=self.cap * self.omega.mean()) if self.cap else self.omega
        return mean_one(omega[self.cluster[index]])

    def remember(self, index: Tensor, losses: Tensor) -> None:
        """Keep a batch's losses (B,), and update omega if it is time."""
        self.bank[index] = losses.detach().float()
        self.steps += 1
        if self.steps % EVERY == 0:
            self.update()

    def update(self) -> None:
        """Move omega, if every image has been seen; the device decides that, so that nothing waits."""
        means = torch.zeros_like(self.omega).index_add(0, self.cluster, self.bank) / self.sizes
        moved = self.omega.lerp(means / self.divisor, self.momentum)
        self.omega = torch.where((self.bank >= 0).all(), moved, self.omega)

    def state_dict(self) -> dict[str, Any]:
        """All that a restart needs."""
        return {"bank": self.bank, "omega": self.omega, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.bank, self.omega = (state[name].to(self.cluster.device) for name in ("bank", "omega"))
        self.steps = state["steps"]


def mean_one(weights: Tensor) -> Tensor:
    """Weights (B,) scaled to mean 1; they stay 0 where all of them are."""
    return weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)
