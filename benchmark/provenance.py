"""What a run says of itself before anything has run: what it is, and the machine and versions it is made with."""

import os
import platform
import secrets
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import determinism, record
from .device import kernel_options, pick_device
from .spec import Card, RunSpec

SESSION = secrets.token_hex(6)
"""Identifies this invocation: costs are compared within one."""


def facts(spec: RunSpec, card: Card, session: str, sharers: int) -> dict[str, Any]:
    """What the record says before anything has run."""
    block = spec.block
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": spec.hash,
        "protocol": spec.protocol,
        "dataset": block.dataset,
        "fingerprint": block.fingerprint,
        "backbone": block.backbone,
        "weights": block.weights,
        "backbone_code": block.backbone_code,
        "method": spec.method,
        "source": spec.source,
        "policy": spec.policy,
        "config": dict(spec.config),
        "source_config": dict(spec.source_config),
        "extra": spec.extra,
        "budget": str(spec.budget),
        "recipe": asdict(block.recipe),
        "criterion": spec.criterion,
        "tuned": dict(spec.tuned),
        "draw": spec.draw,
        "candidates": list(spec.candidates),
        "seed": block.seed,
        "code": spec.code,
        "classes": list(card.classes),
        "attributes": [record.AttributeRow(**asdict(attribute)) for attribute in card.attributes],
        "env": environment(session, sharers)
        | kernel_options(block.recipe.precision, pick_device(), autotuning=spec.policy != "masked"),
    }


def environment(session: str, sharers: int = 1) -> dict[str, Any]:
    """Device and versions that a result was made with, how many worker processes shared the device, and how far the
    same bits are to be had there again.
    """
    device = pick_device()
    on_gpu = device.type == "cuda"
    cudnn = torch.backends.cudnn.version() if on_gpu else None  # type: ignore[no-untyped-call]
    libraries = {"cuda": torch.version.cuda, "cudnn": cudnn} if on_gpu else {}
    packages = ("worstgroup", "torch", "torchvision", "numpy", "scikit-learn", "pillow")
    return {
        "device": device_name(),
        "device_type": device.type,
        "sharers": sharers,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.system().lower(),
        "versions": {package: version(package) for package in packages} | libraries,
        "session": session,
        **determinism.facts(device),
    }


def device_name() -> str:
    """What the device calls itself."""
    device = pick_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
