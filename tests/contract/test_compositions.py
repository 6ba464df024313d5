"""The contract for what is composed: every group source under a host, every policy, training on validation too."""

import pytest
from worstgroup.authoring import contract
from worstgroup.authoring.trial import Bench
from worstgroup.benchmark.registry import METHODS, SOURCES

COMPOSED = {
    **{f"dfr+{source}": "" for source in SOURCES if SOURCES[source].requires.fit == "none"},
    **{f"groupdro+{source}": "" for source in SOURCES},
    **{f"{host}+exmap": "" for host in ("resample", "reweight", "ex2l", "irm", "jtt")},
    "groupdro@subset": "val-20",
    **{f"{name}@masked": "val-20" for name in METHODS if METHODS[name].requires.masked},
    "erm(+val)": "val-20",
    "jtt(+val)": "val-20",
    "resample(+val)": "train+val",
}
CHECKS = [name for name in contract.CHECKS if name not in ("documented", "budget")]
benches = {name: Bench(name, home) for name, home in COMPOSED.items()}


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("check", CHECKS)
def test_keeps_the_contract(name: str, check: str) -> None:
    verdict = contract.judge(benches[name], check)
    assert verdict.state != "failed", verdict.message


@pytest.mark.parametrize("source", list(SOURCES))
def test_source_documents_itself(source: str) -> None:
    assert not list(contract.undocumented(SOURCES[source]))
