"""MaC: retrain the head on images whose unattended pixels are removed, or replaced by those of another class."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.optim import Optimizer

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective, make_optimizer
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.spec import Recipe
from ..benchmark.task import Predictor, Task
from .blocks.grad_cam import predicted_cam
from .blocks.masks import combined, partners, patch_mask, removed, top_mask

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Config:
    """`alpha` weighs the loss of masked images, `beta` that of combined ones; `share` of an image's pixels that its
    mask keeps (the paper's 15,000 of 224 x 224); `mask` keeps single pixels, or whole patches of a seventh of the side
    (`patch32`); with `bn` = train BatchNorm normalises by the batch of original, masked and combined images, and adapts
    its statistics to them; `epochs` of the head, `lr` of its Adam, halved every five epochs, and its `batch_size`;
    `balanced` draws the classes equally."""

    alpha: Annotated[float, Search("{2,0,1,3}")] = 2.0
    beta: Annotated[float, Search("{3,0,1,2,4,5}")] = 3.0
    share: float = 0.299
    mask: Literal["pixel", "patch32"] = "pixel"
    bn: Literal["eval", "train"] = "eval"
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
    early code decides; `bn=train` and `mask=patch32` are that code's ways too, but the paper speaks of pixels, and of
    training the last layer. Deviations: the epoch is selected by the rung, alpha and beta are not tuned on group
    labels, `balanced` draws with replacement (there the larger class is undersampled once); an image set whose weight
    is 0 is not forwarded, so under `bn=train` it leaves no trace in the statistics; dropout is off there as well.
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
        self.adapts = self.config.bn == "train" and any(isinstance(layer, NORMS) for layer in model.modules())
        if self.adapts:  # maps are those of statistics that stay
            self.erm = task.network(model.num_classes, "mac erm")
            self.erm.load_state_dict(model.state_dict())
            self.erm.eval()
        else:
            self.erm = Backbone(model.name, model.trunk, model.neck, model.head, grad_cam=model.grad_cam)
        fresh: nn.Linear = skip_init(nn.Linear, model.feature_dim, model.num_classes)  # type: ignore[no-untyped-call]
        with task.seeded("mac head"):
            nn.init.xavier_uniform_(fresh.weight)
        nn.init.zeros_(fresh.bias)
        model.head = fresh.to(task.device)

    def networks(self) -> dict[str, nn.Module]:
        norms = [layer for layer in self.model.modules() if isinstance(layer, NORMS)] if self.adapts else []
        # Not to be optimised: here the engine puts them in training mode, and their statistics survive a restart.
        return {"head": self.model.head} | ({"norms": nn.ModuleList(norms)} if norms else {})

    def optimizers(self, recipe: Recipe) -> dict[str, Optimizer]:
        return {"head": make_optimizer(self.model.head.parameters(), recipe)}

    def lr_factor(self, recipe: Recipe, epoch: float) -> float:
        return float(0.5 ** (epoch // 5))

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch.x, batch.y
        if not (self.config.alpha or self.config.beta):
            return self.head_loss([x], y, [1.0])
        features, heat = predicted_cam(self.erm, x)
        select = patch_mask if self.config.mask == "patch32" else top_mask
        mask, fill = select(heat, (x.shape[2], x.shape[3]), self.config.share), x.mean((0, 2, 3), keepdim=True)
        images, weights = [], []
        if self.config.alpha:
            images.append(removed(x, mask, fill))
            weights.append(self.config.alpha)
        if self.config.beta:
            images.append(combined(x, mask, partners(y), fill))
            weights.append(self.config.beta)
        if self.adapts:
            return self.head_loss([x, *images], y, [1.0, *weights])
        return F.cross_entropy(self.model.head(features), y) + self.head_loss(images, y, weights)

    def head_loss(self, images: list[Tensor], y: Tensor, weights: list[float]) -> Tensor:
        """Weighted sum of the cross-entropies of sets of images that pass together, with a graph of the head only."""
        with torch.no_grad():
            features = self.model.features(torch.cat(images))
        parts = self.model.head(features).chunk(len(images))
        return torch.stack(
            [weight * F.cross_entropy(part, y) for part, weight in zip(parts, weights, strict=True)]
        ).sum()
