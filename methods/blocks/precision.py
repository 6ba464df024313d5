"""What is computed in float32 although training is in less."""

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """The same values in float32, or in what is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
