"""What the penultimate features of the models tell apart: the class, the attributes, the environment.

eX2L shows a projection with a score whose name the text has lost; silhouette and a linear probe stand here instead.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..benchmark.spec import SplitName
from .figure import save
from .look import Look

Matrix = NDArray[np.float32]
MOST = 2_000
"""Images that are projected and scored: both grow with their square."""


def targets(look: Look, name: SplitName) -> dict[str, NDArray[np.int64]]:
    """Labels (n,) by what they say: the class, every attribute, the environment where the split has any."""
    split, card = look.split(name), look.store.card
    found = {"class": split.y} | {a.name: split.a[:, j] for j, a in enumerate(card.attributes)}
    return found | ({"environment": split.env} if split.env is not None else {})


def subset(look: Look, name: SplitName) -> NDArray[np.int64]:
    """The images that are shown (m,): all, or so many drawn with a fixed seed."""
    n = len(look.split(name))
    return np.sort(np.random.default_rng(0).permutation(n)[:MOST])


def scores(features: Matrix, labels: NDArray[np.int64]) -> dict[str, float | None]:
    """Separability of standardised features (n, d) by labels (n,); None where there is one value, or too few of one.

    `silhouette`: mean over images, Euclidean. `probe`: balanced accuracy of a linear probe (L2 logistic regression),
    cross-validated on three parts.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import silhouette_score
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = np.bincount(labels)
    counts = counts[counts > 0]
    if len(counts) < 2 or counts.min() < 3:
        return {"silhouette": None, "probe": None}
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    return {
        "silhouette": float(silhouette_score(StandardScaler().fit_transform(features), labels)),
        "probe": float(cross_val_score(probe, features, labels, cv=3, scoring="balanced_accuracy").mean()),
    }


def project(features: Matrix) -> Matrix:
    """Features (n, d) in the plane (n, 2), by t-SNE on their 50 first principal components."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    most = min(50, *features.shape)
    reduced = PCA(most, random_state=0).fit_transform(features - features.mean(0))
    perplexity = min(30, max(2, (len(features) - 1) // 3))
    plane: Matrix = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)
    return plane


def report(look: Look, name: SplitName, path: Path) -> list[dict[str, object]]:
    """Write a PNG of the projections and return the scores, a line per model and target."""
    rows = subset(look, name)
    labels = {what: values[rows] for what, values in targets(look, name).items()}
    features = {model: look.features(model, name)[rows] for model in look.models}
    _draw(look, {model: project(values) for model, values in features.items()}, labels, name, path)
    return [
        {"model": model, "by": what, **scores(values, labels[what]), "images": len(rows)}
        for model, values in features.items()
        for what in labels
    ]


def _draw(
    look: Look, planes: dict[str, Matrix], labels: dict[str, NDArray[np.int64]], name: SplitName, path: Path
) -> None:
    from matplotlib.figure import Figure

    card = look.store.card
    values = {"class": card.classes, "environment": card.environments} | {a.name: a.values for a in card.attributes}
    figure = Figure(figsize=(3.6 * len(labels), 3.4 * len(planes) + 0.4), layout="constrained")
    axes = figure.subplots(len(planes), len(labels), squeeze=False)
    for row, (model, plane) in zip(axes, planes.items(), strict=True):
        for axis, (what, numbers) in zip(row, labels.items(), strict=True):
            for value in np.unique(numbers):
                own = plane[numbers == value]
                axis.scatter(*own.T, s=4, linewidths=0, alpha=0.7, label=values[what][value] if value >= 0 else "none")
            axis.set(xticks=[], yticks=[], title=f"{model}, by {what}")
            if len(np.unique(numbers)) <= 12:
                axis.legend(fontsize=7, markerscale=3)
    figure.suptitle(f"{card.name}, {name}: features of {len(next(iter(planes.values()))):,} images", fontsize=9)
    save(figure, path)
