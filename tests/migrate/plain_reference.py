"""Methods of the Distributed Shampoo reference written down once more, in plain float64.

One tensor at a time, a block as it is, without grafting, decay or momentum; nothing of funshampoo.
How a basis is found again follows the source step by step: the QR algorithm on B = QᵀAQ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EIGENVALUE_CORRECTED = "EigenvalueCorrectedShampooPreconditionerConfig"


def _along(x: Tensor, matrices: list[Tensor]) -> Tensor:
    for m in matrices:  # each side goes to the end in its turn
        x = torch.tensordot(x, m, dims=([0], [0]))
    return x


def _is_good(B: Tensor, tolerance: float) -> bool:
    return bool((B - B.diagonal().diag()).norm() <= tolerance * B.norm())


def found_again(A: Tensor, Q: Tensor, config: dict[str, Any]) -> tuple[Tensor, Tensor, bool]:
    """(eigenvalues, eigenvectors, whether Q was good enough)."""
    tolerance = config.get("tolerance", 0.0)
    B = Q.mT @ A @ Q
    good = _is_good(B, tolerance)
    if not config["type"].startswith("QR"):
        if tolerance > 0 and good:
            return B.diagonal(), Q, good
        return (*torch.linalg.eigh(A), good)
    for _ in range(config.get("max_iterations", 1)):
        if _is_good(B, tolerance):
            break
        U, R = torch.linalg.qr(B)
        B, Q = R @ U, Q @ U
    order = B.diagonal().argsort(stable=True)
    return B.diagonal()[order], Q[:, order], good


def shampoo(
    w: Tensor, grads: list[Tensor], args: dict[str, Any], goods: list[bool]
) -> list[Tensor]:
    """The parameter after every step; `goods` gets a bool for each side of each refresh."""
    (b1, b2), eps, f = args["betas"], args["epsilon"], args["precondition_frequency"]
    method = args["preconditioner_config"]
    config = method["amortized_computation_config"]
    stability = config.get("rank_deficient_stability_config", {})
    before = eps if stability.get("perturb_before_computation", True) else 0.0
    corrects = method["type"] == EIGENVALUE_CORRECTED
    L = [torch.zeros(d, d).double() for d in w.shape]
    Q = [torch.eye(d).double() for d in w.shape]
    lam = [torch.ones(d).double() for d in w.shape]
    m, V = torch.zeros_like(w), torch.zeros_like(w)
    found = []
    for t, g in enumerate(grads, 1):
        sides = [g.movedim(i, 0).flatten(1) for i in range(g.ndim)]
        L = [b2 * old + (1 - b2) * x @ x.mT for old, x in zip(L, sides)]
        m = b1 * m + (1 - b1) * g
        if t % f == 0:
            for i, old in enumerate(L):
                A = old / (1 - b2**t) + before * torch.eye(len(old)).double()
                lam[i], Q[i], good = found_again(A, Q[i], config)
                goods.append(good)
        mean = m / (1 - b1**t)
        if corrects:
            V = b2 * V + (1 - b2) * _along(g, Q) ** 2
            u = _along(mean, Q) / ((V / (1 - b2**t)).sqrt() + eps)
            u = _along(u, [q.mT for q in Q])
        else:
            damped = lam if before else [x + eps for x in lam]
            exponent = 1 / (2 * w.ndim)
            u = _along(mean, [q * x**-exponent @ q.mT for q, x in zip(Q, damped)])
        w = w - args["lr"] * u
        found.append(w)
    return found
