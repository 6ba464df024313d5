import importlib.util
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from worstgroup.benchmark import fingerprint, registry
from worstgroup.benchmark.backbones import BUILT_IN, Backbone
from worstgroup.benchmark.budget import Requires
from worstgroup.benchmark.errors import UnknownName, UserError
from worstgroup.benchmark.fingerprint import code_fingerprint, engine_fingerprint
from worstgroup.benchmark.registry import BACKBONES, DATASETS, METHODS, MethodEntry, Registry, load_plugin, method

NOTHING = "benchmark.suites"
"""A package without modules, to discover nothing in."""
PLUGIN = """
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.registry import method
from worstgroup.benchmark.budget import Requires

@method("NAME", paper="none", requires=Requires())
class Plugin(Objective):
    pass
"""


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Registry[MethodEntry]:
    """An empty registry in the place of `METHODS`."""
    empty: Registry[MethodEntry] = Registry("method", NOTHING)
    monkeypatch.setattr(registry, "METHODS", empty)
    return empty


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    """Forget the modules that a test imported from files."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("plugin_", "worstgroup_plugin_", "worstgroup.methods.blocks.made")):
            del sys.modules[name]


# ----------------------------------------------------------------------------------------------------------- look-up


@pytest.mark.parametrize(
    ("entries", "name", "offer"),
    [
        (METHODS, "grupdro", "unknown method 'grupdro'. Did you mean groupdro"),
        (DATASETS, "digits", "unknown dataset 'digits'. Did you mean digits2"),
        (BACKBONES, "tinycnn", "unknown backbone 'tinycnn'. Did you mean tiny_cnn"),
    ],
)
def test_an_unknown_name_offers_the_closest(entries: Registry[object], name: str, offer: str) -> None:
    assert name not in entries
    with pytest.raises(UnknownName) as error:
        entries[name]
    assert str(error.value).startswith(offer)
    assert str(error.value).endswith(f"? See `worstgroup ls {entries.kind}s`.")


def test_a_name_like_no_other_gets_the_whole_list() -> None:
    things: Registry[int] = Registry("thing", NOTHING)
    with pytest.raises(UnknownName, match="Known: none"):
        things["zzz"]
    things.add("beta", 2)
    things.add("alpha", 1)
    with pytest.raises(UnknownName, match=r"unknown thing 'zzz'\. Known: alpha, beta\."):
        things["zzz"]
    assert list(things) == ["alpha", "beta"]
    assert things["beta"] == 2


def test_an_unknown_variant_offers_whole_names() -> None:
    with pytest.raises(UnknownName, match=r"unknown dataset variant 'digits2:bal'. Did you mean digits2:balval"):
        DATASETS["digits2"].card("bal")


def test_methods_of_the_folder_are_found() -> None:
    assert {"erm", "groupdro", "reweight", "resample", "jtt", "dfr"} <= set(METHODS)
    assert METHODS["erm"].summary == "ERM: minimise the mean training loss."


def test_a_name_is_taken_once(methods: Registry[MethodEntry]) -> None:
    things: Registry[int] = Registry("thing", NOTHING)
    things.add("a", 1)
    with pytest.raises(UserError, match="two things are called 'a'; rename one of them"):
        things.add("a", 1)


def entry_points(monkeypatch: pytest.MonkeyPatch, value: str) -> Registry[int]:
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("mine", value, group)])
    return Registry("thing", NOTHING, "worstgroup.things")


def test_an_entry_point_is_loaded_on_first_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "plugin_loaded.py").write_text("MARK = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    things = entry_points(monkeypatch, "plugin_loaded")
    assert "plugin_loaded" not in sys.modules
    assert list(things) == []
    assert sys.modules["plugin_loaded"].MARK == 1


def test_an_entry_point_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    things = entry_points(monkeypatch, "plugin_that_is_not_there")
    with pytest.raises(UserError, match=r"behind entry point 'mine' \(worstgroup.things\) cannot be loaded: No module"):
        things["anything"]


# --------------------------------------------------------------------------------------------------------- decorators


@dataclass(frozen=True)
class WithDefaults:
    rate: float = 0.1
    grid: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Without:
    steps: int
    rate: float = 0.1


class Fits:
    def fit(self, task: object) -> None: ...


def test_a_method_is_registered_with_what_it_declares(methods: Registry[MethodEntry]) -> None:
    requires = Requires(fit="val", native="val")
    method("mine", paper="a paper", requires=requires, config=WithDefaults)(Fits)
    entry = methods["mine"]
    assert (entry.cls, entry.config, entry.requires, entry.paper) == (Fits, WithDefaults, requires, "a paper")


@pytest.mark.parametrize("config", [Without, dict])
def test_a_config_without_defaults_is_refused(methods: Registry[MethodEntry], config: type) -> None:
    with pytest.raises(UserError, match="method 'mine': config must be a dataclass with a default for every field"):
        method("mine", paper="", requires=Requires(), config=config)(Fits)
    assert "mine" not in methods


def test_a_class_that_neither_fits_nor_has_a_loss_is_refused(methods: Registry[MethodEntry]) -> None:
    with pytest.raises(UserError, match="method 'mine' needs `loss"):
        method("mine", paper="", requires=Requires())(type("Mine", (), {}))
    assert "mine" not in methods


# ------------------------------------------------------------------------------------------------------------ plugins


def test_a_plugin_registers_its_method(methods: Registry[MethodEntry], tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    path.write_text('"""First line.\n\nMore."""\n' + PLUGIN.replace("NAME", "mine"))
    load_plugin(path)
    assert list(methods) == ["mine"]
    assert methods["mine"].summary == "First line."
    assert len(code_fingerprint(sys.modules[methods["mine"].cls.__module__])) == 16


def test_a_plugin_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--plugin .*nowhere.py: there is no such file"):
        load_plugin(tmp_path / "nowhere.py")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("broken.py", "def f(:\n", "SyntaxError: invalid syntax"),
        ("broken.py", "import nothing_of_that_name\n", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("broken.py", "1 / 0\n", "ZeroDivisionError: division by zero"),
        ("broken.py", "\xff\x00", "null bytes"),
        ("broken.txt", "", "not a Python file"),
        ("broken.py", 2 * PLUGIN, "two methods are called 'NAME'"),
    ],
)
def test_a_broken_plugin_is_named(
    methods: Registry[MethodEntry], tmp_path: Path, name: str, text: str, says: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_plugin(tmp_path / name)
    assert str(error.value).startswith(f"--plugin {tmp_path / name}: ")
    assert says in str(error.value)


def test_plugins_of_one_stem_keep_their_own_code(methods: Registry[MethodEntry], tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plugin.py").write_text(PLUGIN.replace("NAME", name))
        load_plugin(tmp_path / name / "plugin.py")
    files = {name: sys.modules[methods[name].cls.__module__].__file__ for name in methods}
    assert files == {name: str(tmp_path / name / "plugin.py") for name in methods}


# ------------------------------------------------------------------------------------------------------- fingerprints

CODE = """
    LIMIT = 3

    class Host:
        def fit(self, task):
            return task.erm() if LIMIT > 2 else None
"""
Load = Callable[[str, str], ModuleType]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Import code as a module of a given name, each time from a new file."""
    files = 0

    def make(name: str, code: str) -> ModuleType:
        nonlocal files
        files += 1
        path = tmp_path / f"file_{files}.py"
        path.write_text(textwrap.dedent(code))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return make


COMMENTED = '''
    """A docstring."""
    # a comment
    LIMIT = (
        3
    )

    class Host:
        """Another."""

        def fit(self, task):  # one more
            """And another."""

            return task.erm() if (LIMIT > 2) else None
'''


def test_comments_docstrings_and_layout_do_not_count(load: Load) -> None:
    assert code_fingerprint(load("plugin_host", COMMENTED)) == code_fingerprint(load("plugin_host", CODE))


def test_a_function_of_a_docstring_only_is_empty(load: Load) -> None:
    plain = code_fingerprint(load("plugin_host", "def f():\n    pass\n"))
    assert code_fingerprint(load("plugin_host", 'def f():\n    """Say."""\n')) == plain


def test_a_docstring_of_a_constant_does_not_count(load: Load) -> None:
    documented = CODE.replace("LIMIT = 3\n", 'LIMIT = 3\n    """How many."""\n')
    assert code_fingerprint(load("plugin_host", documented)) == code_fingerprint(load("plugin_host", CODE))


@pytest.mark.parametrize(
    ("old", "new"), [("LIMIT = 3", "LIMIT = 4"), ("> 2", ">= 2"), ("def fit", "def loss"), ("task.erm()", "'text'")]
)
def test_code_counts(load: Load, old: str, new: str) -> None:
    changed = code_fingerprint(load("plugin_host", CODE.replace(old, new)))
    assert changed != code_fingerprint(load("plugin_host", CODE))


IMPORTS = {
    "function": "from worstgroup.methods.blocks.made import double",
    "class": "from worstgroup.methods.blocks.made import Double",
    "module": "from worstgroup.methods.blocks import made",
}
BLOCK = """
    FACTOR = 2

    class Double: ...

    def double(x):
        return FACTOR * x
"""


@pytest.fixture
def host_on_block(load: Load, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """The fingerprint of a host that imports something from a block with the given code."""
    import worstgroup.methods.blocks as package

    def make(line: str, block: str) -> str:
        module = load("worstgroup.methods.blocks.made", block)
        monkeypatch.setattr(package, "made", module, raising=False)
        return code_fingerprint(load("plugin_host", line))

    return make


@pytest.mark.parametrize("line", IMPORTS.values(), ids=IMPORTS)
def test_an_imported_block_counts(host_on_block: Callable[[str, str], str], line: str) -> None:
    before = host_on_block(line, BLOCK)
    assert host_on_block(line, BLOCK) == before
    assert host_on_block(line, BLOCK + "    # a comment\n") == before
    assert host_on_block(line, BLOCK.replace("= 2", "= 3")) != before


def test_a_block_of_which_only_a_constant_is_imported_counts(host_on_block: Callable[[str, str], str]) -> None:
    line = "from worstgroup.methods.blocks.made import FACTOR"
    assert host_on_block(line, BLOCK.replace("= 2", "= 3")) != host_on_block(line, BLOCK)


def test_a_block_that_is_not_imported_does_not_count(host_on_block: Callable[[str, str], str]) -> None:
    assert host_on_block("LIMIT = 3", BLOCK) == host_on_block("LIMIT = 3", BLOCK.replace("= 2", "= 3"))


def test_blocks_of_blocks_count(load: Load) -> None:
    def host(factor: int) -> str:
        load("worstgroup.methods.blocks.made", BLOCK.replace("= 2", f"= {factor}"))
        load("worstgroup.methods.blocks.made_of", "from worstgroup.methods.blocks.made import double as twice")
        return code_fingerprint(load("plugin_host", "from worstgroup.methods.blocks.made_of import twice"))

    assert host(2) != host(3)


def test_the_engine_has_a_fingerprint() -> None:
    assert len(engine_fingerprint()) == 16


def test_the_models_of_the_engine_are_in_its_fingerprint() -> None:
    """Runs with them have no fingerprint of their backbone's code: a shared ERM must not outlive an edit of it."""
    homes = {f"{registry.PACKAGE}.benchmark.{name}" for name in fingerprint.ENGINE}
    assert {BUILT_IN[0], Backbone.__module__} < homes
    assert set(BUILT_IN) == {entry.build.__module__ for entry in map(BACKBONES.__getitem__, BACKBONES)} & homes


def test_dfr_counts_its_blocks() -> None:
    seen: dict[str, str] = {}
    module = sys.modules[METHODS["dfr"].cls.__module__]
    fingerprint._collect(module.__name__, Path(str(module.__file__)), seen)
    assert {f"worstgroup.methods.{name}" for name in ("dfr", "blocks.balance", "blocks.last_layer")} <= set(seen)
    assert "worstgroup.methods.jtt" not in seen
