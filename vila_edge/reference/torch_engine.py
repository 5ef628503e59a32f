"""The reference engine on torch: what exports are measured against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_edge.config import VilaConfig
from vila_edge.reference.engine import ReferenceEngine
from vila_edge.reference.torch_ops import TorchOps


def torch_engine(cfg: VilaConfig, params: Mapping[str, Tensor]) -> ReferenceEngine:
    """An engine that computes with the tensors `params`."""
    return ReferenceEngine(
        cfg, f"torch {torch.__version__} (reference)", lambda cache: TorchOps(params, cache), torch.from_numpy, _numpy
    )


def numpy_parameters_engine(cfg: VilaConfig, params: Mapping[str, NDArray[np.float32]]) -> ReferenceEngine:
    """The same, from numpy arrays."""
    return torch_engine(cfg, {name: torch.from_numpy(value) for name, value in params.items()})


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.detach().numpy()
    return values
