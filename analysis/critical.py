"""Whether images that are hard to place in a cluster are the critical ones, which go against the shortcut.

Capitani et al., ClusterFix, WACV 2024: ROC curves of the loss and of the entropy of an auxiliary cluster classifier.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from ..benchmark.errors import require
from ..methods.blocks.class_clusters import partition
from .figure import save
from .look import Look

CLUSTERS = 8
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)
Scores = dict[str, NDArray[np.float64]]


def critical(groups: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether an image is in another group than most of its class (n,): for two classes with one attribute the rarer
    combination within each.
    """
    usual = [np.bincount(groups[y == label]).argmax() for label in np.unique(y)]
    return ~np.isin(groups, usual)


def entropy(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Entropy in bits (n,) of `softmax(logits / t)`; over eight equally likely clusters it is 3."""
    p = softmax(logits / temperature, axis=1)
    return np.asarray(-(p * np.log2(np.clip(p, 1e-30, None))).sum(1))


def loss(logits: NDArray[np.float64], cluster: NDArray[np.int64], temperature: float) -> NDArray[np.float64]:
    """Cross-entropy (n,) of `softmax(logits / t)` with the clusters."""
    return np.asarray(
        -np.log(np.clip(softmax(logits / temperature, axis=1)[np.arange(len(cluster)), cluster], 1e-30, None))
    )


def report(look: Look, path: Path) -> list[dict[str, object]]:
    """Write a PNG of the ROC curves at temperature 1; one line per model and temperature with both areas.

    Clusters are those of ERM's train features, 8 of each class. The classifier of clusters is linear, one per class, on
    a model's own features, each image predicted by one that was fitted on other images (three parts). In the paper it
    is trained along with the network.
    """
    from sklearn.metrics import roc_auc_score

    split = look.split("train")
    z = critical(look.groups("train"), split.y)
    require(
        bool(z.any()), f"{look.store.card.name}: no train image goes against a shortcut, so there is nothing to find"
    )
    features = look.features("erm", "train")
    cluster = partition(features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12), split.y, CLUSTERS, 0)
    lines: list[dict[str, object]] = []
    curves: dict[str, Scores] = {}
    for model in look.models:
        logits = cluster_logits(look.features(model, "train"), split.y, cluster)
        for t in TEMPERATURES:
            found = {"loss": loss(logits, cluster, t), "entropy": entropy(logits, t)}
            areas = {f"auc_{name}": float(roc_auc_score(z, values)) for name, values in found.items()}
            lines.append({"model": model, "temperature": t, **areas, "critical": int(z.sum()), "images": len(z)})
            if t == 1:
                curves[model] = found
    _draw(look, curves, z, path)
    return lines


def cluster_logits(
    features: NDArray[np.float32], y: NDArray[np.int64], cluster: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Logits (n, most clusters of a class) of the classifiers of clusters, -inf for clusters that a class lacks."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    logits = np.full((len(y), int(cluster.max()) + 1), -np.inf)
    for label in np.unique(y):
        own = np.flatnonzero(y == label)
        for fit, rest in StratifiedKFold(3, shuffle=True, random_state=0).split(own, cluster[own]):
            solver = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
            solver.fit(features[own[fit]], cluster[own[fit]])
            classes = solver[-1].classes_
            logits[np.ix_(own[rest], classes)] = solver.predict_log_proba(features[own[rest]])
    return np.asarray(np.clip(logits, -1e4, None))


def _draw(look: Look, curves: dict[str, Scores], z: NDArray[np.bool_], path: Path) -> None:
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_auc_score, roc_curve

    figure = Figure(figsize=(8, 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("loss", "entropy"), strict=True):
        for model, found in curves.items():
            rate, hits, _ = roc_curve(z, found[name])
            axis.plot(rate, hits, label=f"{model}: {roc_auc_score(z, found[name]):.3f}")
        axis.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        axis.set(xlabel="other images", ylabel="critical images found", title=f"{name} of the cluster classifier")
        axis.legend(title="area", fontsize=8)
    figure.suptitle(f"{look.store.card.name}, train: {int(z.sum()):,} critical of {len(z):,} images", fontsize=9)
    save(figure, path)
