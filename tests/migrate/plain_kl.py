"""The published KL methods written down once more, matrix by matrix, in plain float64.

From the equations of the sources as tests/reference/README.md has them; nothing of funshampoo.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _eigenvectors(S: Tensor) -> Tensor:
    return torch.linalg.eigh(S)[1].flip(-1)


def _turned(x: Tensor, Q: list[Tensor]) -> Tensor:
    for q in Q:  # each side goes to the end in its turn
        x = torch.tensordot(x, q, dims=([0], [0]))
    return x


def _back(x: Tensor, Q: list[Tensor]) -> Tensor:
    return _turned(x, [q.mT for q in Q])


def kl_methods(w: Tensor, grads: list[Tensor], args: dict[str, Any], soap: bool) -> list[Tensor]:
    """KLOpt on one matrix; the parameter after every call."""
    b1, b2 = args["betas"]
    bs = args.get("shampoo_beta", -1)
    bs = b2 if bs < 0 else bs
    eps, lr, f = args["eps"], args["lr"], args["precondition_frequency"]
    damping = eps if args.get("using_damping", False) else 0.0
    found = []
    for k, g in enumerate(grads):
        if k == 0:
            S = [(1 - bs) * g @ g.mT / g.shape[1], (1 - bs) * g.mT @ g / g.shape[0]]
            Q = [_eigenvectors(s) for s in S]
            h = [args.get("init_factor", 0.1) ** -0.5 * torch.ones(d).double() for d in g.shape]
            m, v = torch.zeros_like(g), torch.zeros_like(g)
            found.append(w)
            continue
        R = Q[0].mT @ g @ Q[1]
        if soap:
            m, v = b1 * m + (1 - b1) * R, b2 * v + (1 - b2) * R**2
            u = Q[0] @ (m / (v.sqrt() + eps)) @ Q[1].mT
        else:
            m, H = b1 * m + (1 - b1) * g, h[0][:, None] * h[1]
            u = Q[0] @ ((Q[0].mT @ m @ Q[1]) * H / (1 + eps * H)) @ Q[1].mT
        x, y = g @ Q[1] * h[1], h[0][:, None] * (Q[0].mT @ g)
        S[0] = bs * S[0] + (1 - bs) * x @ x.mT / g.shape[1]
        S[1] = bs * S[1] + (1 - bs) * y.mT @ y / g.shape[0]
        targets = [((R * h[1]) ** 2).mean(1), ((h[0][:, None] * R) ** 2).mean(0)]
        sizes = [(h[1] ** 2).mean(), (h[0] ** 2).mean()]
        h = [
            (bs / old**2 + (1 - bs) * (new + damping * size)) ** -0.5
            for old, new, size in zip(h, targets, sizes)
        ]
        if args.get("using_clamping", True):
            limit = args.get("max_clamp_value", 4000)
            h = [x.clamp(max=max(10, min(len(x), limit))) for x in h]
        if k % f == 0:
            new_Q = [torch.linalg.qr(s @ q)[0] for s, q in zip(S, Q)]
            m = _turned(_back(m, Q), new_Q) if soap else m
            Q = new_Q
        if args.get("normalize_grads", False):
            u = u / (u.square().mean().sqrt() + 1e-30)
        w = (w - lr * u) * (1 - lr * args["weight_decay"])
        found.append(w)
    return found


def emerging(w: Tensor, grads: list[Tensor], args: dict[str, Any]) -> list[Tensor]:
    """SOAP of Emerging-Optimizers on one matrix; the parameter after every call."""
    b1, b2 = args["betas"]
    bs, eps, lr, decay = args["shampoo_beta"], args["eps"], args["lr"], args["weight_decay"]
    corrects, kind = args.get("correct_bias", True), args.get("weight_decay_method", "decoupled")
    corrects_factors = args.get("correct_shampoo_beta_bias")
    corrects_factors = corrects if corrects_factors is None else corrects_factors
    r, c = w.shape
    S, Q = [torch.zeros(r, r).double(), torch.zeros(c, c).double()], [torch.eye(r), torch.eye(c)]
    Q, values = [q.double() for q in Q], [torch.zeros(r).double(), torch.zeros(c).double()]
    m, v, found = torch.zeros_like(w), torch.zeros_like(w), []
    for k, g in enumerate(grads, start=1):
        grams = [g @ g.mT, g.mT @ g]
        if args.get("use_kl_shampoo", False):
            inverse = [q @ torch.diag(1 / x.clamp(min=eps)) @ q.mT for q, x in zip(Q, values)]
            grams = [g @ inverse[1] @ g.mT / c, g.mT @ inverse[0] @ g / r]
        bk = 1 - (1 - bs) / (1 - bs**k) if corrects_factors else bs
        S = [bk * s + (1 - bk) * x for s, x in zip(S, grams)]
        new_Q = []
        for i, s in enumerate(S):
            if k == 1 or args.get("use_eigh", False):
                q = _eigenvectors(s)
            else:
                q = Q[i]
                for _ in range(args.get("power_iter_steps", 1)):
                    q = torch.linalg.qr(s @ q)[0]
                q = q[:, (q.mT @ s @ q).diagonal().argsort(descending=True)]
            values[i] = (q.mT @ s @ q).diagonal()
            new_Q.append(q)
        m, Q = _turned(_back(m, Q), new_Q), new_Q
        if kind == "l2":
            g = g + decay * w
        w = w * {"decoupled": 1 - lr * decay, "independent": 1 - decay, "l2": 1.0}[kind]
        R = _turned(g, Q)
        m, v = b1 * m + (1 - b1) * R, b2 * v + (1 - b2) * R**2
        c1, c2, ahead = (1 - b1**k, 1 - b2**k, 1 - b1 ** (k + 1)) if corrects else (1, 1, 1)
        moment = b1 * m / ahead + (1 - b1) * R / c1 if args.get("nesterov", False) else m / c1
        u = _back(moment / ((v / c2).sqrt() + eps), Q)
        if limit := args.get("max_update_rms", 0.0):
            u = u * min(1.0, float(limit / (u.square().mean().sqrt() + 1e-7)))
        w = w - lr * u
        found.append(w)
    return found
