"""Library for float32 matrix products on a CPU: PyTorch's choice (MKL if PyTorch was built with it) or oneDNN.

MKL uses AVX-512 on Intel processors only. oneDNN uses AVX-512 on AMD processors too and is up to twice as fast there,
at the same accuracy.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from apa_cli.errors import UserError
from apa_cli.settings import MatmulLibrary

MIN_MULTIPLICATIONS = 2**21
"""Scalar multiplications in a matrix product from which on oneDNN is faster (measured)."""
MAX_UNROUNDED_POSITIONS = 64
"""Positions up to which a product keeps its shape. oneDNN compiles and caches a kernel for each shape, in up to a
millisecond; above this size few shapes are used, see `round_up_size`."""
SIZE_STEP = 32
"""Positions; sizes above `MAX_UNROUNDED_POSITIONS` are multiples of this number."""
CPU_INFO = Path("/proc/cpuinfo")

_library: torch.library.Library | None = None
"""Registration of oneDNN's products in place of PyTorch's, in force while the object lives."""


def select_matmul(matmul: MatmulLibrary) -> None:
    """Select the library for all further float32 products of this process on a CPU, backward passes included.

    Raise UserError if oneDNN is selected and PyTorch lacks it.
    """
    global _library
    if matmul is MatmulLibrary.onednn and not has_onednn():
        raise UserError("launch.matmul: onednn is set, but this PyTorch was built without oneDNN; use auto or torch")
    if not (matmul is MatmulLibrary.onednn or (matmul is MatmulLibrary.auto and is_onednn_faster())):
        _library = None
    elif _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid")
            _library.impl("mm", mm, "CPU")
            _library.impl("addmm", addmm, "CPU")


def get_active_matmul() -> MatmulLibrary:
    """Return the library in use, torch or onednn, whichever auto has selected."""
    return MatmulLibrary.torch if _library is None else MatmulLibrary.onednn


def has_onednn() -> bool:
    """Return True if this PyTorch was built with oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_onednn_faster() -> bool:
    """Return True if the processor has AVX-512 that MKL does not use: an AMD processor."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    vendor = CPU_INFO.read_text() if CPU_INFO.exists() else platform.processor()
    return "AuthenticAMD" in vendor and has_onednn()


def mm(first: Tensor, second: Tensor) -> Tensor:
    """Multiply two matrices; replaces aten::mm."""
    if is_worth_onednn(first, second):
        return torch.ops.mkldnn._linear_pointwise(first, second.t(), None, "none", [], "")
    return torch.mm(first, second, out=first.new_empty(0))


def addmm(bias: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Multiply two matrices and add a bias; replaces aten::addmm."""
    plain = beta == alpha == 1 and bias.shape == second.shape[1:] and bias.dtype is torch.float32
    if plain and is_worth_onednn(first, second):
        return torch.ops.mkldnn._linear_pointwise(first, second.t(), bias, "none", [], "")
    return torch.addmm(bias, first, second, beta=beta, alpha=alpha, out=first.new_empty(0))


def prepack_linear(weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """Return the function (x, bias) ↦ x · weightᵀ + bias by oneDNN, for x [..., in] and a constant weight [out, in].

    The function holds a copy of the weight in oneDNN's memory layout. Return None if oneDNN is not used for the
    weight's device and dtype.
    """
    if weight.device.type != "cpu" or not is_onednn_used(weight.dtype):
        return None
    packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), MAX_UNROUNDED_POSITIONS)

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        count = len(rows)
        if count > MAX_UNROUNDED_POSITIONS and (padding := round_up_size(count) - count):
            rows = nn.functional.pad(rows, (0, 0, 0, padding))
        result = torch.ops.mkldnn._linear_pointwise(rows, packed_weight, bias, "none", [], "")
        return result[:count].view(*x.shape[:-1], len(weight))

    return multiply


def is_onednn_used(dtype: torch.dtype) -> bool:
    """Return True if oneDNN computes linear layers in this dtype; PyTorch itself uses it for bfloat16."""
    if dtype is torch.bfloat16:
        return has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is torch.float32 and _library is not None


def is_worth_onednn(first: Tensor, second: Tensor) -> bool:
    """Return True if oneDNN should multiply the matrices: large, in float32, with a rounded number of positions.

    Only the number of positions varies between products. Positions are the rows of `first`, or the summed dimension in
    the gradient of a weight, for which `first` is a transposed view.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[0]:
        return False
    (rows, inner), columns = first.shape, second.shape[1]
    positions = inner if first.stride(0) == 1 else rows
    return (
        first.dtype is second.dtype is torch.float32
        and rows * inner * columns >= MIN_MULTIPLICATIONS
        and (positions <= MAX_UNROUNDED_POSITIONS or positions == round_up_size(positions))
    )


def round_positions(positions: int) -> int:
    """Return the number of positions to which a pass should be padded, so that oneDNN computes its products."""
    return positions if _library is None or positions <= MAX_UNROUNDED_POSITIONS else round_up_size(positions)


def round_up_size(count: int) -> int:
    """Round up to a multiple of `SIZE_STEP`, coarser for large counts: 16 sizes between a power of two and the next."""
    step = max(SIZE_STEP, 2 ** max(count.bit_length() - 5, 0))
    return -(-count // step) * step
