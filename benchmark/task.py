"""`Task`: everything a method may touch. No test split, attributes only within the budget, every stage billed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import annotations, engine
from .annotations import Annotations, Attributes, Groups, Held, Indices
from .artifacts import work_folder
from .backbones import Backbone
from .budget import POLICIES
from .choices import Choice, Decision, Decisions
from .cost import StageCost
from .data import Pixels
from .environments import EnvDefinition
from .errors import UserError, require
from .lab import Arrays, Checkpoint, Lab, erm_identity
from .seen import Pool, Seen
from .selection import CRITERIA, Score, Selector, first_best
from .spec import Card, Recipe, RunSpec, derive_seed, digest

__all__ = ["Checkpoint", "Choice", "Decision", "Decisions", "GroupSource", "Pool", "Predictor", "Task"]


@dataclass(frozen=True, eq=False)
class Predictor:
    """What `fit` returns: a checkpoint, maybe another head on its features, how it was chosen, and its training."""

    checkpoint: Checkpoint
    choice: Choice
    head: nn.Module | None = None
    trajectory: engine.Trajectory | None = None


class GroupSource(Protocol):
    """What stands in for attributes: values for every image of a split, from whatever the task allows."""

    def attributes(self, task: "Task", split: Held) -> Attributes:
        """Pseudo-attributes (n, k) of all images."""
        ...


class Task:
    """One run as its method sees it. There is no test split here, and no attribute beyond the budget.

    `train` is what the run trains on: the train split, unless policy or `--extra val` say otherwise (`pool`). `select`
    are the validation images to select by, by default all that are granted. A run that trains on validation images fits
    twice: first with half of them held out to select by, then on all of them, where the first one's `decisions` are
    replayed.
    """

    def __init__(
        self,
        spec: RunSpec,
        lab: Lab,
        labels: Annotations,
        *,
        source: GroupSource | None = None,
        pool: Pool | None = None,
        select: Indices | None = None,
        decisions: Decisions | None = None,
        prefix: str = "",
        found: dict[Held, Attributes] | None = None,
    ) -> None:
        self.spec = spec
        self.decisions = decisions or Decisions()
        self.found: dict[Held, Attributes] = {} if found is None else found
        """What the group source answered, by split."""
        self._lab, self._annotations, self._source = lab, labels, source
        self._seen, self._select, self._prefix = Seen(lab, pool), select, prefix

    @property
    def card(self) -> Card:
        """The dataset's card."""
        return self._lab.store.card

    @property
    def recipe(self) -> Recipe:
        """How this run trains: the block's recipe, with what a search found; what other runs share is made without."""
        return self._lab.recipe if self._lab.sharing else replace(self._lab.recipe, **dict(self.spec.tuned))

    @property
    def device(self) -> torch.device:
        """Where models and batches live."""
        return self._lab.device

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.card.classes)

    def size(self, split: Held) -> int:
        """Number of images."""
        return len(self._seen.pixels(split))

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of its own for every purpose, the same for every method of the block and at every call."""
        return np.random.default_rng(derive_seed(*self.spec.block.stream, purpose))

    @contextmanager
    def seeded(self, purpose: str) -> Iterator[None]:
        """Inside, torch's generator is one of its own for the purpose, e.g. to draw the initial weights of a layer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.rng(purpose).integers(2**31)))
            yield

    def on(self, train: Indices, val: Indices, *, select: Indices | None = None, labels: bool = True) -> "Task":
        """The same run, training on these rows of the splits train and validation.

        A classifier trained there is selected by the validation images `select`; without any, only `train_network` can
        be used. Class labels of the validation rows are billed, unless `labels` keeps them away: they are then -1.
        """
        if labels:
            self._annotations.bill_labels(val)
        return self._training_on(Pool(train, val, labels), np.arange(0) if select is None else select)

    def with_interventions(self) -> tuple["Task", Indices]:
        """The same run, training also on views of its train images, each with one shortcut replaced by another class's.

        The shift (m,) of each of its images says which one: 0 is none, j the j-th of `card.interventions`. Views are
        billed; of them only the class is known, no attribute. Raises `UserError` where the dataset has none.
        """
        names = self.card.interventions
        require(bool(names), f"{self.card.name} renders no interventions; say Requires(rendered=True) to be n/a there")
        pool = self._seen.pool or Pool(np.arange(len(self._lab.pixels("train"))), np.arange(0))
        self._annotations.bill_views(pool.train)
        sizes = [len(pool.train) + len(pool.val), *(len(pool.train) for _ in names)]
        task = self._training_on(replace(pool, views=names), self._select)
        return task, np.repeat(np.arange(1 + len(names)), sizes)

    def _training_on(self, pool: Pool, select: Indices | None) -> "Task":
        return Task(
            self.spec,
            self._lab,
            self._annotations,
            source=self._source,
            pool=pool,
            select=select,
            decisions=self.decisions,
            prefix=self._prefix,
            found=self.found,
        )

    def part(self, rows: Indices) -> "Task":
        """The same run, training on some of the images that it trains on, by their places; for `train_network` only."""
        chosen = {"train": rows[:0], "val": rows[:0]}
        chosen |= {split: own for split, own, _ in self._seen.find("train", rows)}
        pool = self._seen.pool
        return self.on(chosen["train"], chosen["val"], labels=pool is None or pool.labels)

    # ------------------------------------------------------------------------------------------------------ labels

    def y(self, split: Held, *, fit: bool | Indices = False) -> NDArray[np.int64]:
        """Class labels (n,). Say with `fit` when validation labels go into fitting, all of them (True) or those of some
        images: they are billed as extra labels.
        """
        if split == "val" and fit is not False:
            self._annotations.bill_labels(np.arange(self.size("val")) if fit is True else fit)
        return self._seen.pixels(split).y.cpu().numpy()

    def annotated(self, split: Held) -> Indices:
        """Images of a split that have groups to fit on, sorted; all where groups are classes or pseudo-groups."""
        if self.spec.policy == "class" or self._source is not None:
            return np.arange(self.size(split))
        granted = [np.isin(rows, self._annotations.rows(part)) for part, rows in self._seen.rows(split)]
        return np.flatnonzero(np.concatenate(granted))

    def attributes(self, split: Held, rows: Indices | None = None) -> Attributes:
        """Attributes of the images (of all, or of `rows`), to fit on: the only door to them.

        The run decides what they are: true ones within the budget, none under the policy `@class` (groups are then
        classes), a group source's; under `@masked` unknown ones are -1. Raises `BudgetExceeded` beyond the grant.
        """
        wanted = np.arange(self.size(split)) if rows is None else rows
        found = self._seen.find(split, wanted)
        parts = [self._attributes(part, own) for part, own, _ in found]
        return Attributes.join(parts).at(np.argsort(np.concatenate([which for _, _, which in found])))

    def _attributes(self, split: Held, rows: Indices) -> Attributes:
        if self.spec.policy == "class":
            return Attributes.none(len(rows))
        if self._source is not None:
            return self._answer(self._source, split).at(rows)
        if self.spec.policy == "masked":
            known = np.isin(rows, self._annotations.rows(split))
            true = self._annotations.attributes(split, "fit", rows[known])
            values = np.full((len(rows), len(true.sizes)), -1)
            values[known] = true.values
            return Attributes(values, true.sizes)
        return self._annotations.attributes(split, "fit", rows)

    def _answer(self, source: GroupSource, split: Held) -> Attributes:
        """What the source says of a split. Where something is made that other runs share it is asked anew: what it was
        granted is then billed, or refused, as a part of that.
        """
        if split in self.found and not self._lab.sharing:
            return self.found[split]
        answer = source.attributes(Task(self.spec, self._lab, self._annotations, prefix=self._prefix), split)
        if not self._lab.sharing:
            self.found[split] = answer
        return answer

    def groups(self, split: Held, rows: Indices | None = None) -> Groups:
        """Groups of class and attributes of the images (of all, or of `rows`), to fit on; see `attributes`."""
        y = self.y(split)
        return self.attributes(split, rows).groups(y if rows is None else y[rows], self.num_classes)

    def environments(self, definition: EnvDefinition) -> Groups:
        """Environments of the images trained on (n,), -1 where unknown: the dataset's own, or made of `attributes`."""
        if definition == "native":
            parts = [self._annotations.environments(split, rows) for split, rows in self._seen.rows("train")]
            return Groups(np.concatenate(parts), len(self.card.environments))
        return self.attributes("train").joint() if definition == "attribute" else self.groups("train")

    def selector(self, rows: Indices | None = None) -> Selector:
        """The rung's selection rule (under the protocol `paper` the paper's; the source's groups where the method fits
        on none) on validation images: all it may look at, or those among `rows`; billed.
        """
        if self.decisions.repeats:
            raise UserError("this fit is on the images that were selected by: all it may choose was chosen before")
        criterion, everything = CRITERIA[self.spec.rule], np.arange(len(self._lab.pixels("val")))
        seen = self._annotations.rows("val", "select") if criterion.needs_groups else everything
        for narrower in (self._select, rows):
            seen = seen if narrower is None else np.intersect1d(seen, narrower)
        require(len(seen) > 0, f"budget {self.spec.budget}: there is no image to select by")
        y = self.y("val")[seen]
        known = Attributes.none(len(y))
        if criterion.needs_groups:
            known = self._annotations.attributes("val", "select", seen)
        elif criterion.of_source:
            known = self._attributes("val", seen)
        return Selector(criterion, seen, y, known.groups(y, self.num_classes))

    def halves(self, rows: Indices, repeat: int = 0, *, attributes: bool = True) -> tuple[Indices, Indices]:
        """Rows of validation in two, stratified by y: one half to fit on, one to select on (spec 10.2); sorted.

        Every `repeat` divides them anew. Where no attribute is fitted on (never by this method: `attributes=False`),
        images whose attributes are granted go to the second half first.
        """
        fits_attributes = attributes and self._source is None and self.spec.policy != "class"
        granted = () if fits_attributes else self._annotations.rows("val", "select")
        rng = self.rng(f"halves {repeat}" if repeat else "halves")
        return annotations.halves(rows, self.y("val")[rows], rng, np.isin(rows, granted))

    # ------------------------------------------------------------------------------------------------------ stages

    def stage(self, name: str) -> AbstractContextManager[StageCost]:
        """Bill a piece of work of the method's own, e.g. `with task.stage("head") as cost: cost.n_head_fits += 1`."""
        return self._lab.clock.stage(self._prefix + name)

    def cached(
        self, kind: str, identity: Any, make: Callable[[], Arrays], *, labelled: bool = False
    ) -> dict[str, NDArray[Any]]:
        """Arrays by name that `make()` computes once for all runs of the block, e.g. heatmaps or a partition.

        `identity` (plain values) is everything they depend on beside the block, the code, what groups are in this run
        and which images it trains on. Every run that reads them is billed their cost, and the attributes that went in,
        which are refused unless they are `labelled`.
        """
        return self._cached(kind, identity, make, labelled, make)[0]

    def _cached(
        self, kind: str, identity: Any, make: Callable[[], Arrays], labelled: bool, written: Callable[[], Any]
    ) -> tuple[Arrays, str]:
        policy = self.spec.policy if self.spec.policy in POLICIES else ""
        groups = [self.spec.source, self.spec.source_config, self.spec.code] if self._source else policy
        return self._lab.cached(kind, [identity, groups, self._seen.key], make, self._annotations, labelled, written)

    def shared_network(
        self, kind: str, identity: Any, make: Callable[[], Checkpoint], *, labelled: bool = False
    ) -> Checkpoint:
        """A network of the block's architecture that `make()` trains once for all runs of the block, e.g. an ERM on a
        part of train; as with `cached`, whoever uses it is billed for it.
        """

        def weights() -> Arrays:
            return {name: value.numpy(force=True) for name, value in make().model.state_dict().items()}

        arrays, key = self._cached(kind, identity, weights, labelled, make)
        model = self._lab.model()
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return Checkpoint(model, key)

    def initial(self) -> Checkpoint:
        """The block's untrained network: its initial weights, pretrained where the block's are."""
        return Checkpoint(self._lab.model(), f"initial/{digest(erm_identity(self.spec.block))}")

    def network(self, num_classes: int, purpose: str) -> Backbone:
        """Another network of the block's family, with `num_classes` outputs and initial weights of its own."""
        return self._lab.model(num_classes, purpose)

    def train(
        self,
        objective: engine.Objective[Any],
        stage: str = "train",
        *,
        recipe: Recipe | None = None,
        start: Checkpoint | None = None,
    ) -> Predictor:
        """Train a classifier on the objective and select its epoch by the rung's rule.

        It starts from the block's initial weights (under `@subset` from its ERM), or from `start`.
        """
        model = self._lab.model()
        if start is None and self.spec.policy == "subset":
            start = self.erm()
        if start is not None:
            model.load_state_dict(start.model.state_dict())
        choice, trajectory = self._selected(objective, model, stage, recipe)
        return Predictor(Checkpoint(model), choice, trajectory=trajectory)

    def train_head(
        self,
        objective: engine.Objective[Any],
        checkpoint: Checkpoint,
        stage: str = "head",
        *,
        recipe: Recipe | None = None,
        fresh: bool = False,
    ) -> Predictor:
        """Train the last layer alone on features that are computed once, and select its epoch by the rung's rule.

        What the objective sees as images are features (B, d, 1, 1) of the evaluation transform, unscaled, and its model
        is a linear one whose trunk and neck pass them on: no example passes through a trunk, none is augmented. The
        head starts as the checkpoint's, or `fresh`, then with the same weights for all methods of the block.
        """
        head = checkpoint.model.head
        model = Backbone("identity", nn.Identity(), nn.Flatten(1), deepcopy(head), grad_cam="closed").to(self.device)
        if fresh:
            with self.seeded("head"):
                model.head = nn.Linear(head.in_features, head.out_features).to(self.device)
        plain = replace(recipe or self.recipe, augment="none", precision="fp32", channels_last=False, compile=False)
        pixels = {split: self._features(checkpoint, split) for split in get_args(Held)}
        choice, trajectory = self._selected(objective, model, stage, plain, **pixels)
        with self.stage(stage) as cost:
            cost.n_head_fits += 1
        return Predictor(checkpoint, choice, model.head.cpu(), trajectory)

    def _features(self, checkpoint: Checkpoint, split: Held) -> Pixels:
        """Features and labels of a split, as images of one pixel."""
        features, y = self.features(checkpoint, split).numpy(), self._seen.pixels(split).y.cpu().numpy()
        return Pixels(features[:, None, None], y, (0.0,), (1.0,), self.device)

    def _selected(
        self, objective: engine.Objective[Any], model: Backbone, stage: str, recipe: Recipe | None, **pixels: Pixels
    ) -> tuple[Choice, engine.Trajectory]:
        """Train a model and leave its selected epoch in it, or in a second fit the epoch that the first one chose."""
        made = self._earlier(stage)
        if made is not None:
            return made.choice, self._fit(objective, model, stage, recipe, stop=made.position, **pixels)
        trajectory = self._fit(objective, model, stage, recipe, selector=self.selector(), **pixels)
        choice = self._choice(trajectory.score, trajectory.step, len(trajectory.epochs))
        self.decisions.add(stage, trajectory.step, choice)
        return choice, trajectory

    def train_network(
        self, objective: engine.Objective[Any], model: Backbone, stage: str, *, recipe: Recipe | None = None
    ) -> Checkpoint:
        """Train a network that is not the classifier: nothing is evaluated or selected, its last epoch is kept."""
        self._fit(objective, model, stage, recipe, val=None)
        return Checkpoint(model)

    def _fit(
        self, objective: engine.Objective[Any], model: Backbone, stage: str, recipe: Recipe | None, **options: Any
    ) -> engine.Trajectory:
        recipe, stage = recipe or self.recipe, self._prefix + stage
        objective.setup(self, model)
        state = work_folder(self.spec.hash) / f"{self._lab.claim(stage)}.pt"
        # Under `@masked` a network may see annotated images alone: in most steps another number of them.
        usual = {"train": self._seen.pixels("train"), "autotuning": self.spec.policy != "masked"}
        training = self._lab.training(stage, state, recipe=recipe, **(usual | options))
        return engine.fit(objective, model, objective.make_sampler(self, recipe), training)

    def images(self, split: Held, size: int = 128) -> Iterator[Tensor]:
        """Batches of images (B, C, H, W) in order, under the evaluation transform; bill what is done with them."""
        return (batch.x for batch in self._seen.pixels(split).batches(size))

    def erm(self, epoch: int | None = None) -> Checkpoint:
        """The block's shared ERM, by default after its last epoch: chosen by no label."""
        return self._lab.erm_checkpoint(self._lab.erm(), epoch or self.recipe.epochs)

    def select_erm(self) -> Predictor:
        """The shared ERM trajectory with its epoch selected by the rung's rule.

        Trained anew on other images, with settings that a search found, and where trainings end early.
        """
        if self._seen.pool is not None or self.spec.tuned or self.recipe.patience:
            return self.train(engine.Objective[None](None))
        self._require_own()
        erm = self._lab.erm()
        predictions = erm.array("predictions")
        best, score = self.selector().best(predictions)
        epochs = [
            engine.Epoch(train, val, seen) for (train, val), seen in zip(erm.array("losses"), predictions, strict=True)
        ]
        checkpoint = self._lab.erm_checkpoint(erm, best + 1, billed=len(predictions))  # choosing needs all epochs
        choice = self._choice(score, best + 1, len(epochs))
        return Predictor(checkpoint, choice, trajectory=engine.Trajectory(epochs, best + 1, score))

    def features(self, checkpoint: Checkpoint, split: Held) -> Tensor:
        """Penultimate features (n, d), float32 on the CPU, under the evaluation transform."""
        return torch.cat([features for features, _ in self._seen.outputs(checkpoint, split)])

    def logits(self, checkpoint: Checkpoint, split: Held) -> Tensor:
        """Logits (n, K), float32 on the CPU, under the evaluation transform."""
        return torch.cat([logits for _, logits in self._seen.outputs(checkpoint, split)])

    def choose(
        self, predictions: Iterable[NDArray[np.integer[Any]]], rows: Indices | None = None
    ) -> tuple[int, Choice]:
        """Position of the best of several predictions (n_val,) by the rung's rule, and the record of the choice.

        It looks at all of validation that the rung lets it see, or at those images among `rows`.
        """
        return self.choose_repeatedly([(predictions, rows)])

    def choose_repeatedly(
        self, repeats: Iterable[tuple[Iterable[NDArray[np.integer[Any]]], Indices | None]]
    ) -> tuple[int, Choice]:
        """Position of the candidate with the best mean score over repeats, each with predictions of all candidates and
        the rows to score them on; see `choose`.
        """
        made = self._earlier("choose")
        if made is not None:
            return made.position, made.choice
        scores = [list(map(self.selector(rows), predictions)) for predictions, rows in repeats]
        means = [tuple(np.mean(same, axis=0).tolist()) for same in zip(*scores, strict=True)]
        best = first_best(means)
        choice = self._choice(means[best], None, len(means))
        self.decisions.add("choose", best, choice)
        return best, choice

    def _earlier(self, place: str) -> Decision | None:
        """The decision that the first fit made here, None in a first fit."""
        self._require_own()
        return self.decisions.earlier(place)

    def _require_own(self) -> None:
        """Raise `UserError` where something is being made that other runs share: it may not hold a selection."""
        shared = "a selection belongs to the run: move it out of task.cached, which other runs share"
        require(not self._lab.sharing, shared)

    def _choice(self, score: Score | None, step: int | None, candidates: int) -> Choice:
        value, *ties = score or (None,)
        return Choice(self.spec.rule, value, step, candidates, tuple(ties))
