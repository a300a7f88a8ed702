"""Products with operands rounded to bfloat16 and sums in float32.

bfloat16 keeps 8 bits of a number and float32's range, so that neither a gradient of 1e-9 nor a root
of 1e6 is lost. The kernels (oneDNN on a CPU, cuBLAS on a GPU) accumulate in float32 and round once,
when they write the product.

Applied to blocks of side 64 to 1,024, roots with a condition of 1e6 are off by 4 to 5 % (cosine
0.999) if the gradient is drawn from the statistics themselves, and by 0.4 % if it is white; in
float32 by 5e-6. The error grows with the root's condition: for a vector, whose exponent is 1/2, it
would be 20 %.

So products with a vector, which are mostly memory-bound, stay in full precision. So do products of
at most 16³ multiplications per matrix: there is nothing to gain, and on a CPU the kernel, and with
it the rounding, would depend on the number of matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch

from funshampoo.core.checks import check_choice
from funshampoo.linalg.products import matmul

SMALL = 16**3
"""Multiplications per matrix up to which a product stays in full precision: oneDNN's bound."""


def check_product_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError unless dtype is bfloat16 or None."""
    check_choice("product_dtype", dtype, (None, torch.bfloat16))


def rounded_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, with operands rounded to `dtype` if it is large enough; in that dtype or in theirs.

    In a product of several, the result between two factors is thus rounded once, as it would be as
    an operand of the second anyway.

    >>> a = torch.full((20, 20), 1 / 3)
    >>> rounded_matmul(a, a, torch.bfloat16).dtype, rounded_matmul(a[:1], a, torch.bfloat16).dtype
    (torch.bfloat16, torch.float32)
    """
    return a.to(dtype) @ b.to(dtype) if _is_large(a, b) else matmul(a, b)


def rounded_gram(x: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """x xᵀ of x rounded to `dtype`, *in float32*, for x (N, d, n); None if that is not available.

    It is the Gram matrix of the rounded x up to float32 rounding, so as positive semidefinite as
    one of float32 operands. A result rounded to bfloat16 would not be. torch has the kernel only on
    CUDA, without a derivative and without a vmap rule.
    """
    if dtype is None or not x.is_cuda or x.dtype != torch.float32 or x.ndim != 3:
        return None
    if torch.compiler.is_dynamo_compiling() or _functorch.is_functorch_wrapped_tensor(x):
        return None
    if x.requires_grad or not _is_large(x, x.mT):
        return None
    x = x.to(dtype)
    return torch.bmm(x, x.mT, out_dtype=torch.float32)


def _is_large(a: Tensor, b: Tensor) -> bool:
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    return min(rows, columns) > 1 and rows * inner * columns > SMALL
