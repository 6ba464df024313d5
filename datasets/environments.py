"""Training environments that are drawn from one split, no example for two of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..benchmark.errors import require


def draw_disjoint(
    group: NDArray[np.int64], counts: NDArray[np.int64], names: Sequence[str], what: str, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chosen examples (m,), ascending, and the environment (m,) of each, for groups (n,).

    `counts[e, g]` examples of group g make environment e. Raises `UserError` for a group, called as in `names`, with
    fewer examples than there are environments that show it.
    """
    available = np.bincount(group, minlength=len(names))
    for name, has, shown in zip(names, available, (counts > 0).sum(0), strict=True):
        require(has >= shown, f"{what}: {shown} environments need as many train pictures of {name}, there are {has}")
    random = np.random.RandomState(seed)
    env = np.full(len(group), -1)
    for g, drawn in enumerate(counts.T):
        members = random.permutation(np.flatnonzero(group == g))
        env[members[: drawn.sum()]] = np.repeat(np.arange(len(drawn)), drawn)
    chosen = np.flatnonzero(env >= 0)
    return chosen, env[chosen]
