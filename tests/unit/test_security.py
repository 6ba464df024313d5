"""What the package's code may not do, read from its syntax trees; every exception stands here with its reason."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import worstgroup
from helpers import Call, edit, finish, put, start
from worstgroup.benchmark.record import find, read
from worstgroup.benchmark.registry import DATASETS
from worstgroup.commands import explain

ROOT = Path(worstgroup.__file__).parent
FILES = {
    str(path.relative_to(ROOT)): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in ("tests", "build", "dist") and "/." not in str(path.relative_to(ROOT))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
Rule = Callable[[ast.AST], bool]


def called(node: ast.AST) -> str:
    """Dotted name of what a call calls, `.name` where it is a method of something else; empty for other nodes."""
    if not isinstance(node, ast.Call):
        return ""
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    parts.append(function.id if isinstance(function, ast.Name) else "")
    return ".".join(reversed(parts))


def keyword(node: ast.AST, name: str) -> object:
    """A call's keyword argument, where it is a constant."""
    found = [part.value for part in getattr(node, "keywords", []) if part.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def imported(node: ast.AST) -> list[str]:
    """Full names of the foreign modules, and of what is taken from them, that a node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def calls(*names: str) -> Rule:
    """Calls by one of these names; `.name` is any method of that name."""
    return lambda node: any(called(node) == name or (name[0] == "." and called(node).endswith(name)) for name in names)


def imports(*names: str) -> Rule:
    """Imports of these modules or of something in them."""
    return lambda node: any(one == name or one.startswith(f"{name}.") for one in imported(node) for name in names)


def shows_text(node: ast.AST) -> bool:
    """A rich console printing text that is not written here, with markup in it being obeyed."""
    if not called(node).endswith((".print", "._say")) or called(node) == "print" or not isinstance(node, ast.Call):
        return False
    written = all(isinstance(part, ast.Constant) for part in node.args)
    return not written and keyword(node, "markup") is not False


RULES: dict[str, tuple[Rule, dict[str, str]]] = {
    "a pickle is loaded": (
        imports("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas.read_pickle"),
        {
            "benchmark/cluster.py": "orders to the user's own Ray workers, which run the user's code anyway",
            "benchmark/errands.py": "the worker's side of it: read once the driver's package is known to be the same",
        },
    ),
    "torch.load without weights_only=True": (
        lambda node: calls("torch.load", "torch.jit.load")(node) and keyword(node, "weights_only") is not True,
        {},
    ),
    "np.load that may unpickle": (
        lambda node: calls("np.load", "numpy.load")(node) and keyword(node, "allow_pickle") is not False,
        {},
    ),
    "a reader that takes what it gets": (calls("np.fromfile", "np.genfromtxt", "np.loadtxt"), {}),
    "torch's hub, which runs what it downloads": (
        calls("torch.hub.load", ".load_state_dict_from_url", "hub.load"),
        {},
    ),
    "YAML, which can make objects": (imports("yaml", "ruamel"), {}),
    "XML, which can name other files": (imports("xml", "lxml"), {}),
    "code made from text": (calls("eval", "exec", "compile", "__import__"), {}),
    "modules imported by a name that is computed": (
        calls("import_module", "importlib.import_module", ".exec_module", "importlib.util.spec_from_file_location"),
        {
            "__init__.py": "the public names, from a table of the package's own modules",
            "benchmark/registry.py": "files of the package's own folders, and plugins that the user has named",
        },
    ),
    "entry points of installed packages": (
        imports("importlib.metadata.entry_points"),
        {"benchmark/registry.py": "who installs a package runs its code; the groups are named worstgroup.*"},
    ),
    "other programs": (
        lambda node: (
            imports("subprocess", "pty", "commands")(node)
            or calls("os.system", "os.popen", "os.startfile")(node)
            or bool(re.fullmatch(r"os\.(exec|spawn|posix_spawn)\w*", called(node)))
            or keyword(node, "shell") is True
        ),
        {},
    ),
    "native code by hand": (imports("ctypes", "cffi"), {}),
    "the network": (
        imports("urllib.request", "http.client", "http.server", "socket", "requests", "httpx", "ftplib", "smtplib"),
        {
            "benchmark/download.py": "https alone, by people's wish alone; see test_download",
            "benchmark/cluster.py": "knocks at the Ray address that the user has named, and sends nothing",
        },
    ),
    "plain http": (
        lambda node: (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(re.search(r"\bhttp://", node.value))
        ),
        {},
    ),
    "TLS that is not checked": (
        lambda node: (
            calls("ssl._create_unverified_context", "ssl.create_default_context", "ssl.SSLContext")(node)
            or keyword(node, "verify") is False
        ),
        {},
    ),
    "an archive opened": (
        imports("tarfile", "zipfile", "shutil.unpack_archive"),
        {
            "benchmark/archives.py": "the one place that unpacks: files and folders only, below one folder",
            "benchmark/artifacts.py": "reads checksums of a torch file; nothing is unpacked",
            "benchmark/predictions.py": "reads .npy members into memory, of bounded size; nothing is unpacked",
            "benchmark/store.py": "the name of an error",
        },
    ),
    "an archive unpacked by the standard library": (
        lambda node: (
            calls(".extractall", "shutil.unpack_archive")(node)
            or (calls(".extract")(node) and isinstance(node, ast.Call) and len(node.args) > 0)
        ),
        {},
    ),
    "a temporary name that another may take first": (
        lambda node: calls("tempfile.mktemp")(node) or imports("tempfile.mktemp", "tempfile.NamedTemporaryFile")(node),
        {},
    ),
    "a template that does not escape": (
        lambda node: (
            (calls("Environment", "jinja2.Environment", "jinja2.Template", "Template")(node))
            and keyword(node, "autoescape") is not True
        ),
        {},
    ),
    "text declared to be markup": (
        calls("Markup", "markupsafe.Markup", ".Markup"),
        {"leaderboard/page.py": "the package's own style and scripts, and JSON without a `<`"},
    ),
    "CSV written past write_csv, which disarms formulas": (
        calls("csv.writer", "csv.DictWriter"),
        {"leaderboard/render.py": "write_csv itself"},
    ),
    "console markup in text": (
        shows_text,
        {
            "benchmark/cluster.py": "a line handed to `run`, which prints it without markup",
            "commands/console.py": "what failed is red; names and errors in the line are escaped",
            "commands/terminal.py": "tables, whose cells are escaped where they are made",
        },
    ),
}


def offences(rule: Rule) -> Iterator[tuple[str, int]]:
    for name, tree in TREES.items():
        yield from ((name, getattr(node, "lineno", 0)) for node in ast.walk(tree) if rule(node))


@pytest.mark.parametrize("what", RULES)
def test_the_package_does_no_such_thing(what: str) -> None:
    rule, allowed = RULES[what]
    found = list(offences(rule))
    assert [f"{name}:{line}" for name, line in found if name not in allowed] == []
    assert {name for name, _ in found} == set(allowed), "an exception that is no longer needed"


# -------------------------------------------------------------------------------------------------------- downloads

UNPUBLISHED = {
    "waterbird_complete95_forest2water2.tar.gz": "Stanford's page names no checksum",
    "metashift.tar.gz": "its authors publish none",
    "spawrious224__entire_dataset.tar.gz": "its authors publish none",
    "spawrious224__o2o_easy.tar.gz": "its authors publish none",
    "spawrious224__o2o_medium.tar.gz": "its authors publish none",
    "spawrious224__o2o_hard.tar.gz": "its authors publish none",
}
"""Files that are fetched without a checksum to hold them against: then https, the archive's own checksum and the card's
group counts stand for them."""


def test_what_is_fetched_comes_over_https_with_a_checksum_where_one_is_published() -> None:
    sources = {one for name in DATASETS for card in DATASETS[name].cards.values() for one in card.sources}
    fetched = {source for source in sources if source.urls}
    assert len(fetched) > 10
    assert all(url.startswith("https://") for source in fetched for url in source.urls)
    assert {source.file for source in fetched if not source.md5} == set(UNPUBLISHED)


# ---------------------------------------------------------------------------------------------------------- plugins

PLANTED = "from pathlib import Path\nPath('{mark}').write_text('run')\n"


def test_a_file_that_was_not_named_is_not_run(
    call: Call, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, here = tmp_path / "mark", tmp_path / "here"
    for folder in (root / place for root in (here, home) for place in (".", "methods", "datasets", "worstgroup")):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("planted", "conftest", "sitecustomize", "erm", "tiny", "typer"):
            (folder / f"{name}.py").write_text(PLANTED.format(mark=mark))
    monkeypatch.chdir(here)
    result = finish(start(home, "show", "erm"))
    assert result.code == 0, result.err
    assert not mark.exists()
    assert call("ls", "methods", "--plugin", "methods/planted.py").code == 0
    assert mark.read_text() == "run"


# ------------------------------------------------------------------------------------------------------------ markup


def test_a_name_in_brackets_is_shown_and_not_obeyed(call: Call, runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "[red]none"
    folder.mkdir()
    assert f"No finished run in {folder}" in call("board", folder).out
    for path in find(runs):
        text = path.read_text()
        path.write_text(text.replace('"stripe"', '"x[/x]"').replace('"gap_stripe"', '"gap_x[/x]"'))
        edit(path, put("run", read(path).identity_hash()))
    result = call("board")
    assert (result.code, result.err) == (0, "")
    assert "gap_x[/x]" in result.out


def test_a_table_of_explain_holds_no_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain._write(tmp_path / "t", [{"=1+1": "@SUM(1)", "n": -1.5}, {"=1+1": "\x1b[2J", "n": None}])
    assert (tmp_path / "t.csv").read_text().splitlines() == ["'=1+1,n", "'@SUM(1),-1.5", " [2J,"]
    assert "\x1b" not in capsys.readouterr().out
