"""The engine's side of a run: pixels of all splits, models, and the shared ERM with its cached outputs.

Methods never see it; they get a `Task`, which hands on what is theirs to have.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import engine
from .artifacts import Artifact, artifact, save_tensors, work_folder
from .backbones import Backbone, build_backbone, normalization
from .cost import Clock, StageCost
from .data import Pixels, random_order
from .fingerprint import engine_fingerprint
from .spec import Block, SplitName, derive_seed
from .store import Store

Progress = Callable[[str, int, int], None]
"""Told (stage, epoch, epochs) after every epoch."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained backbone. `key` addresses its cached outputs; a checkpoint that only one run has gets none."""

    model: Backbone
    key: str | None = None


class Lab:
    """Everything that the runs of one block are made with, under one run's clock."""

    def __init__(self, block: Block, store: Store, device: torch.device, clock: Clock, progress: Progress) -> None:
        self.block, self.store, self.device, self.clock, self.progress = block, store, device, clock, progress
        self.recipe = block.recipe
        self._pixels: dict[SplitName, Pixels] = {}
        model = self._build().to(device)
        self._mean, self._std = normalization(model, store.card)
        # the first pass in a process pays for lazy initialisation, which is nobody's cost
        model(self.pixels("train").batch(torch.arange(2)).x).sum().backward()

    def _build(self) -> Backbone:
        card, block = self.store.card, self.block
        height, width, channels = card.image
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(*block.stream, "init"))
            return build_backbone(
                block.backbone,
                num_classes=len(card.classes),
                in_channels=channels,
                image=(height, width),
                weights=block.weights_file or block.weights,
            )

    def model(self) -> Backbone:
        """A fresh backbone with the same initial weights for every method of the block, metered by the clock."""
        model = self._build().to(self.device)
        self.clock.meter(model, model.trunk, self.pixels("train").batch(torch.tensor([0])).x)
        return model

    def pixels(self, split: SplitName) -> Pixels:
        """Pixels and labels of a split, loaded on first use."""
        if split not in self._pixels:
            data = self.store.split(split)
            self._pixels[split] = Pixels(
                data.images, data.y, self._mean, self._std, self.device, self.recipe.channels_last
            )
        return self._pixels[split]

    def training(self, stage: str, state: Path, epochs: int | None = None, **options: Any) -> engine.Training:
        """A training of this block; all methods draw from the same image order and augmentation streams."""
        return engine.Training(
            train=self.pixels("train"),
            val=self.pixels("val"),
            recipe=self.recipe,
            epochs=epochs or self.recipe.epochs,
            stage=stage,
            seed=self.block.stream,
            clock=self.clock,
            state=state,
            progress=self.progress,
            **options,
        )

    def erm(self) -> Artifact:
        """The block's ERM: weights and validation predictions after every epoch, trained once for all methods."""
        work = work_folder(self.block.key)

        def make(folder: Path) -> StageCost:
            def keep(epoch: int, model: nn.Module) -> None:
                work.mkdir(parents=True, exist_ok=True)
                save_tensors(work / f"{_epoch(epoch)}.safetensors", model.state_dict())

            objective: engine.Objective[None] = engine.Objective(None)
            objective.model = self.model()
            sampler = random_order(len(self.pixels("train")), self.recipe)
            training = self.training("erm", work / "erm.pt", keep=keep)
            trajectory = engine.fit(objective, objective.model, sampler, training)
            for file in work.glob("epoch_*.safetensors"):  # copied: a kill before the artifact is whole loses nothing
                shutil.copyfile(file, folder / file.name)
            np.save(folder / "losses.npy", [(epoch.train_loss, epoch.val_loss) for epoch in trajectory.epochs])
            np.save(folder / "predictions.npy", np.stack([epoch.predictions for epoch in trajectory.epochs]))
            return self.clock.stages.pop("erm")

        made = artifact("erm", {"block": self.block.key, "code": engine_fingerprint()}, make)
        shutil.rmtree(work, ignore_errors=True)
        return made

    def erm_checkpoint(self, erm: Artifact, epoch: int, billed: int = 0) -> Checkpoint:
        """The shared ERM after an epoch (1-based); bills the training up to it, or up to epoch `billed`."""
        self.clock.inherit(f"erm:{erm.key}", erm.cost.scaled((billed or epoch) / self.recipe.epochs))
        model = self.model()
        model.load_state_dict(erm.tensors(_epoch(epoch)))
        return Checkpoint(model, f"{erm.key}/{epoch}")

    def outputs(self, checkpoint: Checkpoint, split: SplitName) -> tuple[Tensor, Tensor]:
        """Features (n, d) and logits (n, K), float32 on the CPU, evaluation transform; cached by checkpoint."""
        stage = f"features:{split}"

        def compute() -> tuple[Tensor, Tensor]:
            model = checkpoint.model
            with self.clock.stage(stage), torch.no_grad():
                features = engine.predict(model.features, model, self.pixels(split), self.recipe)
                return features, model.head(features.to(self.device)).float().cpu()

        if checkpoint.key is None:
            return compute()

        def make(folder: Path) -> StageCost:
            features, logits = compute()
            np.save(folder / "features.npy", features.numpy())
            np.save(folder / "logits.npy", logits.numpy())
            return self.clock.stages.pop(stage)

        made = artifact("features", {"checkpoint": checkpoint.key, "split": split}, make)
        if split != "test":  # predicting the test split is evaluation: no method pays for it
            self.clock.inherit(f"features:{made.key}", made.cost)
        return torch.from_numpy(made.array("features")), torch.from_numpy(made.array("logits"))


def _epoch(epoch: int) -> str:
    return f"epoch_{epoch:04d}"
