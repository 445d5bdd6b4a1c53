"""Which library multiplies float32 matrices on a CPU: PyTorch's choice (MKL where it has it), or oneDNN.

MKL keeps AVX-512 to Intel's processors, oneDNN does not: on AMD's it multiplies up to twice as fast, as exactly.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from apa_cli.errors import UserError
from apa_cli.settings import Matmul

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


def used() -> Matmul:
    """Which it is: what `Matmul.auto` became."""
    return Matmul.torch if _library is None else Matmul.onednn


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


def product_with(weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """x, bias ↦ x · weightᵀ + bias by oneDNN, for x [..., in] and a weight [out, in] that stays as it is.

    The weight is kept in the order in which oneDNN reads it. None where oneDNN does not multiply this precision.
    """
    if weight.device.type != "cpu" or not used_for(weight.dtype):
        return None
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), NARROW)

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        count = len(rows)
        if count > NARROW and (more := next_shape(count) - count):
            rows = nn.functional.pad(rows, (0, 0, 0, more))
        result = torch.ops.mkldnn._linear_pointwise(rows, ordered, bias, "none", [], "")
        return result[:count].view(*x.shape[:-1], len(weight))

    return product


def used_for(dtype: torch.dtype) -> bool:
    """Whether products of this precision are oneDNN's: PyTorch asks it itself in bfloat16."""
    if dtype is torch.bfloat16:
        return has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is torch.float32 and _library is not None


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
