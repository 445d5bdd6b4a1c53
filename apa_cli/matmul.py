"""Which library multiplies float32 matrices on a CPU: PyTorch's choice (MKL where it has it), or oneDNN.

MKL keeps AVX-512 to Intel's processors, oneDNN does not: on AMD's it multiplies up to twice as fast, as exactly.
"""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

import torch
from torch import Tensor

from apa_cli.settings import Matmul
from apa_cli.types import UserError

WORTH = 2**21
"""Multiplications from which on oneDNN is faster."""
NARROW = 64
STEP = 32
"""oneDNN makes code for each shape, up to a millisecond of it, and keeps it; `worth` says which shapes it is given."""
PROCESSOR = Path("/proc/cpuinfo")

_library: torch.library.Library | None = None
"""What puts oneDNN's products in the place of PyTorch's, as long as it is kept."""


def use(matmul: Matmul) -> None:
    """From here on all of this process's float32 products on a CPU are this library's, backward passes included."""
    global _library
    if matmul is Matmul.onednn and not has_onednn():
        raise UserError("launch.matmul=onednn: this PyTorch was built without oneDNN")
    if not (matmul is Matmul.onednn or (matmul is Matmul.auto and faster_by_onednn())):
        _library = None
    elif _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid")
            _library.impl("mm", mm, "CPU")
            _library.impl("addmm", addmm, "CPU")


def has_onednn() -> bool:
    """Whether this PyTorch can be asked for oneDNN's product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def faster_by_onednn() -> bool:
    """Whether this is a processor whose AVX-512 MKL leaves unused."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    known = PROCESSOR.read_text() if PROCESSOR.exists() else platform.processor()
    return "AuthenticAMD" in known and has_onednn()


def mm(first: Tensor, second: Tensor) -> Tensor:
    """aten::mm"""
    if worth(first, second):
        return torch.ops.mkldnn._linear_pointwise(first, second.t(), None, "none", [], "")
    return torch.mm(first, second, out=first.new_empty(0))


def addmm(bias: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """aten::addmm"""
    plain = beta == alpha == 1 and bias.shape == second.shape[1:] and bias.dtype is torch.float32
    if plain and worth(first, second):
        return torch.ops.mkldnn._linear_pointwise(first, second.t(), bias, "none", [], "")
    return torch.addmm(bias, first, second, beta=beta, alpha=alpha, out=first.new_empty(0))


def worth(first: Tensor, second: Tensor) -> bool:
    """Whether oneDNN is to multiply the two: large matrices, of one of a few shapes.

    Weights keep their shape. Positions vary: they are rows, or in the gradient of a weight what is summed over.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[0]:
        return False
    (rows, inner), columns = first.shape, second.shape[1]
    positions = inner if first.stride(0) == 1 else rows
    return (
        first.dtype is second.dtype is torch.float32
        and rows * inner * columns >= WORTH
        and (positions <= NARROW or positions == next_shape(positions))
    )


def rounded(positions: int) -> int:
    """How many positions a pass is to have so that its products are fast: these, or a few more."""
    return positions if _library is None or positions <= NARROW else next_shape(positions)


def next_shape(count: int) -> int:
    """The next multiple of `STEP`, and of a power of two that leaves 16 of them between a number and its double."""
    step = max(STEP, 2 ** max(count.bit_length() - 5, 0))
    return -(-count // step) * step
