"""Export a dataset's penultimate features under a frozen backbone, as a file that the dataset `embeddings` reads."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backbones import Backbone, build_backbone, check_backbone, normalization
from .data import Pixels
from .device import pick_device
from .engine import predict
from .errors import require
from .home import write_file
from .planning import make_dataset
from .pools import Report
from .spec import SPLITS, Card, Recipe, SplitName, derive_seed
from .store import Store, open_store


def export(
    dataset: str,
    root: Path | None,
    backbone: str,
    weights: str,
    out: Path,
    settings: dict[str, str] | None = None,
    report: Report = lambda what, done, total: None,
) -> Path:
    """Write features and labels of all splits to `out`, an .npz; returns it.

    Evaluation transform and mode, float32. Without `backbone` and `weights` they are the dataset's own; random weights
    are the same in every call. `settings` are `data.KEY` settings without their prefix. Raises `UserError`.
    """
    require(out.suffix == ".npz", f"{out}: features are written as .npz: give it a name that ends so")
    require(out.parent.is_dir() and not out.is_dir(), f"{out}: there is no such folder to write the file into")
    made, card = make_dataset(dataset, root, settings)
    require(card.dtype == "uint8", f"{card.name} holds features already")
    name = backbone or card.backbone
    weights = weights or (card.weights if name == card.backbone else "none")
    check_backbone(name, card, weights)
    store = open_store(made, card, root, report=report)
    model = _build(store.card, name, weights).to(pick_device())
    parts = {split: store.split(split) for split in SPLITS}
    features = np.empty((sum(map(len, parts.values())), model.feature_dim), np.float32)
    start = 0
    for split, part in parts.items():
        features[start : start + len(part)] = _features(model, store, split, report)
        start += len(part)
    arrays: dict[str, NDArray[Any]] = {
        "features": features,
        "y": np.concatenate([part.y for part in parts.values()]),
        "a": np.concatenate([part.a for part in parts.values()]),
        "unit": np.concatenate([part.units() for part in parts.values()]),
        "split": np.repeat(np.arange(len(SPLITS)), [len(part) for part in parts.values()]),
    }
    arrays |= _facts(store.card, f"features of {name} (weights {Path(weights).name})")
    write_file(out, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    return out


def _build(card: Card, name: str, weights: str) -> Backbone:
    height, width, channels = card.image
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("embed", name))
        return build_backbone(
            name, num_classes=len(card.classes), in_channels=channels, image=(height, width), weights=weights
        )


def _features(model: Backbone, store: Store, split: SplitName, report: Report) -> NDArray[np.float32]:
    """Penultimate features (n, d) of one split, in its order."""
    data, device = store.split(split), next(model.parameters()).device
    pixels = Pixels(data.images, data.y, *normalization(model, store.card), device, rows=data.rows)
    done = 0

    def features(x: Tensor) -> Tensor:
        nonlocal done
        done += len(x)
        report(f"features of {split}", done, len(pixels))
        return model.features(x)

    found: NDArray[np.float32] = predict(features, model, pixels, Recipe()).numpy()
    return found


def _facts(card: Card, how: str) -> dict[str, NDArray[Any]]:
    """What of a card must survive, as plain arrays."""
    ratios = [math.nan if attribute.train_ratio is None else attribute.train_ratio for attribute in card.attributes]
    return {
        "title": np.array(f"{card.name}, {how}"),
        "licence": np.array(card.licence),
        "citation": np.array(card.citation),
        "share_labels": np.array(card.share_labels),
        "classes": np.array(card.classes),
        "attribute_names": np.array([attribute.name for attribute in card.attributes]),
        **{f"values_{k}": np.array(attribute.values) for k, attribute in enumerate(card.attributes)},
        "aligned": np.array([attribute.aligned for attribute in card.attributes]),
        "train_ratio": np.array(ratios, np.float64),
    }
