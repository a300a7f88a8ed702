"""nikhilvyas/SOAP written down once more, tensor by tensor, in plain float64.

From its equations as tests/reference/README.md has them; nothing of funshampoo. A basis of None is
of a side that is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Bases = list[Tensor | None]


def _turned(x: Tensor, Q: Bases, back: bool = False) -> Tensor:
    for side, q in enumerate(Q):
        if q is not None:
            x = torch.tensordot(x, q, dims=([side], [int(back)])).movedim(-1, side)
    return x


def _gram(x: Tensor, side: int) -> Tensor:
    rows = x.movedim(side, 0).flatten(1) if x.ndim > 1 else x[:, None]
    return rows @ rows.mT


def _merged(shape: tuple[int, ...], limit: int) -> list[int]:
    """Each side goes into the one before it while the product is at most the limit."""
    found = [1]
    for d in shape:
        if found[-1] * d <= limit:
            found[-1] *= d
        elif found[-1] > 1:
            found.append(d)
        else:
            found[-1:] = [d, 1]
    return found if found[-1] > 1 or len(found) == 1 else found[:-1]


class _View:
    """A parameter in the order and the shape in which its statistics are taken."""

    def __init__(self, shape: tuple[int, ...], args: dict[str, Any]) -> None:
        merges = args.get("merge_dims", False) and len(shape) > 1
        swaps = merges and args.get("data_format") == "channels_last" and len(shape) == 4
        # out, height, width, in
        order = [0, 3, 1, 2] if swaps else list(range(len(shape)))
        self.order, self.own = order, tuple(shape[i] for i in order)
        limit = args.get("max_precond_dim", 10000)
        self.merged = _merged(self.own, limit) if merges else list(self.own)

    def of(self, x: Tensor) -> Tensor:
        return x.permute(self.order).reshape(self.merged)

    def back(self, x: Tensor) -> Tensor:
        return x.reshape(self.own).permute([self.order.index(i) for i in range(len(self.order))])


def soap(w: Tensor, grads: list[Tensor], args: dict[str, Any]) -> list[Tensor]:
    """The parameter after every call."""
    b1, b2 = args.get("betas", (0.95, 0.95))
    bs = args.get("shampoo_beta", -1)
    bs = b2 if bs < 0 else bs
    lr, eps, decay = args["lr"], args.get("eps", 1e-8), args.get("weight_decay", 0.01)
    limit, f = args.get("max_precond_dim", 10000), args["precondition_frequency"]
    view = _View(tuple(w.shape), args)
    alone = w.ndim == 1 and not args.get("precondition_1d", False)
    used = [not alone and d <= limit for d in view.merged]
    S = [torch.zeros(d, d).double() for d in view.merged]
    m = v = torch.zeros(view.merged).double()
    Q: Bases = []
    found = []
    for k, grad in enumerate(grads):
        g = view.of(grad)
        if k:
            R = _turned(g, Q)
            m, v = b1 * m + (1 - b1) * R, b2 * v + (1 - b2) * R**2
            u = view.back(_turned(m / (v.sqrt() + eps), Q, back=True))
            if args.get("normalize_grads", False):
                u = u / u.square().mean().sqrt()
            corrected = args.get("correct_bias", True)
            size = (1 - b2**k) ** 0.5 / (1 - b1**k) if corrected else 1.0
            w = (w - lr * size * u) * (1 - lr * decay)
        S = [bs * s + (1 - bs) * _gram(g, side) for side, s in enumerate(S)]
        if not k:
            Q = [torch.linalg.eigh(s)[1].flip(-1) if own else None for s, own in zip(S, used)]
        elif k % f == 0:
            m = _turned(m, Q, back=True)
            for side, q in enumerate(Q):
                if q is not None:
                    order = (q.mT @ S[side] @ q).diagonal().argsort(descending=True)
                    v = v.index_select(side, order)
                    Q[side] = torch.linalg.qr(S[side] @ q[:, order]).Q
            m = _turned(m, Q)
        found.append(w)
    return found
