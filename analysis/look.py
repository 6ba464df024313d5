"""A run's model, made again from its record, beside the block's ERM."""

import re
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..benchmark import metrics, record
from ..benchmark.backbones import Backbone
from ..benchmark.errors import UserError, require
from ..benchmark.home import runs_home
from ..benchmark.lab import Lab, Progress
from ..benchmark.planning import entries_fingerprint, make_dataset, weights_identity
from ..benchmark.pools import Report
from ..benchmark.prepare import asked_for
from ..benchmark.record import RunRecord
from ..benchmark.registry import METHODS, SOURCES
from ..benchmark.runner import refit
from ..benchmark.spec import SplitName
from ..benchmark.store import Split, Store, open_store
from ..benchmark.task import Checkpoint, Predictor
from ..methods.blocks.last_layer import StandardisedLinear


@dataclass(frozen=True, eq=False)
class Look:
    """Networks by name, each with a linear head, on a run's data: first `erm`, the block's after its last epoch."""

    record: RunRecord
    store: Store
    lab: Lab
    models: dict[str, Backbone]
    checkpoints: dict[str, Checkpoint]
    other: int
    """Test images that the model predicts otherwise than the record says."""

    def split(self, name: SplitName) -> Split:
        """Labels and pictures of a split."""
        return self.store.split(name)

    def groups(self, name: SplitName) -> NDArray[np.int64]:
        """True group of each example of a split (n,)."""
        split = self.split(name)
        return metrics.group_index(split.y, split.a, self.store.card.shape)

    def inputs(self, name: SplitName, rows: NDArray[np.int64]) -> Tensor:
        """Images (m, C, H, W) as the models take them."""
        return self.lab.pixels(name).batch(torch.from_numpy(rows)).x

    def features(self, model: str, name: SplitName) -> NDArray[np.float32]:
        """Penultimate features (n, d) of a split."""
        features: NDArray[np.float32] = self.lab.outputs(self.checkpoints[model], name)[0].numpy()
        return features


def find_record(run: str) -> Path:
    """The record meant by a path or by the first letters of a run's hash; raises `UserError`."""
    path = Path(run)
    if path.suffix == ".json" or path.is_file():
        require(path.is_file(), f"{run}: there is no such record")
        return path
    require(re.fullmatch("[0-9a-f]{4,64}", run) is not None, f"{run!r} is no record's path and no hash of a run")
    found = [file for file in record.find(runs_home()) if file.stem.rpartition("-")[2].startswith(run[:12])]
    if len(found) != 1:
        several = f"{len(found)} runs begin with it" if found else f"there is no such run in {runs_home()}"
        raise UserError(f"{run}: {several}; see `worstgroup ls runs`")
    return found[0]


def look(
    path: Path,
    root: Path | None = None,
    weights: Path | None = None,
    progress: Progress = lambda stage, epoch, epochs: None,
    report: Report = lambda what, done, total: None,
) -> Look:
    """Fit a run again; `weights` is the file of its initial weights, where they were one.

    Raises `UserError` where data, weights or code are not those of the record.
    """
    told = record.read(path)
    require(told.status == "finished", f"{path.name}: the run failed, it has no model")
    store = reopen(told, root, report)
    spec = told.spec(_weights_file(told, weights))
    torch.set_num_threads(int(told.env.get("threads", torch.get_num_threads())))  # sums depend on how they are split
    source = SOURCES[told.source] if told.source else None
    if entries_fingerprint(METHODS[told.method], source) != told.code:
        raise UserError(f"{path.name}: the code of {told.label} has changed since; run it again, then look at that run")
    lab, predictor = refit(spec, store, progress)
    erm = lab.erm_checkpoint(lab.erm(), lab.recipe.epochs)
    own = "ERM as selected" if told.label == "erm" else told.label
    models = {"erm": erm.model, own: explained(predictor)}
    checkpoints = {"erm": erm, own: predictor.checkpoint}
    predicted = _logits(lab, predictor).argmax(1).numpy()
    other = int((predicted != record.read_predictions(path, told)["test_prediction"]).sum())
    return Look(told, store, lab, {name: model.eval() for name, model in models.items()}, checkpoints, other)


def reopen(told: RunRecord, root: Path | None, report: Report, variant: str = "") -> Store:
    """The store that a record tells of, or that of another variant of its dataset, with the same pixels."""
    name, settings = asked_for(told.dataset)
    base = f"{name.partition(':')[0]}:{variant}" if variant else name
    dataset, card = make_dataset(base, root, settings)
    store = open_store(dataset, card, root, report=report)
    if not variant and store.fingerprint != told.fingerprint:
        raise UserError(f"{told.dataset}: the files at hand are not those of the record (data {told.fingerprint})")
    return store


def explained(predictor: Predictor) -> Backbone:
    """The network with the head that it predicts with; raises `UserError` where that is not linear."""
    model = predictor.checkpoint.model
    head: nn.Module = predictor.head or model.head
    if isinstance(head, StandardisedLinear):
        folded = nn.Linear(len(head.mean), len(head.bias))
        weight, bias = head.weight / head.scale, head.bias - head.weight / head.scale @ head.mean
        # Of two classes it has one row, the other is zero: a map of that logit would be empty. Probabilities stay.
        folded.load_state_dict({"weight": weight - weight.mean(0), "bias": bias - bias.mean()})
        head = folded
    if not isinstance(head, nn.Linear):
        raise UserError(f"its head is a {type(head).__name__}: only linear heads can be explained")
    twin = copy(model)  # the parts are shared, the head is not
    twin._modules = {**model._modules, "head": head.to(next(model.parameters()).device)}
    return twin.requires_grad_(False)


def _logits(lab: Lab, predictor: Predictor) -> Tensor:
    features, logits = lab.outputs(predictor.checkpoint, "test")
    with torch.no_grad():
        return logits if predictor.head is None else predictor.head.cpu()(features)


def _weights_file(told: RunRecord, weights: Path | None) -> str:
    """Path of the initial weights that a record names by content."""
    if weights is None:
        named = re.fullmatch(r".+-[0-9a-f]{12}", told.weights)
        require(named is None, f"its initial weights were a file, {told.weights}: say with --weights where it lies")
        return ""
    identity, file = weights_identity(str(weights))
    require(identity == told.weights, f"--weights {weights}: the record tells of {told.weights}, this is {identity}")
    return file
