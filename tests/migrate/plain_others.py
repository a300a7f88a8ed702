"""The Muons, SPlus, Schedule-Free and SOAP-Muon written down once more, in plain float64.

Tensor by tensor, from the equations of the sources as tests/reference/README.md has them; nothing
of funshampoo. Each takes a parameter, its gradients, the rate of every call and the constructor's
arguments, all of them, and returns (the parameters after every call, those to evaluate with or []).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Found = tuple[list[Tensor], list[Tensor]]
Arguments = dict[str, Any]

JORDAN = (3.4445, -4.7750, 2.0315)
CONVERGING = (2.0, -1.5, 0.5)
NVIDIA = {  # (polynomials, whether the last one is repeated)
    "simple": ([JORDAN], False),
    "cans": (
        [
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ],
        True,
    ),
    "polar_express": (
        [
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.8750, -1.25, 0.375),
        ],
        True,
    ),
    "quintic": (
        [
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ],
        False,
    ),
    "aol": (
        [
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ],
        False,
    ),
}
DION = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def _size(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1), keepdim=True).sqrt()


def _polar(X: Tensor, polynomials: Sequence[tuple[float, ...]], size: Tensor) -> Tensor:
    tall = X.shape[-2] > X.shape[-1]
    X = (X.mT if tall else X) / size
    for a, b, c in polynomials:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def muon(w: Tensor, grads: list[Tensor], rates: list[float], args: Arguments) -> Found:
    """KellerJordan's, of two sides or more: scaled by the last two, whatever these are."""
    mu, B, found = args["momentum"], torch.zeros_like(w), []
    for g, lr in zip(grads, rates):
        B = mu * B + (1 - mu) * g
        U = (1 - mu) * g + mu * B if args["nesterov"] else B
        U = U.flatten(1) if U.ndim == 4 else U
        P = _polar(U, [JORDAN] * args["ns_steps"], _size(U) + 1e-7).reshape(w.shape)
        factor = max(1.0, w.shape[-2] / w.shape[-1]) ** 0.5
        w = w * (1 - lr * args["weight_decay"]) - lr * factor * P
        found.append(w)
    return found, []


def muon_torch(w: Tensor, grads: list[Tensor], rates: list[float], args: Arguments) -> Found:
    mu, B, found, (r, c) = args["momentum"], torch.zeros_like(w), [], w.shape
    matched = args["adjust_lr_fn"] == "match_rms_adamw"
    factor = 0.2 * math.sqrt(max(r, c)) if matched else math.sqrt(max(1.0, r / c))
    for g, lr in zip(grads, rates):
        B = mu * B + (1 - mu) * g
        U = (1 - mu) * g + mu * B if args["nesterov"] else B
        steps = [tuple(args["ns_coefficients"])] * args["ns_steps"]
        P = _polar(U, steps, _size(U).clamp(min=args["eps"]))
        w = w * (1 - lr * args["weight_decay"]) - lr * factor * P
        found.append(w)
    return found, []


def muon_nvidia(w: Tensor, grads: list[Tensor], rates: list[float], args: Arguments) -> Found:
    mu, decay, B, found, (r, c) = args["momentum"], args["weight_decay"], 0 * w, [], w.shape
    known, last = NVIDIA[args["coefficient_type"]]
    places = range(args["num_ns_steps"])
    steps = [known[min(i, len(known) - 1) if last else i % len(known)] for i in places]
    factor = (
        args["extra_scale_factor"]
        * {
            "spectral": math.sqrt(max(r, c)),
            "shape_scaling": math.sqrt(max(1.0, r / c)),
            "unit_rms_norm": math.sqrt(r / c),
        }[args["scale_mode"]]
    )
    for g, lr in zip(grads, rates):
        kind = args["weight_decay_method"]
        g = g + decay * w if kind == "l2" else g
        w = w * {"decoupled": 1 - lr * decay, "independent": 1 - decay, "l2": 1.0}[kind]
        B = mu * B + (1 - mu) * g
        U = (1 - mu) * g + mu * B if args["nesterov"] else B
        w = w - lr * factor * _polar(U, steps, _size(U).clamp(min=1e-15))
        found.append(w)
    return found, []


def normuon(w: Tensor, grads: list[Tensor], rates: list[float], args: Arguments) -> Found:
    mu, beta2, decay, eps = [args[n] for n in ("mu", "muon_beta2", "weight_decay", "epsilon")]
    M, v, found = torch.zeros_like(w), torch.zeros_like(w[..., :1]), []
    r, c = (w.shape[0], w[0].numel()) if args["flatten"] else w.shape[-2:]
    factors = {"spectral_norm": math.sqrt(r / c), "rms_norm": 0.2 * math.sqrt(max(r, c)), None: 1.0}
    polar_express = args["use_polar_express"]
    steps = DION if polar_express else NVIDIA["quintic"][0]
    for g, lr in zip(grads, rates):
        M = mu * M + g
        U = g + mu * M if args["nesterov"] else M
        U = U.flatten(1) if args["flatten"] else U
        P = _polar(U, steps, (1.02 if polar_express else 1.0) * _size(U) + eps).reshape(w.shape)
        v = beta2 * v + (1 - beta2) * P.square().mean(-1, keepdim=True)
        N = P / (v.sqrt() + 1e-8)
        N = N * _size(P) / _size(N).clamp(min=1e-8)
        shrinks = (w * N >= 0).double() if args["cautious_wd"] else 1.0
        w = w - lr * decay * shrinks * w - lr * factors[args["adjust_lr"]] * N
        found.append(w)
    return found, []


def splus(w: Tensor, grads: list[Tensor], rates: list[float], args: Arguments) -> Found:
    b1, b2, share, most = [args[n] for n in ("b1", "b2", "ema_rate", "max_dim")]
    kept = [d < most for d in w.shape] if w.ndim == 2 else []
    matrix = w.ndim == 2 and max(w.shape) <= most
    factor = 2 / sum(w.shape) if matrix else args["nonstandard_constant"]
    S, Q = [torch.zeros(d, d).double() for d in w.shape], [torch.eye(d).double() for d in w.shape]
    m, x, found, averages = torch.zeros_like(w), torch.zeros_like(w), [], []
    for k, (g, lr) in enumerate(zip(grads, rates), 1):
        m = b1 * m + (1 - b1) * g
        u = Q[0] @ (Q[0].mT @ m @ Q[1]).sign() @ Q[1].mT if w.ndim == 2 else m.sign()
        if w.ndim == 2:
            S = [b2 * s + (1 - b2) * gram for s, gram in zip(S, (g @ g.mT, g.mT @ g))]
            if k == 1 or k % args["inverse_every"] == 0:
                Q = [torch.linalg.eigh(s)[1] if own else q for s, q, own in zip(S, Q, kept)]
        w = w - lr * factor * u
        x = share * x + (1 - share) * w
        w = w * (1 - lr * factor * args["weight_decay"])
        found.append(w)
        averages.append(x / (1 - share**k))
    return found, averages


def schedule_free(w: Tensor, grads: list[Tensor], rates: list[float], args: Arguments) -> Found:
    """AdamW by `inner_momentum`, RAdam by `silent_sgd_phase`, SGD by `momentum` among the args."""
    sgd, radam = "momentum" in args, "silent_sgd_phase" in args
    beta, b2 = (args["momentum"], 0.0) if sgd else args["betas"]
    b1, warmup = args.get("inner_momentum", 0.0), args.get("warmup_steps", 0)
    x, y, z, m, v, total, largest = w, w, w, 0 * w, 0 * w, 0.0, 0.0
    found, averages = [], []
    for k, (g, lr) in enumerate(zip(grads, rates), 1):
        lr, known = lr * min(1.0, k / warmup) if warmup else lr, True
        if radam:
            most = 2 / (1 - b2) - 1
            rho = most - 2 * k * b2**k / (1 - b2**k)
            known = rho > 4
            grown = (rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)
            lr *= math.sqrt(grown) if known else float(not args["silent_sgd_phase"])
        largest = max(largest, lr)
        weight = k ** args["r"] * largest ** args["weight_lr_power"]
        total += weight
        c = weight / total if total else 0.0
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        plain = sgd or not known
        u = g if plain else m / (1 - b1**k) / ((v / (1 - b2**k)).sqrt() + args["eps"])
        z = z - lr * (u + args["weight_decay"] * y)
        x = (1 - c) * x + c * z
        y = beta * x + (1 - beta) * z
        found.append(y)
        averages.append(x)
    return found, averages


def _schatten4(X: Tensor) -> Tensor:
    return _size(X @ X.mT if X.shape[0] <= X.shape[1] else X.mT @ X).sqrt()


def _cosine(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


def _clipped(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def _gate(W: Tensor, U: Tensor, g: Tensor, t: int, args: Arguments) -> float:
    agree, align = args["trust_min_agree"], args["trust_min_grad_align"]
    start, end = args["trust_floor_end_step"], args["trust_floor_fade_end_step"]
    gate = _clipped((_cosine(W, U) - agree) / (1 - agree), 0, 1)
    gate *= _clipped((_cosine(W, g) - align) / max(_cosine(U, g) - align, 1e-8), 0, 1)
    faded = 0.0 if t < start else 1.0 if t >= end else (t - start) / (end - start)
    cap = 1.0 if t >= end else args["trust_cap"]
    return min(max(gate ** args["trust_power"], args["trust_floor"] * (1 - faded)), cap)


def soap_muon(w: Tensor, grads: list[Tensor], rates: list[float], args: Arguments) -> Found:
    """One matrix of the record, whose role is `args["roles"]`, without looking ahead."""
    role, mu, b2 = args["roles"], args["mu"], args["soap_beta2"]
    M, v, S, found = torch.zeros_like(w), torch.zeros_like(w), [0.0, 0.0], []
    Q: list[Tensor] = []
    for t, (g, lr) in enumerate(zip(grads, rates)):
        M = mu * M + (1 - mu) * g
        U = (1 - mu) * g + mu * M
        if Q and role != "plain":
            R = Q[0].mT @ U @ Q[1]
            v = b2 * v + (1 - b2) * R * R
            W = Q[0] @ (R / v.clamp(min=1e-16) ** args["denom_power"]) @ Q[1].mT
            W = W * (_schatten4(U) / _schatten4(W))
            V = U + (_gate(W, U, g, t, args) if role == "attn_proj" else 1.0) * (W - U)
            U = V * (_schatten4(U) / _schatten4(V))
        P = _polar(U, [CONVERGING] * 12, _schatten4(U)) * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
        along = (P * w).sum() / (w * w).sum()
        brake = args["radial_outward_scale" if along < 0 else "radial_inward_scale"]
        P = P + (brake - 1) * along * w
        P = P * max(1.0, float(args["target_uw"] * w.norm() / P.norm()))
        radius = w.norm() - lr * (P * w).sum() / w.norm()
        w = w - lr * P
        w = w * radius / w.norm()
        S = [b2 * s + (1 - b2) * gram for s, gram in zip(S, (g @ g.mT, g.mT @ g))]
        if not Q:
            Q = [torch.linalg.eigh(s)[1].flip(-1) for s in S]
        elif t % args["soap_frequency"] == 0:
            for side, s in enumerate(S):
                order = (Q[side].mT @ s @ Q[side]).diagonal().argsort(descending=True)
                v = v.index_select(side, order)
                Q[side] = torch.linalg.qr(s @ Q[side][:, order])[0]
        found.append(w)
    return found, []
