"""Packed symmetric matrices: each entry stored once, in half the memory.

A symmetric S with d rows is cut after its first h = ⌈d/2⌉, and r = d - h are left:

    S = [ A  B ]      packed: [ T  B ], (h, 2r + 1) = d (d + 1) / 2 numbers
        [ Bᵀ C ]

The r + 1 columns of T hold A's lower triangle and, one column to the right of its place in C, C's
upper triangle: where one ends the other begins. For d = 5:

    a .  .  b b                   a c c  b b
    a a  .  b b                   a a c  b b
    a a  a  b b      packed:      a a a  b b
             c c
             . c

It is LAPACK's rectangular full packed format (Gustavson et al., ACM TOMS 37, 2010) except for the
order of the parts. Ordinary products update it in 3/4 of a full product's work, see
`operators.packed_statistics`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from funshampoo.core.modes import constant
from funshampoo.linalg.products import is_plain_memory

SMALLEST = 64
"""Side from which stages pack: below it as many operators would save little memory."""


def packs(d: int, wanted: bool) -> bool:
    """Whether a stage stores a d×d matrix packed, if that is `wanted`."""
    return wanted and d >= SMALLEST


def packed_shape(d: int) -> tuple[int, int]:
    """(h, 2r + 1), the shape of a packed d×d matrix.

    >>> packed_shape(5), packed_shape(4)
    ((3, 5), (2, 5))
    """
    h = (d + 1) // 2
    return h, 2 * (d - h) + 1


def pack(S: Tensor) -> Tensor:
    """S (..., d, d), symmetric, as (..., h, 2r + 1).

    >>> pack(torch.tensor([[1, 2, 3], [2, 4, 5], [3, 5, 6]]))
    tensor([[1, 6, 3],
            [2, 4, 5]])
    """
    h = packed_shape(S.shape[-1])[0]
    return join(S[..., :h, :h], S[..., :h, h:], S[..., h:, h:])


def join(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The packed form of [[A, B], [Bᵀ, C]]."""
    h, r = B.shape[-2:]
    T = torch.where(is_of_first(h, r, A.device), pad(A, (0, r + 1 - h)), pad(C, (1, 0, 0, h - r)))
    return torch.cat([T, B], -1)


@constant
def is_of_first(h: int, r: int, device: torch.device) -> Tensor:
    """(h, r + 1) bool: where T holds an entry of A; elsewhere it holds C's."""
    return torch.ones(h, r + 1, dtype=torch.bool, device=device).tril()


def unpack(packed: Tensor) -> Tensor:
    """The symmetric (..., d, d) of a packed matrix; a square matrix comes back as it is.

    Copies part by part on a CPU; elsewhere and under a transform, by one index for all matrices.
    A million numbers take 0.6 to 0.7 ms in one CPU thread, and 1.2 at a side of 1,024.

    >>> unpack(torch.tensor([[1, 6, 3], [2, 4, 5]]))
    tensor([[1, 2, 3],
            [2, 4, 5],
            [3, 5, 6]])
    """
    if packed.shape[-2] == packed.shape[-1]:
        return packed
    d, lead = side_of(packed), packed.shape[:-2]
    if is_plain_memory(packed) and not packed.requires_grad:
        return _mirrored(packed, packed.new_empty(*lead, d, d))
    index = _sources(d, packed.device).expand(*lead, d * d)
    return packed.flatten(-2).gather(-1, index).view(*lead, d, d)


def _mirrored(packed: Tensor, S: Tensor) -> Tensor:
    """S, overwritten with the full matrices."""
    h = packed.shape[-2]
    r = S.shape[-1] - h
    A, B, C = packed[..., :h], packed[..., r + 1 :], packed[..., :r, 1 : r + 1]
    lower = is_of_first(h, h - 1, S.device)  # (h, h)
    S[..., :h, h:], S[..., h:, :h] = B, B.mT
    torch.where(lower, A, A.mT, out=S[..., :h, :h])
    torch.where(lower[:r, :r], C.mT, C, out=S[..., h:, h:])
    return S


def side_of(packed: Tensor) -> int:
    """The d of a packed or unpacked d×d matrix: the two shapes coincide only for d = 1."""
    h, columns = packed.shape[-2:]
    return columns - (columns > 2 * h)


def like(S: Tensor, other: Tensor) -> Tensor:
    """The full matrix S, packed if `other` is."""
    return S if other.shape[-2] == other.shape[-1] else pack(S)


def in_form_of(S: Tensor, other: Tensor) -> Tensor:
    """S packed if `other` is, unpacked if not; unchanged if the shapes are not these two forms."""
    if min(S.ndim, other.ndim) < 2:
        return S
    d = side_of(other)
    forms = (d, d), packed_shape(d)
    if {S.shape[-2:], other.shape[-2:]} != set(forms):
        return S
    return unpack(S) if S.shape[-2:] == forms[1] else pack(S)


@constant
def _sources(d: int, device: torch.device) -> Tensor:
    """For every entry of the d×d matrix, row by row, the index of its packed number."""
    h, columns = packed_shape(d)
    i = torch.arange(h, device=device)
    j = i[: d - h]
    row_of_A, row_of_C = i * columns, j * columns
    A = torch.maximum(row_of_A[:, None], row_of_A) + torch.minimum(i[:, None], i)
    B = row_of_A[:, None] + (j + (d - h + 1))
    C = torch.minimum(row_of_C[:, None], row_of_C) + torch.maximum(j[:, None], j) + 1
    return torch.cat([torch.cat([A, B], 1), torch.cat([B.mT, C], 1)]).flatten()
