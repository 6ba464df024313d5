"""Splits of a class on which a classifier's risk is least stable, found by a small network on frozen features (PGI).

Ahmed et al., Systematic Generalisation with Group Invariant Predictions, ICLR 2021, with the released constants.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

WIDTHS = (64, 32, 21)
STEPS = 100
LR = 1e-4
BATCH = 512
TEMPERATURE = 10.0


def partition(features: Tensor, logits: Tensor, y: Tensor, kappa: float) -> Tensor:
    """Side (n,) of every image, True for the one of the larger mean cross-entropy in its class.

    Of features (n, d), logits (n, K) and labels (n,). A class that its network leaves in one piece is all False.
    Weights and batches are drawn from torch's generator.
    """
    losses = F.cross_entropy(logits, y, reduction="none")
    slopes = scale_slopes(logits, y)
    side = torch.zeros(len(y), dtype=torch.bool)
    for label in torch.unique(y):
        rows = (y == label).nonzero()[:, 0]
        net = trained(features[rows], losses[rows], slopes[rows], kappa)
        with torch.no_grad():
            side[rows] = costlier(net.eval()(features[rows])[:, 0] > 0, losses[rows])
    return side


def trained(features: Tensor, losses: Tensor, slopes: Tensor, kappa: float) -> nn.Module:
    """A partition network after its steps of Adam towards the largest instability, on images of one class."""
    net = network(features.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), lr=LR, maximize=True)
    for _ in range(STEPS):
        rows = torch.randperm(len(features))[:BATCH]
        alpha = 0.5 * (1 + torch.tanh(net(features[rows])[:, 0] / TEMPERATURE))
        optimizer.zero_grad(set_to_none=True)
        instability(alpha, losses[rows], slopes[rows], kappa).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net


def network(features: int) -> nn.Sequential:
    """One output (B, 1) of features (B, d): three layers, each with a layer norm, and one more."""
    layers: list[nn.Module] = []
    for inputs, width in pairwise((features, *WIDTHS)):
        layers += [linear(inputs, width), nn.LayerNorm(width), nn.ReLU()]
    return nn.Sequential(*layers, linear(WIDTHS[-1], 1, bias=False))


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    """A linear layer under spectral norm."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.constant_(layer.bias, 0.01)
    return spectral_norm(layer)


def scale_slopes(logits: Tensor, y: Tensor) -> Tensor:
    """`d CE(s * z, y) / ds_k` at s = 1 (n, K), s being a factor for every logit: `(p_k - [y = k]) z_k`."""
    return (logits.softmax(1) - F.one_hot(y, logits.shape[1])) * logits


def instability(alpha: Tensor, losses: Tensor, slopes: Tensor, kappa: float) -> Tensor:
    """`(R_1 + R_2 + kappa (G_1 + G_2)) / 2` for the weights alpha (B,) of side 1, 1 - alpha being those of side 2.

    R is the weighted mean of losses (B,), G the squared length of the weighted mean of slopes (B, K).
    """
    weights = torch.stack([alpha, 1 - alpha])
    weights = weights / weights.sum(1, keepdim=True)
    return ((weights @ losses).sum() + kappa * (weights @ slopes).square().sum()) / 2


def costlier(side: Tensor, losses: Tensor) -> Tensor:
    """The sides (n,) of a class, swapped unless True has the larger mean of losses (n,); all False if one is empty."""
    if side.all() or not side.any():
        return torch.zeros_like(side)
    return side if losses[side].mean() >= losses[~side].mean() else ~side
