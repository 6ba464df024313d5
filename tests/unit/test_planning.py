"""What is refused before any work, and what a run is identified by: settings, backbones, names."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from formats.drawn import write_drawn
from helpers import Call
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.planning import Plan, Request, plan
from worstgroup.benchmark.record import read, record_path
from worstgroup.benchmark.registry import BACKBONES, DATASETS, load_plugin
from worstgroup.benchmark.runner import run_spec, runs_home
from worstgroup.benchmark.spec import MethodName
from worstgroup.benchmark.suite import read_suite
from worstgroup.leaderboard.verify import verify

pytestmark = pytest.mark.usefixtures("tiny")


def planned(methods: str, *, backbone: str = "", extra: str = "", budget: str = "", **settings: str) -> Plan:
    """Plan some methods, separated by commas, as one call; a setting's dot is written as two underscores."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    return plan(
        [
            Request("tiny", name, budget, backbone, seeds=(0,), settings=changes, extra=extra)
            for name in methods.split(",")
        ]
    )


def problems(methods: str, *, backbone: str = "", **settings: str) -> list[str]:
    """What is wrong with a call, line by line."""
    with pytest.raises(UserError) as refusal:
        planned(methods, backbone=backbone, **settings)
    return str(refusal.value).splitlines()


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("methods", "key", "part"),
    [
        ("dfr", "exmap.clusters", "exmap"),
        ("dfr", "groupdro.step_size", "groupdro"),
        ("dfr+exmap,erm", "groupdro.step_size", "groupdro"),
        ("groupdro@class,dfr(+val)", "exmap.side", "exmap"),
    ],
)
def test_a_setting_that_reaches_no_run_is_refused(methods: str, key: str, part: str) -> None:
    says = f"setting {key} reaches no run: {part} has no part in {methods.replace(',', ', ')}"
    assert problems(methods, **{key: "4"}) == [says]


def test_a_range_that_reaches_no_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"search dann\.weight reaches no run: dann has no part in erm"):
        plan([Request("tiny", "erm", tuning=2, ranges={"dann.weight": "U(0,1)"})])


def test_a_search_has_at_least_two_draws() -> None:
    with pytest.raises(UserError, match="tuning must be 0"):
        plan([Request("tiny", "erm", tuning=1)])


@pytest.mark.parametrize("part", ["blocks = []", "dataset = []", "methods = []", '[blocks.grid]\n"irm.weight" = []'])
def test_a_suite_of_nothing_is_refused(tmp_path: Path, part: str) -> None:
    block = {"dataset": 'dataset = "tiny"', "methods": 'methods = ["irm"]'}
    key = part.partition(" ")[0]
    lines = [*(line for name, line in block.items() if name != key), part]
    path = tmp_path / "own.toml"
    path.write_text("\n".join(['summary = "own"', *([part] if key == "blocks" else ["[[blocks]]", *lines])]))
    with pytest.raises(UserError, match=r"blocks.*(at least 1 item|valid string)"):
        read_suite(str(path))


@pytest.mark.parametrize(
    ("methods", "key", "value", "settings"),
    [
        ("groupdro,dfr", "groupdro.step_size", "0.5", {"groupdro": 0.5, "dfr": None}),
        ("groupdro@class(+val),dfr", "groupdro.step_size", "0.5", {"groupdro": 0.5, "dfr": None}),
        ("dfr,erm,dfr", "dfr.n_min", "5", {"dfr": None, "erm": None}),
    ],
)
def test_a_setting_reaches_the_method_it_names(
    methods: str, key: str, value: str, settings: dict[str, float | None]
) -> None:
    specs = [run.spec for run in planned(methods, budget="val", **{key: value}).runs]
    for spec in specs:
        assert spec is not None
        assert dict(spec.config).get("step_size") == settings[spec.method]
        assert dict(spec.config).get("n_min") == (None if spec.method != "dfr" else 5 if key == "dfr.n_min" else 0)


def test_a_setting_reaches_the_source_it_names() -> None:
    with_source, without = (run.spec for run in planned("dfr+exmap,dfr", exmap__clusters="4").runs)
    assert with_source is not None
    assert without is not None
    assert dict(with_source.source_config)["clusters"] == 4
    assert without.source_config == ()


@pytest.mark.parametrize("methods", ["dfr", "groupdro@pseudo", "groupdro+predictor"])
def test_a_setting_that_the_predictor_does_not_have_is_refused(methods: str) -> None:
    (problem,) = problems(methods, predictor__epochs="4")
    assert problem == "unknown predictor key 'epochs'. Known: balanced."


def test_all_mistakes_are_told_at_once() -> None:
    found = problems("dfr", exmap__clusters="4", dfr__nmin="1", recipe__epoch="2")
    assert [line.split(".")[0] for line in found] == [
        "unknown recipe key 'epoch'",
        "unknown dfr key 'nmin'",
        "setting exmap",
    ]


# ------------------------------------------------------------------------------------------------------------ pixels


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """The folder of the dataset `drawn`, which is registered."""
    if "drawn" not in DATASETS:
        load_plugin(Path(__file__).parents[1] / "fixtures" / "drawnset.py")
    return write_drawn(tmp_path / "drawn")


PIXELS: list[dict[str, str]] = [{}, {"data.size": "8"}, {"data.transform": "center"}]
PIXELS += [{"data.transform": "center", "data.size": "9"}]


def test_other_pixels_are_another_dataset(drawn: Path) -> None:
    requests = [Request("drawn", method, seeds=(0,), settings=part) for part in PIXELS for method in ("erm", "dfr")]
    made = plan(requests, drawn)
    assert {name: store.card.image for name, store in made.stores.items()} == {
        "drawn": (16, 16, 3),
        "drawn[8px]": (8, 8, 3),
        "drawn[center]": (12, 12, 3),
        "drawn[center,9px]": (9, 9, 3),
    }
    blocks = [run.spec.block for run in made.runs if run.spec]
    assert [block.dataset for block in blocks] == [name for name in made.stores for _ in range(2)]
    assert len({block.fingerprint for block in blocks}) == len({block.key for block in blocks}) == len(PIXELS)
    for name, store in made.stores.items():
        assert store.split("val").images[:1].shape[1:] == store.card.image, name
        assert store.card.counts == made.stores["drawn"].card.counts


def test_the_usual_pixels_may_be_asked_for(drawn: Path) -> None:
    usual = {"data.transform": "resize", "data.size": "16"}
    by_name, by_default = (
        plan([Request("drawn", "erm", seeds=(0,), settings=part)], drawn).runs for part in (usual, {})
    )
    assert by_name == by_default


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("data.size", "4", "data.size must be from 8 to 1024 pixels, got 4"),
        ("data.size", "large", "data.size=large: input should be a valid integer"),
        ("data.sizes", "64", "unknown data key 'sizes'. Did you mean size?"),
        ("data.transform", "centre", "drawn has no transform 'centre': give data.transform one of resize, center"),
    ],
)
def test_pixels_that_a_dataset_does_not_have(drawn: Path, home: Path, key: str, value: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        plan([Request("drawn", "erm", settings={key: value})], drawn)
    assert str(error.value).startswith(says)
    assert not home.exists()


def test_a_dataset_that_is_not_read_from_pictures_has_no_other_pixels() -> None:
    (problem,) = problems("erm", data__size="8")
    assert problem == "tiny has no data.transform and no data.size: its pixels are not read from pictures"


def test_a_run_on_other_pixels_is_recorded_under_their_name(drawn: Path) -> None:
    made = plan([Request("drawn", "erm", seeds=(0,), settings={"data.size": "8"})], drawn)
    spec = made.runs[0].spec
    assert spec is not None
    record = run_spec(spec, made.stores["drawn[8px]"])
    assert (record.status, record.dataset) == ("finished", "drawn[8px]")
    found = record_path(runs_home(), spec)
    assert read(found).dataset == "drawn[8px]"
    assert verify(found).problems == ()


# --------------------------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    ("method", "backbone", "says"),
    [
        ("ex2l", "resnet18", "ex2l: resnet18 ends in maps of 1x1 pixels for tiny, too few to compare; take larger"),
        ("ex2l@pseudo", "mlp3x100", "ex2l: mlp3x100 ends in maps of 1x1 pixels"),
        ("dfr+exmap", "mnist_cnn", "mnist_cnn cannot be explained: no rule for its layer trunk.2 (GroupNorm); take"),
        ("ex2l+exmap", "mnist_cnn:quarter", "mnist_cnn:quarter cannot be explained"),
    ],
)
def test_a_backbone_that_a_method_cannot_use_is_refused(home: Path, method: str, backbone: str, says: str) -> None:
    (problem,) = problems(method, backbone=backbone)
    assert problem.startswith(says)
    assert not home.exists()


@pytest.mark.parametrize(
    ("method", "backbone"),
    [("ex2l", "resnet18:3x3"), ("resample", "resnet18"), ("dfr", "mnist_cnn"), ("ex2l+exmap", "tiny_cnn")],
)
def test_other_methods_may_use_it(method: str, backbone: str) -> None:
    assert planned(method, backbone=backbone).runs[0].spec is not None


PLUGIN = '''"""A backbone."""
from torch import nn
from worstgroup.benchmark.backbones import Backbone
from worstgroup.benchmark.registry import backbone

@backbone("homemade")
def homemade(request):
    """One convolution."""
    trunk = nn.Sequential(nn.Conv2d(request.in_channels, {width}, 3, 2), nn.ReLU())
    neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    return Backbone(request.name, trunk, neck, nn.Linear({width}, request.num_classes), grad_cam="closed")
'''


def test_an_edited_backbone_makes_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, register: Callable[..., None]
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which an import within a second would take for fresh
    path, others = tmp_path / "homemade.py", {name: BACKBONES[name] for name in BACKBONES}
    specs, stores = [], {}
    for width, remark in ((8, ""), (8, "# a remark\n"), (12, ""), (8, "")):
        path.write_text(PLUGIN.format(width=width) + remark)
        monkeypatch.setattr(BACKBONES, "_entries", dict(others))
        load_plugin(path)
        made = planned("erm,dfr", backbone="homemade")
        specs.append([run.spec for run in made.runs])
        stores = made.stores
    hashes = [[spec.hash for spec in pair if spec] for pair in specs]
    assert hashes[0] == hashes[1] == hashes[3]
    assert not set(hashes[0]) & set(hashes[2])
    blocks = [pair[0].block for pair in specs if pair[0]]
    assert blocks[0].key == blocks[1].key != blocks[2].key  # and with it the shared ERM
    assert all(len(block.backbone_code) == 16 for block in blocks)
    assert blocks[0].stream == blocks[2].stream

    spec = specs[3][0]
    assert spec is not None
    run_spec(spec, stores["tiny"])
    record = record_path(runs_home(), spec)
    assert read(record).backbone_code == blocks[3].backbone_code
    assert verify(record).problems == ()


@pytest.mark.parametrize("name", ["", "resnet18:3x3", "mnist_cnn:quarter", "timm:test_resnet"])
def test_the_code_of_a_built_in_backbone_is_the_engines(name: str) -> None:
    spec = planned("erm", backbone=name).runs[0].spec
    assert spec is not None
    assert spec.block.backbone_code == ""


# ------------------------------------------------------------------------------------------------------------- names


def test_validation_images_may_be_asked_for_twice() -> None:
    names = ("groupdro(+val)", "groupdro", "groupdro(+val)(+val)")
    by_both, by_option, by_name = (
        planned(name, extra=extra).runs[0].spec for name, extra in zip(names, ("val", "val", ""), strict=True)
    )
    assert by_both is not None
    assert by_both == by_option == by_name
    assert (by_both.extra, by_both.method_label) == ("val", "groupdro(+val)")
    assert MethodName.parse("groupdro@class(+val)(+val)") == MethodName("groupdro", policy="class", extra="val")


def test_show_says_what_host_and_source_do(call: Call) -> None:
    done = call("show", "dfr+exmap")
    assert (done.code, done.err) == (0, "")
    for part in ("method dfr", "source exmap", "n_min = 0", "clusters = 0"):
        assert part in done.out
    assert done.out.index("method dfr") < done.out.index("source exmap")


def test_show_explains_the_settings_that_methods_share(call: Call) -> None:
    out = call("show", "dann").out
    assert out.index("`env` defines") < out.index("`impl`: the players") < out.index("As of every adversarial")


def test_show_tells_the_rows_of_a_suite_apart(call: Call, tmp_path: Path) -> None:
    out = call("show", "repro/ex2l-main").out
    assert "protocol paper, selection val-wga-avg" in out
    assert "best of 20 draws" in out
    lines = [line for line in out.splitlines() if line.startswith("waterbirds")]
    assert len(lines) == len(set(lines))
    path = tmp_path / "own.toml"
    path.write_text('summary = "own"\n[[blocks]]\ndataset = "tiny"\nmethods = ["irm"]\n')
    assert "tiny · default backbone · irm" in call("show", path).out


@pytest.mark.parametrize("name", ["dfr+", "+dfr", "dfr+exmpa", "exmap+dfr"])
def test_show_of_a_composition_that_there_is_not(call: Call, name: str) -> None:
    done = call("show", name)
    assert (done.code, done.out) == (2, "")
    assert f"unknown name {name!r}" in done.err


def test_show_knows_plugins(call: Call, tmp_path: Path, register: Callable[..., None]) -> None:
    path = tmp_path / "homemade.py"
    path.write_text(PLUGIN.format(width=8))
    assert call("show", "homemade").code == 2
    done = call("show", "homemade", "--plugin", path)
    assert (done.code, done.err) == (0, "")
    assert "One convolution." in done.out


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ("blocks = []", "blocks: list should have at least 1 item"),
        ('[[blocks]]\ndataset = "tiny"\nmethods = []', "blocks.0.methods: list should have at least 1 item"),
        ('[[blocks]]\ndataset = "tiny"\nmethods = ["erm"]\ngrid = {"recipe.lr" = []}', "blocks.0.grid.recipe.lr: list"),
    ],
)
def test_a_suite_without_a_row_is_refused(blocks: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'summary = "none"\n{blocks}\n')
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        read_suite(str(path))


def test_settings_that_no_table_could_show_are_refused_before_any_work() -> None:
    with pytest.raises(UserError, match=r"setting ldam.margin: it is longer than the 500 characters"):
        plan([Request("digits2", "ldam", settings={"ldam.margin": "1" * 501})])
