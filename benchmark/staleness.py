"""Whether a run was made with the code that is there now."""

from .planning import backbone_code, code_now
from .record import RunRecord
from .registry import BACKBONES


def stale(run: RunRecord) -> str:
    """Why the next `run` would make a run anew, though nothing else is asked for; empty where its code is as it was."""
    if run.code != code_now(run.method, run.source):
        return f"the code of {run.label} has changed since"
    family = run.backbone.partition(":")[0]
    if family not in BACKBONES:
        return f"backbone {family} is not known here; name its file with --plugin"
    if run.backbone_code != backbone_code(run.backbone):
        return f"the code of backbone {family} has changed since"
    return ""
