"""MaC: retrain the head on images whose unattended pixels are removed, or replaced by those of another class."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.spec import Recipe
from ..benchmark.task import Predictor, Task
from .blocks.grad_cam import predicted_cam
from .blocks.masks import combined, partners, removed, top_mask


@dataclass(frozen=True)
class Config:
    """`alpha` weighs the loss of masked images, `beta` that of combined ones; `share` of an image's pixels that its
    mask keeps (the paper's 15,000 of 224 x 224); `epochs` of the head, `lr` of its Adam, halved every five epochs, and
    its `batch_size`; `balanced` draws the classes equally."""

    alpha: float = 2.0
    beta: float = 3.0
    share: float = 0.299
    epochs: int = 10
    lr: float = 5e-3
    batch_size: int = 32
    balanced: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            require(getattr(self, name) >= 0, f"mac.{name} must be at least 0, got {getattr(self, name)}")
        require(0 <= self.share <= 1, f"mac.share must be in [0, 1], got {self.share}")
        require(self.epochs >= 1, f"mac.epochs must be at least 1, got {self.epochs}")
        require(self.lr > 0, f"mac.lr must be positive, got {self.lr}")
        require(self.batch_size >= 2, f"mac.batch_size must be at least 2, got {self.batch_size}")


@method(
    "mac",
    paper="HosseiniNoohdani et al., Mitigating Spurious Correlation in Images by Intervention",
    requires=Requires(native="select"),
    config=Config,
)
class MaC:
    """`CE(X) + alpha CE(m X + (1 - m) b) + beta CE(m_i X_i + (1 - m_i)(1 - m_j) X_j + (1 - m_i) m_j b)`, head only.

    X are train images under the block's augmentation, m the pixels with the highest XGrad-CAM of the class that the
    block's ERM (its last epoch) predicts for the very view, b the batch's mean colour, j a random image of another
    class. Trunk and neck stay in evaluation mode, their BatchNorm and dropout too; the head starts anew. Where the
    paper is silent (whose map, which class, the head's start, the partner in a batch of one class) its successor's
    early code decides. Deviations: the epoch is selected by the rung, alpha and beta are not tuned on group labels,
    `balanced` draws with replacement (there the larger class is undersampled once). Not offered: BatchNorm in training
    mode, as in that code.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """ERM, then its head."""
        config = self.config
        recipe = replace(
            task.recipe,
            optimizer="adam",
            lr=config.lr,
            weight_decay=0.0,
            batch_size=config.batch_size,
            epochs=config.epochs,
            schedule="constant",
        )
        return task.train(Head(config), stage="head", recipe=recipe, start=task.erm())


class Head(Objective[Config]):
    """The loss of the original, the masked and the combined images, for the head of a frozen network."""

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model.eval())
        self.sampler = "class" if self.config.balanced else "random"
        fresh: nn.Linear = skip_init(nn.Linear, model.feature_dim, model.num_classes)  # type: ignore[no-untyped-call]
        with task.seeded("mac head"):
            nn.init.xavier_uniform_(fresh.weight)
        nn.init.zeros_(fresh.bias)
        self.erm = Backbone(model.name, model.trunk, model.neck, model.head, grad_cam=model.grad_cam)
        model.head = fresh.to(task.device)

    def networks(self) -> dict[str, nn.Module]:
        return {"head": self.model.head}

    def lr_factor(self, recipe: Recipe, epoch: float) -> float:
        return float(0.5 ** (epoch // 5))

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch.x, batch.y
        features, heat = predicted_cam(self.erm, x)
        mask, fill = top_mask(heat, (x.shape[2], x.shape[3]), self.config.share), x.mean((0, 2, 3), keepdim=True)
        loss = F.cross_entropy(self.model.head(features), y)
        if self.config.alpha:
            loss = loss + self.config.alpha * self.head_loss(removed(x, mask, fill), y)
        if self.config.beta:
            loss = loss + self.config.beta * self.head_loss(combined(x, mask, partners(y), fill), y)
        return loss

    def head_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of images, with a graph of the head only."""
        with torch.no_grad():
            features = self.model.features(x)
        return F.cross_entropy(self.model.head(features), y)
