"""`run --dry-run`: what is finished, what will run and how long that takes, against what then happens."""

import re
import time
from pathlib import Path

import pytest
from helpers import Call, edit, finish, start
from worstgroup.benchmark import cluster
from worstgroup.benchmark.record import find, read

RUN = ("run", "--dataset", "tiny", "--method", "erm,groupdro,dfr,reweight", "--seeds", "0,1,2", "--threads", "1")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def of_runs(out: str) -> dict[str, str]:
    """What is said of every run, by `METHOD SEED`."""
    found = re.findall(r"^(\S+) on tiny · \S+ · seed (\d): (.*)$", out, re.MULTILINE)
    return {f"{method} {seed}": text for method, seed, text in found}


def summary(out: str) -> list[str]:
    return out.partition("\n\n")[2].splitlines()


def test_a_fresh_home_says_that_nothing_is_known(call: Call, home: Path) -> None:
    done = call(*RUN, "--dry-run", "--jobs", "2")
    assert (done.code, done.err) == (0, "")
    assert set(of_runs(done.out).values()) == {"to run, cost unknown"}
    shared, total = summary(done.out)
    assert shared.startswith("shared ERM of tiny · tiny_cnn · seeds 0, 1, 2: to be made first")
    assert total.startswith("12 to run, 0 finished; how long is not known before a run of erm was timed")
    assert not (home / "runs").exists()


def test_records_of_other_seeds_tell_what_the_missing_ones_take(call: Call, runs: Path) -> None:
    for path in find(runs):
        method = read(path).method
        edit(path, lambda content, method=method: take(content, 30.0 if method == "groupdro" else 0.5, erm=20.0))
    done = call(*RUN, "--dry-run", "--jobs", "2")
    said = of_runs(done.out)
    assert {said[f"{method} {seed}"] for method in ("erm", "groupdro", "dfr") for seed in "01"} == {"finished"}
    assert said["erm 2"] == "to run, about 20 s"  # it makes the ERM
    assert said["groupdro 2"] == "to run, about 30 s"
    assert said["dfr 2"] == "to run, under 1 s"
    shared, total = summary(done.out)
    assert shared == "shared ERM of tiny · tiny_cnn · seed 2: to be made first, about 20 s"
    assert re.match(r"about \d+ s on 2 workers: 6 to run, 6 finished", total)


def take(content: dict, seconds: float, erm: float) -> None:
    """Let a record's stages take so many seconds, and its block's ERM."""
    epochs, images = content["recipe"]["epochs"], sum(group["n_train"] for group in content["groups"])
    for stage in content["cost"]["stages"].values():
        stage |= {"wall_s": seconds, "eval_s": 0.0}
    for key, stage in content["cost"]["shared"].items():
        share = stage["n_fwd"] / (epochs * images) if key.startswith("erm:") else 0.0
        stage |= {"wall_s": erm * share, "eval_s": 0.0}


def test_a_run_that_failed_is_said_to_run_again(call: Call, runs: Path) -> None:
    (path,) = runs.rglob("groupdro-*-s1-*.json")
    edit(path, lambda content: content.update(status="failed", error="it did not converge"))
    said = of_runs(call(*RUN, "--dry-run").out)
    assert said["groupdro 1"].startswith("to run again, it failed, ")
    assert said["groupdro 0"] == "finished"


def test_for_a_cluster_nothing_is_predicted(call: Call, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "need_ray", lambda: None)
    done = call(*RUN, "--dry-run", "--executor", "ray", "--gpus", "1")
    said = of_runs(done.out)
    assert (said["erm 0"], said["erm 2"]) == ("finished", "to run")
    assert summary(done.out) == [
        "6 to run, 6 finished; how long is not predicted for a Ray cluster: its nodes are not known before it is used"
    ]


def test_a_search_that_has_ended_is_not_made_again(call: Call) -> None:
    search = ("run", "--dataset", "tiny", "--method", "groupdro", "--tuning", "2", "--threads", "1")
    tune = ("tune", "--dataset", "tiny", "--method", "groupdro", "--draws", "2", "--threads", "1", "--quiet")
    assert call(*tune, "--jobs", "1").code == 0
    told = call(*search, "--seeds", "0", "--dry-run").out.splitlines()
    assert told == [
        "groupdro on tiny · train+val · seed 0 · draw 0: made already, to be copied, under 1 s",
        "",
        told[-1],
    ]
    assert told[-1] == "nothing to run, 1 to be copied, 0 finished"
    assert call(*search, "--seeds", "0", "--jobs", "1", "--quiet").code == 0
    assert call(*search, "--seeds", "0", "--dry-run").out.splitlines()[-1] == "nothing to run, 1 finished"


@pytest.mark.slow
def test_the_time_told_is_about_the_time_taken(home: Path) -> None:
    """Suite `mini` on one seed tells what another seed takes. Other work on the machine must not change meanwhile."""
    suite = ("run", "mini", "--jobs", "2", "--threads", "1", "--quiet")
    assert finish(start(home, *suite, "--seeds", "0", **ONE_THREAD), timeout=1800).code == 0
    told = finish(start(home, *suite, "--seeds", "1", "--dry-run", **ONE_THREAD))
    amount = re.search(r"^about (\d+) (s|min) on 2 workers: 16 to run, 0 finished$", told.out, re.MULTILINE)
    assert amount, told
    begin = time.monotonic()
    assert finish(start(home, *suite, "--seeds", "1", **ONE_THREAD), timeout=1800).code == 0
    taken = time.monotonic() - begin
    assert 0.5 < int(amount[1]) * (60 if amount[2] == "min" else 1) / taken < 1.5
