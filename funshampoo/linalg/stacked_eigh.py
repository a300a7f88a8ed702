"""torch.linalg.eigh of a stack in which single matrices may fail."""

from __future__ import annotations

import torch
from torch import Tensor

from funshampoo.linalg.solver import check_matrix

LARGEST_CALL = 2**31 - 1
"""Numbers in one call on a GPU: side² × batch. cuSOLVER's batched call, which torch makes from 2.12
on, counts them in 32 bits."""

NOT_THE_MATRIX = (
    torch.OutOfMemoryError,
    MemoryError,
    NotImplementedError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""Errors that are raised, since any other matrix in its place would have failed too."""

LACK_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
"""Messages of a plain RuntimeError if a workspace can't be allocated, in cuSOLVER or on a CPU."""


def stacked_eigh(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """λ (..., d) ascending, Q (..., d, d), and which (...) of A = Q diag(λ) Qᵀ were decomposed.

    LAPACK and cuSOLVER report a failing matrix by LinAlgError, another RuntimeError, or whatever
    their wrappers raise. In each case that matrix is decomposed again in float64; one that fails
    there too gets the identity's spectrum.

    Errors that are not the matrix's fault are raised: a wrong shape or dtype, checked before any
    call, so that no LAPACK error is mistaken for one; lack of memory, by its type or message; and
    Python's own errors about the call. Inside torch.compile, whose graphs can't catch exceptions,
    all are raised.

    A: (..., d, d), finite. LAPACK works on columns: it is given Aᵀ, which equals A, and can be
    copied without a transposition.
    """
    solved = torch.ones(A.shape[:-2], dtype=torch.bool, device=A.device)
    if torch.compiler.is_dynamo_compiling():
        return *_in_calls(A), solved
    check_matrix(A)
    try:
        return *_in_calls(A), solved
    except Exception as error:
        if not is_of_the_matrix(error):
            raise
        return _one_by_one(A)


def is_of_the_matrix(error: Exception) -> bool:
    """Whether the error is due to the matrix: another one might have been decomposed."""
    said = str(error)
    return not isinstance(error, NOT_THE_MATRIX) and not any(x in said for x in LACK_OF_MEMORY)


def _in_calls(A: Tensor) -> tuple[Tensor, Tensor]:
    """λ and Q, in as many calls as the device needs for this many numbers."""
    side = A.shape[-1]
    if A.numel() <= _largest_call(A):
        values, vectors = torch.linalg.eigh(A.mT)
        return values, vectors
    rows = max(_largest_call(A) // side**2, 1)
    flat = A.reshape(-1, side, side)
    calls = [torch.linalg.eigh(part.mT) for part in torch.split(flat, rows)]
    values = torch.cat([values for values, _ in calls])
    columns = torch.cat([vectors.mT for _, vectors in calls])
    return values.reshape(A.shape[:-1]), columns.reshape(A.shape).mT


def _largest_call(A: Tensor) -> int:
    return LARGEST_CALL if A.is_cuda else A.numel()


def _one_by_one(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The stack's decompositions if one fails: that one in float64, or else the identity's.

    One by one from the start, and in the memory layout of a stack's eigenvectors (column-major), so
    that the others match their results without the failure.
    """
    stack = [_one(matrix) for matrix in A.reshape(-1, *A.shape[-2:])]
    values, rows, solved = (torch.stack(column) for column in zip(*stack, strict=True))
    return values.reshape(A.shape[:-1]), rows.reshape(A.shape).mT, solved.reshape(A.shape[:-2])


def _one(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """λ (d,), Qᵀ (d, d), and whether it succeeded."""
    for dtype in (matrix.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.mT.to(dtype))
        except Exception as error:
            if not is_of_the_matrix(error):
                raise
            continue
        return values.to(matrix), vectors.mT.to(matrix), values.new_ones((), dtype=torch.bool)
    ones = matrix.new_ones(matrix.shape[-1])
    return ones, ones.diag(), ones.new_zeros((), dtype=torch.bool)
