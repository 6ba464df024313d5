"""What a worker on another machine does for a plan: one run, in the driver's home where it sees that, else in its own.

A worker's home is its own `$WORSTGROUP_HOME` where its node has set one, else the driver's where the same folder can be
seen, else the platform's cache folder. In a home of its own it keeps data and artifacts, but no records: they travel.
"""

import os
import pickle
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import torch

from .determinism import deterministic
from .errors import UserError
from .fingerprint import package_fingerprint
from .home import TEMPORARY, data_home, disk_errors, home, lock, runs_home, write_bytes
from .parcels import Get, local_store, local_weights, packed_record, unpack_store, unpack_weights
from .planning import code_now
from .record import record_path
from .registry import load_plugin
from .runner import run_spec
from .spec import RunSpec, digest
from .store import Store

STORE, WEIGHTS = "store", "weights"
"""What a worker may lack."""
_OWN_HOME = os.environ.get("WORSTGROUP_HOME", "")
_loaded: dict[str, bytes] = {}


@dataclass(frozen=True)
class Plugin:
    """A file of the user's: where the driver has it, what its module is called there, and its text."""

    path: Path
    name: str
    text: bytes


@dataclass(frozen=True)
class Order:
    """A run to make, and what it is to be made with; `probe` is a file in the driver's `home`."""

    spec: RunSpec
    store: Store
    candidates: Mapping[str, bytes]
    plugins: tuple[Plugin, ...]
    home: str
    probe: str
    session: str
    threads: int
    on_gpu: bool
    sharers: int
    same_bits: bool


class Answer(TypedDict, total=False):
    """What comes back: why nothing was done, or what the worker lacks, or the record and the seconds it took."""

    node: str
    refused: str
    lacks: list[str]
    record: bytes
    predictions: bytes | None
    seconds: float


def work(code: str, order: bytes, parcels: dict[str, Any], get: Get) -> Answer:
    """Make the run of a pickled `Order`; `parcels` holds what an earlier attempt said was lacking.

    `code` is the driver's package: under another one the order may not even be readable, and its hash would be wrong.
    """
    node = platform.node()
    if code != package_fingerprint():
        reason = "its worstgroup is not the one that the plan was made with; install the same version on every node"
        return {"node": node, "refused": reason}
    try:
        return {"node": node, **_work(pickle.loads(order), parcels, get, node)}
    except UserError as error:
        return {"node": node, "refused": str(error)}


def _work(order: Order, parcels: dict[str, Any], get: Get, node: str) -> Answer:
    shared = _settle(order)
    for plugin in order.plugins:
        _load(plugin)
    _check_code(order.spec)
    if not order.on_gpu:
        # Ray hides the GPUs of others, but not all of them from a run with none
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(order.threads)
    deterministic(order.same_bits)
    store, block = _store(order.store, shared), local_weights(order.spec.block)
    lacks = [what for what, found in ((STORE, store), (WEIGHTS, block)) if found is None and what not in parcels]
    if lacks:
        return {"lacks": lacks}
    store = store or unpack_store(parcels[STORE], order.store, get)
    block = block or unpack_weights(get(parcels[WEIGHTS]), order.spec.block)
    # seconds are compared within a session: one per node, and no host's name in a record that may be published
    session = digest([order.session, node])[:12]
    ready = replace(order, spec=replace(order.spec, block=block), store=store, session=session)
    start = time.perf_counter()
    content, predictions = _run(ready) if shared else _run_apart(ready)
    return {"record": content, "predictions": predictions, "seconds": time.perf_counter() - start}


def _settle(order: Order) -> bool:
    """Choose this worker's home; returns whether it is the driver's."""
    chosen = _OWN_HOME or (order.home if (Path(order.home) / order.probe).exists() else "")
    if chosen:
        os.environ["WORSTGROUP_HOME"] = chosen
    else:
        os.environ.pop("WORSTGROUP_HOME", None)
    return (home() / order.probe).exists()


def _load(plugin: Plugin) -> None:
    """Import a plugin, once in a worker's life, from where the driver has it or from a copy under the same name."""
    if plugin.name not in _loaded:
        path = plugin.path
        if not path.is_file() or path.read_bytes() != plugin.text:
            path = home() / "plugins" / digest(plugin.text.hex())[:16] / path.name
            write_bytes(path, plugin.text)
        load_plugin(path, plugin.name)
        _loaded[plugin.name] = plugin.text
    if _loaded[plugin.name] != plugin.text:
        raise UserError(f"--plugin {plugin.path}: it was edited since this worker has read it; start the program anew")


def _check_code(spec: RunSpec) -> None:
    """Raise `UserError` where the method, which may be of an installed package, is not what the run is named after."""
    if _code(spec.method, spec.source) != spec.code:
        raise UserError(f"{spec.label}: the method's code differs from the driver's; install the same on every node")


_code = cache(code_now)


def _store(store: Store, shared: bool) -> Store | None:
    if shared:  # a common folder may be mounted in two places
        return replace(store, path=data_home() / "store" / store.path.name)
    return local_store(store)


def _run(order: Order) -> tuple[bytes, bytes | None]:
    made = run_spec(order.spec, order.store, session=order.session, sharers=order.sharers)
    return packed_record(record_path(runs_home(), order.spec), made)


def _run_apart(order: Order) -> tuple[bytes, bytes | None]:
    """Make a run in a folder of its own: the node's records are its owner's, and must not grow or change by this."""
    own = record_path(runs_home(), order.spec)
    with disk_errors(home()):
        home().mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix=TEMPORARY, dir=home())
    with folder as name, lock(own):  # two plans may share the node, and the run's checkpoints
        path = record_path(Path(name), order.spec)
        for file, content in order.candidates.items():
            write_bytes(path.with_name(file), content)
        made = run_spec(order.spec, order.store, session=order.session, sharers=order.sharers, runs=Path(name))
        return packed_record(path, made)
