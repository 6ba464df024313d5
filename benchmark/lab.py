"""The engine's side of a run: pixels of all splits, models, and the shared ERM with its cached outputs.

Methods never see it; they get a `Task`, which hands on what is theirs to have.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import engine
from .annotations import Annotations
from .artifacts import Artifact, artifact, copy_kept, drop_work, keep_tensors, work_folder
from .backbones import Backbone, build_backbone, normalization
from .cost import Clock, StageCost
from .data import Pixels, Room, random_order
from .errors import BudgetExceeded, UserError
from .fingerprint import code_fingerprint, engine_fingerprint
from .pools import ensure_sound
from .registry import package_card
from .spec import Block, Recipe, SplitName, derive_seed, digest
from .store import Store

Progress = Callable[[str, int, int], None]
"""Told (stage, epoch, epochs) after every epoch."""
Watch = Callable[[float], None]
"""Told the selection value after every epoch of a training that one is selected in; it may raise."""
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained backbone. `key` addresses its cached outputs; a checkpoint that only one run has gets none."""

    model: Backbone
    key: str | None = None


class Lab:
    """Everything that the runs of one block are made with, under one run's clock; `sharers` runs share the device."""

    def __init__(
        self,
        block: Block,
        store: Store,
        device: torch.device,
        clock: Clock,
        progress: Progress,
        watch: Watch = lambda value: None,
        sharers: int = 1,
    ) -> None:
        self.block, self.store, self.device, self.clock = block, store, device, clock
        self.progress, self.watch = progress, watch
        self.recipe = block.recipe
        self.test_is_open = False
        self._claimed: list[Counter[str]] = [Counter()]
        self._scopes: list[str] = []
        self._pixels: dict[tuple[SplitName, str], Pixels] = {}
        self._room = Room(sharers)
        model = self._build().to(device)
        self._mean, self._std = normalization(model, store.card)
        # the first pass in a process pays for lazy initialisation, which is nobody's cost
        model(self.pixels("train").batch(torch.arange(2)).x).sum().backward()

    def _build(self, num_classes: int = 0, purpose: str = "") -> Backbone:
        card, block = self.store.card, self.block
        height, width, channels = card.image
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(*block.stream, "init", *filter(None, [purpose])))
            return build_backbone(
                block.backbone,
                num_classes=num_classes or len(card.classes),
                in_channels=channels,
                image=(height, width),
                weights=block.weights_file or block.weights,
            )

    def model(self, num_classes: int = 0, purpose: str = "") -> Backbone:
        """A fresh backbone with the same initial weights for every method of the block, metered by the clock.

        With a `purpose` it is another network of the same family, with `num_classes` outputs and weights of its own.
        """
        model = self._build(num_classes, purpose).to(self.device)
        self.clock.meter(model, model.trunk, self.pixels("train").batch(torch.tensor([0])).x)
        return model

    @property
    def sharing(self) -> bool:
        """Whether something is being made that other runs share."""
        return bool(self._scopes)

    def claim(self, stage: str) -> str:
        """A name of its own for every training of the run, the same in every attempt: repeats are numbered."""
        self._claimed[-1][stage] += 1
        n = self._claimed[-1][stage]
        return "-".join([*self._scopes, stage, *([str(n)] if n > 1 else [])])

    @contextmanager
    def _scope(self, name: str) -> Iterator[None]:
        """Trainings inside are named after what is being made, so that an attempt that finds it made claims none."""
        self._scopes.append(name)
        self._claimed.append(Counter())
        try:
            yield
        finally:
            self._scopes.pop()
            self._claimed.pop()

    def pixels(self, split: SplitName, view: str = "") -> Pixels:
        """Pixels and labels of a split, or of a view of it, loaded on first use; raises `BudgetExceeded` for the test
        split before `fit` has returned, and `CorruptFile`. The labels of test are -1: a method's model predicts it.
        """
        if split == "test" and not self.test_is_open:
            raise BudgetExceeded("the test split is not for methods: the engine predicts it after fit has returned")
        if (split, view) not in self._pixels:
            with self.clock.paused():  # gigabytes may be moved to a GPU, for whoever comes first
                data = self.store.split(split)
                ensure_sound(self.store.pools[f"{split}:{view}" if view else split])
                images, rows = (data.views[view], None) if view else (data.images, data.rows)
                y = np.full_like(data.y, -1) if split == "test" else data.y
                self._pixels[split, view] = Pixels(
                    images, y, self._mean, self._std, self.device, self.recipe.channels_last, rows, self._room
                )
        return self._pixels[split, view]

    def training(self, stage: str, state: Path, **options: Any) -> engine.Training:
        """A training of this block; all methods draw from the same image order and augmentation streams."""
        recipe: Recipe = options.pop("recipe", self.recipe)
        usual: dict[str, Any] = {"train": self.pixels("train"), "val": self.pixels("val"), "stop": recipe.epochs}
        return engine.Training(
            **(usual | options),
            recipe=recipe,
            stage=stage,
            seed=self.block.stream,
            clock=self.clock,
            state=state,
            progress=self.progress,
            watch=self.watch,
        )

    def erm(self) -> Artifact:
        """The block's ERM: weights and validation predictions after every epoch, trained once for all methods."""
        identity = erm_identity(self.block)
        work = work_folder(digest(identity))
        trained = False

        def make(folder: Path) -> StageCost:
            nonlocal trained
            trained = True

            def keep(epoch: int, model: nn.Module) -> None:
                work.mkdir(parents=True, exist_ok=True)
                keep_tensors(work / f"{_epoch(epoch)}.safetensors", model.state_dict())

            objective: engine.Objective[None] = engine.Objective(None)
            objective.model = self.model()
            sampler = random_order(len(self.pixels("train")), self.recipe)
            training = self.training("erm", work / "erm.pt", keep=keep)
            trajectory = engine.fit(objective, objective.model, sampler, training)
            for file in work.glob("epoch_*.safetensors"):  # copied: a kill before the artifact is whole loses nothing
                copy_kept(file, folder)
            np.save(folder / "losses.npy", [(epoch.train_loss, epoch.val_loss) for epoch in trajectory.epochs])
            np.save(folder / "predictions.npy", np.stack([epoch.predictions for epoch in trajectory.epochs]))
            return self.clock.stages.pop("erm")

        made = artifact("erm", identity, make, self.clock.paused)
        if trained:  # else another process may be at work there
            drop_work(work.name)
        return made

    def erm_checkpoint(self, erm: Artifact, epoch: int, billed: int = 0) -> Checkpoint:
        """The shared ERM after an epoch (1-based); bills the training up to it, or up to epoch `billed`."""
        self.clock.inherit(f"erm:{erm.key}", erm.cost.scaled((billed or epoch) / self.recipe.epochs))
        model = self.model()
        model.load_state_dict(erm.tensors(_epoch(epoch)))
        return Checkpoint(model, f"{erm.key}/{epoch}")

    def cached(
        self,
        kind: str,
        identity: Any,
        make: Callable[[], Arrays],
        annotations: Annotations,
        labelled: bool,
        written: Callable[..., Any],
    ) -> tuple[Arrays, str]:
        """Arrays that `make` computes once for all runs of the block, and the key they lie under; costs and labels that
        went in are inherited.

        Keyed by the identity and by the code of the file that `written` is written in; where `make` uses attributes
        (`labelled`), by the budget too.
        """
        while isinstance(written, partial):
            written = written.func
        code = code_fingerprint(sys.modules[written.__module__])
        budget = str(annotations.budget) if labelled else ""
        identity = {"on": erm_identity(self.block), "code": code, "of": identity, "budget": budget}
        closed, scope = not labelled, f"{kind}-{digest(identity)[:12]}"

        def fill(folder: Path) -> StageCost:
            with (
                self.clock.apart() as (stages, shared),
                annotations.apart(closed=closed) as used,
                self._scope(scope),
                self.clock.stage(kind),
            ):
                try:
                    arrays = make()
                except OSError as error:  # the method's own, not one of writing the artifact
                    raise UserError(f"{kind}: {error}") from error
            for key, array in arrays.items():
                np.save(folder / f"{key}.npy", array)
            rows = {key: np.flatnonzero(mask).tolist() for key, mask in used.items()}
            costs = {key: asdict(cost) for key, cost in shared.items()}
            (folder / "inherited.json").write_text(json.dumps({"arrays": list(arrays), "labels": rows, "costs": costs}))
            return StageCost.total(list(stages.values()))

        made = artifact(kind, identity, fill, self.clock.paused)
        inherited = made.json("inherited")
        for key, cost in inherited["costs"].items():
            self.clock.inherit(key, StageCost(**cost))
        self.clock.inherit(f"{kind}:{made.key}", made.cost)
        annotations.inherit(inherited["labels"])
        return {key: made.array(key) for key in inherited["arrays"]}, f"{kind}/{made.key}"

    def outputs(self, checkpoint: Checkpoint, split: SplitName, view: str = "") -> tuple[Tensor, Tensor]:
        """Features (n, d) and logits (n, K), float32 on the CPU, evaluation transform; cached by checkpoint."""
        name = f"{split}:{view}" if view else split
        stage = f"features:{name}"

        def compute() -> tuple[Tensor, Tensor]:
            model = checkpoint.model
            with self.clock.stage(stage), torch.no_grad():
                features = engine.predict(model.features, model, self.pixels(split, view), self.recipe)
                return features, model.head(features.to(self.device)).float().cpu()

        if checkpoint.key is None:
            return compute()

        def make(folder: Path) -> StageCost:
            features, logits = compute()
            np.save(folder / "features.npy", features.numpy())
            np.save(folder / "logits.npy", logits.numpy())
            return self.clock.stages.pop(stage)

        made = artifact("features", {"checkpoint": checkpoint.key, "split": name}, make, self.clock.paused)
        if split != "test":  # predicting the test split is evaluation: no method pays for it
            self.clock.inherit(f"features:{made.key}", made.cost)
        return torch.from_numpy(made.array("features")), torch.from_numpy(made.array("logits"))


def erm_identity(block: Block) -> dict[str, str]:
    """What the shared ERM of a block, and all else that its networks make of images, is addressed by.

    How pixels are scaled is in the block's key where the dataset is a plugin's; the package's own cards are asked here.
    """
    card = package_card(block.dataset)
    scale = digest([card.mean, card.std]) if card else ""
    return {"block": block.key, "code": engine_fingerprint(), "scale": scale}


def _epoch(epoch: int) -> str:
    return f"epoch_{epoch:04d}"
