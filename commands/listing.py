"""What `ls` and `show` print about registry entries, suites and runs."""

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import rich.table
from rich.markup import escape

from ..benchmark import record
from ..benchmark.budget import RUNGS, Budget, Requires
from ..benchmark.errors import CorruptFile, UnknownName, printable
from ..benchmark.home import runs_home
from ..benchmark.planning import find_card
from ..benchmark.pools import open_pool
from ..benchmark.registry import BACKBONES, DATASETS, METHODS, SOURCES, MethodEntry
from ..benchmark.search import ranges
from ..benchmark.spec import PROTOCOL, PSEUDO, Card, RunSpec
from ..benchmark.staleness import stale
from ..benchmark.store import Store
from ..benchmark.store import prepared as prepared_store
from ..benchmark.suite import read_suite, suite_names
from ..benchmark.tuning import Sweep, first_best, frozen


def table(kind: str) -> rich.table.Table:
    """All entries of a kind."""
    if kind == "methods":
        rows = [(name, METHODS[name].requires.native, METHODS[name].summary) for name in METHODS]
        return _table(("method", "native budget", "what it does"), rows)
    if kind == "sources":
        built_in = [
            ("(none)", "the true groups, within the budget"),
            ("@class", "classes in place of groups"),
            ("@pseudo", f"attributes predicted from the granted ones (+{PSEUDO})"),
            ("@subset", "the true groups, fine-tuning ERM on the annotated images only"),
            (
                "@masked",
                "the true groups of the annotated images (validation's are trained on too), the class loss on all",
            ),
        ]
        return _table(
            ("source", "what groups are"),
            [*built_in, *((f"+{name}", SOURCES[name].summary.partition(": ")[2]) for name in SOURCES)],
        )
    if kind == "datasets":
        cards = [card for name in DATASETS for card in DATASETS[name].cards.values()]
        shown = [_dataset_row(card) for card in cards]
        return _table(("dataset", "classes x values", "image", "ready", "title"), shown)
    if kind == "backbones":
        found = [(name, ", ".join(BACKBONES[name].weights), BACKBONES[name].summary) for name in BACKBONES]
        return _table(("backbone", "weights", "what it is"), found)
    if kind == "budgets":
        return _table(
            ("budget", "selection", "what it grants"),
            [(r.name, r.criterion, r.summary + (" (optional)" if r.optional else "")) for r in RUNGS.values()],
        )
    return _table(("suite", "what it runs"), [(name, read_suite(name).summary) for name in suite_names()])


def runs(*, only_stale: bool = False) -> tuple[rich.table.Table, list[str]]:
    """All runs of the home, and what is wrong with the records that cannot be read."""
    rows, problems = [], []
    for path in record.find(runs_home()) if runs_home().is_dir() else ():
        try:
            run = record.read(path)
        except CorruptFile as error:
            problems.append(str(error))
            continue
        changed = bool(stale(run))
        if changed or not only_stale:
            state = run.status + (", stale" if changed else "")
            rows.append(
                (run.dataset, run.backbone, _drawn(run), run.budget, str(run.seed), state, run.created, run.run[:12])
            )
    headings = ("dataset", "backbone", "method", "budget", "seed", "state", "created", "run")
    return _table(headings, rows), problems


def draws_table(sweep: Sweep, records: Mapping[str, record.RunRecord]) -> rich.table.Table:
    """Every draw of a search: what it changed, what it scored, what it cost; `*` marks the chosen one."""
    scores = sweep.scores(records)
    best, own = first_best(scores), _defaults(sweep.runs[0])
    rows = []
    for spec, found in zip(sweep.candidates, scores, strict=True):
        made = records[spec.hash]
        settings = {**dict(spec.config), **dict(spec.source_config)}
        changed = {key: kept for key, kept in settings.items() if kept != own[key]}
        changed |= {f"recipe.{key}": kept for key, kept in spec.tuned}
        shown = " ".join(f"{key}={kept}" for key, kept in changed.items()) or "the defaults"
        score = made.error if found is None else f"{100 * found[0]:.1f}"
        seconds = f"{made.cost.scratch.device_s:.1f} s" if made.cost else ""
        rows.append((f"{spec.draw}{' *' if spec.draw == best else ''}", shown, score, seconds))
    return _table(("draw", "settings", sweep.runs[0].rule, "cost from scratch"), rows)


def _defaults(spec: RunSpec) -> dict[str, Any]:
    """Settings of method and source that nobody has changed."""
    entries = [METHODS[spec.method], *([SOURCES[spec.source]] if spec.source else [])]
    return {key: value for entry in entries for key, value in frozen(entry.config())}


def state(card: Card) -> str:
    """Whether a dataset can be run on at once, and if not, how one gets it."""
    try:
        if prepared_store(card) is not None:
            return "ready"
    except CorruptFile:
        return "damaged"
    if not card.classes:
        return "--root"
    if not (card.sources or card.by_hand):
        return "built in"
    if card.fetch_unasked:
        return "fetched by run"
    return "by hand" if card.by_hand else "prepare --download"


def prepared(store: Store) -> str:
    """What `prepare` made: groups with their counts, size and fingerprint."""
    card = store.card
    pools = {key: open_pool(key) for key in store.pools.values()}
    images, size = sum(len(pool) for pool in pools.values()), sum(pool.nbytes for pool in pools.values())
    shape = "x".join(map(str, card.image))
    what = f"pictures of {shape}" if card.dtype == "uint8" else f"rows of {card.image[2]} features"
    lines = [
        f"{card.name} is ready: {images:,} {what}, {size / 2**20:,.1f} MiB",
        f"store: {store.path}",
        f"fingerprint: {store.fingerprint}",
        *_groups(card),
    ]
    return "\n".join(lines)


def _groups(card: Card) -> list[str]:
    """A line per group with its counts."""
    if not card.counts:
        totals = ", ".join(f"{name} {size:,}" for name, size in card.sizes.items())
        return [f"images: {totals}" if totals else "images: as many as the files hold"]
    lines = [f"images per group ({' / '.join(card.counts)})"]
    width = max(len(group) for group in card.group_names())
    for g, group in enumerate(card.group_names()):
        counts = [card.counts[name][g] for name in card.counts]
        if any(counts):
            lines.append(f"  {group:<{width}}  " + " / ".join(f"{n:,}" for n in counts))
    return lines


def _drawn(run: record.RunRecord) -> str:
    """Method of a run, and which draw it is of a search, or was chosen of how many."""
    if run.candidates:
        return f"{run.label} (draw {run.draw} of {len(run.candidates)})"
    return f"{run.label} (draw {run.draw})" if run.draw else run.label


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> rich.table.Table:
    shown = rich.table.Table(header_style="bold")
    for i, heading in enumerate(headings):
        shown.add_column(heading, no_wrap=i == 0)
    for row in rows:
        shown.add_row(*(escape(printable(cell)) for cell in row))
    return shown


def card(name: str) -> str:
    """The card of one entry as text; raises `UnknownName` when nothing is called so."""
    base = name.partition(":")[0]
    if base in DATASETS:
        return _dataset(find_card(name)[1])
    if name in METHODS:
        return _method("method", METHODS[name])
    if name.removeprefix("+") in SOURCES:
        return _method("source", SOURCES[name.removeprefix("+")])
    host, _, source = name.partition("+")
    if host in METHODS and source in SOURCES:
        return _method("method", METHODS[host]) + "\n\n\n" + _method("source", SOURCES[source])
    if base in BACKBONES:
        entry = BACKBONES[base]
        weights = f"weights: {', '.join(entry.weights)}"
        return f"backbone {entry.name}\n\n{inspect.getdoc(entry.build) or ''}\n\n{weights}"
    if name in RUNGS:
        rung = RUNGS[name]
        return f"budget {rung.name}\n\n{rung.summary}\nselection: {rung.criterion}"
    if name in suite_names() or name.endswith(".toml"):
        return _suite(name)
    known = [*DATASETS, *METHODS, *SOURCES, *BACKBONES, *RUNGS, *suite_names()]
    raise UnknownName("name", name, known, "See `worstgroup ls --help`.")


def _dataset_row(card: Card) -> tuple[str, ...]:
    """A card without classes stands for users' own data."""
    shape, image = " x ".join(map(str, card.shape)), "x".join(map(str, card.image))
    if not card.classes:
        shape = image = "as found"
    return card.name, shape, image, state(card), card.title


def _dataset(card: Card) -> str:
    lines = [f"dataset {card.name}", "", card.title, "", f"classes: {', '.join(card.classes) or 'as found'}"]
    for attribute in card.attributes:
        pairs = [f"{attribute.values[v]} with {card.classes[y]}" for y, v in enumerate(attribute.aligned)]
        pairs = pairs or ["found in train"]
        ratio = "" if attribute.train_ratio is None else f" on {100 * attribute.train_ratio:.3g} % of train"
        lines.append(f"attribute {attribute.name}: {', '.join(attribute.values)}; aligned: {', '.join(pairs)}{ratio}")
    if card.classes:
        lines.append(f"image: {' x '.join(map(str, card.image))}")
    for name, transform in card.transforms.items():
        chosen = " (default)" if transform is card.pixels else ""
        lines.append(f"transform {name}{chosen}: {transform.steps or 'none'}")
    if card.environments:
        lines.append(f"training environments: {', '.join(card.environments)}")
    if card.interventions:
        lines.append(f"interventions rendered on train images: {', '.join(card.interventions)}")
    lines += ["", *_groups(card)]
    recipe = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(card.recipe).items())
    lines += ["", f"default backbone: {card.backbone}, weights {card.weights}", f"default recipe: {recipe}"]
    lines += [f"parameter {key}: {_plain(value)}" for key, value in card.params.items()]
    lines += [f"licence: {card.licence}", *([f"by hand: {card.by_hand}"] if card.by_hand else [])]
    lines += [f"citation: {card.citation}", *(f"source: {' '.join([s.file, *s.urls])}" for s in card.sources)]
    return "\n".join([*lines, *(f"note: {note}" for note in card.notes)])


def _suite(name: str) -> str:
    suite = read_suite(name)
    lines = [f"suite {name}", "", suite.summary, f"seeds: {suite.seeds}"]
    if suite.protocol != PROTOCOL:
        lines.append(f"protocol {suite.protocol}" + (f", selection {suite.selection}" if suite.selection else ""))
    if suite.tuning:
        lines.append(f"settings: the best of {suite.tuning} draws")
    lines.append("")
    for request in suite.requests():
        own = {key: value for key, value in request.settings.items() if key.partition(".")[0] not in ("recipe", "data")}
        host = re.split(r"[+@]", request.method)[0]
        shown = [f"{key}={value}" for key, value in own.items() if key.rpartition(".")[0] in ("", host)]
        line = f"{request.dataset} · {request.backbone or 'default backbone'} · {request.method} {request.budget}"
        lines.append(" ".join([line.rstrip(), *shown]))
    return "\n".join(lines)


def _plain(value: object) -> str:
    return str(value).replace("'", "") or "none"


def _method(kind: str, entry: MethodEntry) -> str:
    needs = entry.requires
    lines = [f"{kind} {entry.name}", "", inspect.getdoc(entry.cls) or "", "", f"paper: {entry.paper}"]
    lines.append(f"fits on attributes of: {needs.fit}; native budget: {needs.native}")
    if needs.rendered:
        lines.append("privileged: trains on rendered interventions, n/a where a dataset has none")
    if needs.fit != "none":
        lines += [f"at {name}: {_at(needs, name)}" for name in ("none", "val-20")]
    fields = dataclasses.fields(entry.config)
    found = ranges(entry.config)
    searched = {f.name: f"    searched in {found[f.name]}" if f.name in found else "" for f in fields}
    lines += ["", "settings:" if fields else "no settings"]
    lines += [f"  {f.name} = {f.default!r}{searched[f.name]}" for f in fields]
    if fields:
        lines += ["", "\n\n".join(_explained(entry.config))]
    return "\n".join(lines)


def _explained(config: type[Any]) -> Iterator[str]:
    """What a configuration says about its settings, after what those say that it extends."""
    for part in reversed(config.__mro__):
        if dataclasses.is_dataclass(part) and (text := vars(part).get("__doc__")):
            yield inspect.cleandoc(text)


def _at(needs: Requires, rung: str) -> str:
    """How a method runs at a rung, in words."""
    policy = needs.resolve(Budget(rung))
    return policy.reason or {"": "as it is", "carried": "as it is"}.get(policy.tag, f"@{policy.tag}")
