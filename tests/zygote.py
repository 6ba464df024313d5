"""A process that has imported the program once, and forks a child for every command line that a test sends it.

A child is the program from `cli.main` on, in a session of its own; its start takes milliseconds instead of seconds.
"""

import ctypes
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import sklearn.linear_model  # noqa: F401  what commands import when they need it
import torch
import torch._dynamo
from crash_points import Point, Watch
from worstgroup import cli
from worstgroup.benchmark import pools, registry
from worstgroup.benchmark.executors import run_plan  # noqa: F401
from worstgroup.benchmark.planning import plan  # noqa: F401
from worstgroup.commands.console import RunReporter  # noqa: F401
from worstgroup.leaderboard import aggregate, page, render  # noqa: F401

CHUNK = 2**14
"""Bytes of a pool's chunk, so that a tiny dataset has several."""
_CAPABILITIES = 0x20080522
"""Version of the structures of `capset`."""


def powerless() -> None:
    """Let permissions of files hold for root too; raises `OSError` where that is not to be had."""
    header, nothing = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


def work(job: dict[str, Any]) -> int:
    """Run a job's commands until one fails; the exit code of the last."""
    os.setsid()
    os.environ.update(job["environment"], WORSTGROUP_HOME=job["home"], NO_COLOR="1")
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    code: object = 0
    sys.argv = ["worstgroup", *job["commands"][0]]
    if job["log"]:
        point = Point(**job["point"]) if job["point"] else None
        Watch(Path(job["home"]), Path(job["output"]), Path(job["log"]), point).install()
    if job["powerless"]:
        powerless()
    for arguments in job["commands"]:
        sys.argv = ["worstgroup", *arguments]
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        if code:
            break
    sys.stdout.flush()
    return code if isinstance(code, int) else 1


def main() -> None:
    """Answer every line: a job with its child's number, a number with how that child ended."""
    torch.set_num_threads(1)
    pools.CHUNK_BYTES = CHUNK
    for entries in (registry.METHODS, registry.SOURCES, registry.DATASETS, registry.BACKBONES):
        list(entries)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1])
        elif not (answer := os.fork()):
            try:
                os._exit(work(asked))
            except BaseException:
                traceback.print_exc()
                os._exit(70)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
