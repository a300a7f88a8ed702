"""Products, powers and more whose rounding does not depend on a matrix's place in its stack.

A rank that holds some rows of a stack must compute bitwise the same as one that holds them all. On
a CPU three things prevent that:

    MKL rounds differently for a matrix that does not start at a multiple of 16 bytes, as most in a
        stack of 9×9 do not. Such operands are copied to aligned memory, and if results would not be
        aligned, rows of zeros are added.
    A product with a vector has its own kernels, one for a single matrix and others for many.
        Columns or rows of zeros turn the vector into a matrix.
    A power differs between the body of a SIMD loop and its tail. Here all of it is tail.

LAPACK's routines depend on alignment, too: `each_matrix` passes them one matrix at a time.

What is done depends on a matrix's shape, never on its place or their number. With more than one
thread MKL still splits the products of a stack of one row among them, and rounds differently.

The plain operators are used for stacks of even sides, x xᵀ whose rows all start at multiples of 16
bytes, single matrices, other devices, torch.compile and torch.func. On other devices there is one
exception, x xᵀ of few long rows, as for the 9 places of a 3×3 filter: cuBLAS uses only a small part
of a GPU for such a product. There it is a sum over pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn.functional import pad

ALIGNMENT = 16
"""Bytes."""

_LARGEST_PLAIN = 512  # largest side of a square that is computed whole

_LARGEST_BLOCK = 256  # largest block of a square that is not

_BLOCK_UNIT = 16  # numbers: blocks are aligned if the matrix is, and kernels run full


FEW_ROWS, LONG_ROWS, PIECE = 64, 2048, 512
"""For x on a GPU: up to FEW_ROWS rows, of at least LONG_ROWS, are cut into pieces of length PIECE.

On an H100, 64 rows of 65,536 take 0.03 of the time, 9 of 262,144 take 0.04.
"""

_MOST_JOINED = 16  # products of FEW_ROWS rows, of one matrix or of several side by side


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, matrix by matrix; with two dtypes, in the wider one."""
    if a.dtype != b.dtype:
        wider = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(wider), b.to(wider)
    shape, other = a.shape, b.shape  # read once: torch makes a new object each time
    if len(shape) == len(other) == 2 or not is_plain_memory(a, b):
        return a @ b
    rows, inner, columns = shape[-2], shape[-1], other[-1]
    if inner == 1:
        return a * b
    unit = ALIGNMENT // a.itemsize
    widens = columns == 1
    if widens:
        b = pad(b, (0, unit - 1))
    lengthens = rows == 1 or bool(rows * (unit if widens else columns) % unit)
    if lengthens:
        a = pad(a, (0, 0, 0, -rows % unit))
    a, b = _aligned(a), _aligned(b)
    plain = len(shape) == len(other) == 3 and shape[0] == other[0]
    product = torch.bmm(a, b) if plain else a @ b  # one operator where `@` takes five
    if widens or lengthens:  # copy even a stack of one, whose strides would show the padding
        return product[..., :rows, :columns].clone(memory_format=torch.contiguous_format)
    return product


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of aligned stacks; by `matmul` if the results would not be aligned."""
    if a.shape[-2] * b.shape[-1] % (ALIGNMENT // a.itemsize):
        return matmul(a, b)
    return torch.bmm(a, b) if a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] else a @ b


def square(b: Tensor) -> Tensor:
    """b bᵀ (..., d, d) of b (..., d, d), symmetric up to rounding. No gradient flows through it.

    In a CPU's memory, only the blocks of a large matrix on and above the diagonal are computed: 0.8
    of the time at d = 1,024. A smaller one is fastest as a plain product.
    """
    d = b.shape[-1]
    if not is_plain_memory(b) or (d % 2 and d <= _LARGEST_PLAIN):
        return matmul(b, b.mT)
    b = aligned(b)
    if d <= _LARGEST_PLAIN:
        return multiply(b, b.mT)
    X = b.new_empty(b.shape)
    _write_square(X, b)
    return X


def _write_square(X: Tensor, b: Tensor) -> None:
    rows = X.shape[-1]
    if rows <= _LARGEST_BLOCK:
        X.copy_(matmul(b, b.mT))
        return
    half = (rows + 1) // 2
    half += -half % _BLOCK_UNIT
    above = matmul(b[..., :half, :], b[..., half:, :].mT)
    X[..., :half, half:] = above
    X[..., half:, :half] = above.mT
    for part in (slice(None, half), slice(half, None)):
        _write_square(X[..., part, part], b[..., part, :])


def gram(x: Tensor) -> Tensor:
    """x xᵀ, matrix by matrix; may be a view."""
    plain = operand_of_gram(x)
    if plain is not None:
        return plain @ plain.mT
    rows = x.shape[-2]
    if x.shape[-1] == 1:
        return x * x.mT
    if not x.is_cpu:
        return gram_in_pieces(x)
    x = _aligned(pad(x, (0, 0, 0, -rows % (ALIGNMENT // x.itemsize))))
    return (x @ x.mT)[..., :rows, :rows]


def operand_of_gram(x: Tensor) -> Tensor | None:
    """aligned(x) if x xᵀ is its plain product, which can then be part of a fused kernel; else None.

    For an odd number of rows it is if all of them are aligned. On a GPU it always is, except for
    few long rows; see `gram_in_pieces`.
    """
    shape = x.shape
    if len(shape) < 3 or not is_plain_memory(x):
        return None if not x.is_cpu and _has_few_long_rows(x) else x
    if shape[-1] == 1:
        return None
    if shape[-2] % 2:
        stride = x.stride()
        if stride[-1] != 1 or stride[-2] % (ALIGNMENT // x.itemsize):
            return None
    return _aligned(x)


def _has_few_long_rows(x: Tensor) -> bool:
    """Whether the product is made in pieces, as views: the rows lie one after another."""
    rows, length = x.shape[-2:]
    if not 0 < rows <= FEW_ROWS or length < LONG_ROWS or type(x) is not Tensor:
        return False
    many = x.numel() // length > _MOST_JOINED * (FEW_ROWS // rows) * rows
    if many or not x.is_contiguous() or torch.compiler.is_dynamo_compiling():
        return False
    return _functorch.peek_interpreter_stack() is None


def gram_in_pieces(x: Tensor) -> Tensor:
    """x xᵀ (..., d, d) for contiguous x (..., d, n), as a sum over pieces of the long axis.

    Rows of several matrices share a product, whose cross terms are dropped: one view, with one
    stride per piece, covers all of them, where a stack of each one's pieces would be a copy.

    >>> gram_in_pieces(torch.ones(2, 1, 5000)).flatten()
    tensor([5000., 5000.])
    """
    d, n = x.shape[-2:]
    found: list[Tensor] = []
    for some in x.view(-1, d, n).split(FEW_ROWS // d):
        count, rows = len(some), some.view(-1, n)
        whole = n - n % PIECE
        pieces = rows[:, :whole].unflatten(1, (-1, PIECE)).transpose(0, 1)
        product = torch.bmm(pieces, pieces.mT).sum(0)
        if whole < n:
            product = torch.addmm(product, rows[:, whole:], rows[:, whole:].mT)
        product = product.view(count, d, count, d).diagonal(dim1=0, dim2=2)
        found.append(product.permute(2, 0, 1))
    return (torch.cat(found) if len(found) > 1 else found[0]).reshape(*x.shape[:-1], d)


def matrix_power(A: Tensor, p: int) -> Tensor:
    """A^p for p ≥ 1, by squaring."""
    if p == 1:
        return A
    half = matrix_power(A, p // 2)
    square = matmul(half, half)
    return matmul(square, A) if p % 2 else square


def aligned(x: Tensor) -> Tensor:
    """x, or a copy (..., m, n) with gaps between the matrices, so that each is aligned.

    Use it for a matrix that enters many products; `matmul` and `gram` also align.
    """
    return _aligned(x) if x.ndim > 2 and is_plain_memory(x) else x


def _aligned(x: Tensor) -> Tensor:
    shape, stride, unit = x.shape, x.stride(), ALIGNMENT // x.itemsize
    misaligned = x.storage_offset() % unit
    for side, step in zip(shape[:-2], stride):
        misaligned |= step % unit if side > 1 else 0
    if not misaligned or len(shape) < 3:
        return x
    if stride[-2] < stride[-1]:  # stored column by column; it stays so
        return _aligned(x.mT).mT
    count = shape[-2] * shape[-1]
    flat = pad(x.flatten(-2).contiguous(), (0, -count % unit))
    return flat[..., :count].view(shape)


def power(x: Tensor, exponent: float | Tensor) -> Tensor:
    """x^exponent, elementwise, rounded alike wherever an entry lies, unlike `**` on a CPU."""
    if x.ndim and is_plain_memory(x):  # a scalar has no neighbours
        # With gaps, entries never go through SIMD. Not -1: torch 2.11 counts it from x's own
        # dimensions, and takes a DTensor sharded on the last for one sharded on the new one.
        x = torch.stack((x, x), x.ndim)[..., 0]
    raised: Tensor = x**exponent
    return raised


def each_matrix(function: Callable[..., Any], *stacks: Tensor) -> Any:
    """function(*stacks) with each matrix passed by itself on a CPU, in memory of its own.

    For functions of torch.linalg, such as qr, svd and solve_triangular, which on a CPU round a
    matrix by where it lies in its stack, also at even sides.

    Args:
        function: of matrices (..., m, n), to a tensor or a tuple of tensors, with the same axes in
            front.
        stacks: tensors (..., m, n), with equal axes in front.

    Elsewhere (one matrix, another device, torch.func, torch.compile) it is one call, and a tuple
    has torch's names only there: unpack it.

    >>> Q, R = each_matrix(torch.linalg.qr, torch.eye(2).expand(5, 2, 2))
    >>> Q.shape, R.shape
    (torch.Size([5, 2, 2]), torch.Size([5, 2, 2]))
    """
    axes = stacks[0].shape[:-2]
    if not axes.numel() or not axes or not is_plain_memory(*stacks):
        return function(*stacks)
    rows = zip(*[x.reshape(-1, *x.shape[-2:]) for x in stacks], strict=True)
    found = [function(*[x.clone() for x in row]) for row in rows]
    if isinstance(found[0], Tensor):
        return torch.stack(found).unflatten(0, axes)
    return tuple([torch.stack(column).unflatten(0, axes) for column in zip(*found, strict=True)])


def is_plain_memory(*tensors: Tensor) -> bool:
    """Whether these are in a CPU's memory, and not under a transform."""
    if torch.compiler.is_dynamo_compiling():
        return False
    if _functorch.peek_interpreter_stack() is None:
        for x in tensors:  # noqa: SIM110 (a generator is a call of Python for each)
            if not x.is_cpu:
                return False
        return True
    return all([x.is_cpu and not _functorch.is_functorch_wrapped_tensor(x) for x in tensors])
