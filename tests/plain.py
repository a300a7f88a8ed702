"""Shampoo once more, slowly and plainly: loops over parameters and blocks, numpy, the equations.

An independent truth for the chain: it shares no code with the package.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np


class PlainShampoo:
    """One parameter as a float64 array; call `step` with its gradient, get the new parameter."""

    def __init__(
        self,
        w: np.ndarray,
        lr: float,
        *,
        beta1: float = 0.9,
        beta2: float = 0.99,
        beta3: float | str | None = None,
        epsilon: float = 1e-4,
        every: int = 1,
        start: int | None = None,
        statistics_every: int = 1,
        exponents: float | str = 1 / 4,
        sides: str | None = None,
        max_size: int = 1024,
        merge: str = "none",
        grafting: str | None = "adam",
        grafting_beta2: float = 0.9,
        vectors: str = "blocks",
        momentum: float = 0.0,
        nesterov: bool = False,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        weight_decay_kind: str = "decoupled",
    ) -> None:
        self.w, self.lr, self.t = w.copy(), lr, 0
        self.beta1, self.beta2 = beta1, beta2
        named = {None: beta1, "nesterov": beta1**2}
        self.beta3 = named[beta3] if beta3 is None or isinstance(beta3, str) else beta3
        self.epsilon, self.every, self.start = epsilon, every, start or every
        self.statistics_every, self.seen, self.sides = statistics_every, 0, sides
        named = {"shampoo": 1 / 4, "shampoo_squared": 1 / 2}
        self.e = named[exponents] if isinstance(exponents, str) else exponents
        self.grafting, self.grafting_beta2 = grafting, grafting_beta2
        self.diagonal = vectors == "diagonal" and grafting is not None
        self.momentum, self.nesterov, self.dampening = momentum, nesterov, dampening
        self.decay, self.coupled = weight_decay, weight_decay_kind == "coupled"
        self.buffer = np.zeros_like(w)
        self.shape = self._merged(w.shape, max_size, merge)
        cuts = [[slice(i, min(i + max_size, d)) for i in range(0, d, max_size)] for d in self.shape]
        self.blocks = list(itertools.product(*cuts))
        self.states: list[dict[str, Any]] = []
        for block in self.blocks:
            piece = np.zeros(self.shape)[block]
            sides = piece.shape
            self.states.append(
                {
                    "L": [np.zeros((d, d)) for d in sides],
                    "X": [np.eye(d) for d in sides],
                    "M": np.zeros(sides),
                    "V": np.zeros(sides),
                }
            )

    @staticmethod
    def _merged(shape: tuple[int, ...], max_size: int, merge: str) -> tuple[int, ...]:
        if merge == "none":
            return shape
        sides = [d for d in shape if d != 1] or [1]
        if merge == "matrix":
            return tuple(sides[:1] + ([int(np.prod(sides[1:]))] if len(sides) > 1 else []))
        merged = [sides.pop()]
        while sides:
            d = sides.pop()
            if d * merged[0] <= max_size:
                merged[0] *= d
            else:
                merged.insert(0, d)
        return tuple(merged)

    def step(self, g: np.ndarray) -> np.ndarray:
        self.t += 1
        if self.t == 1 or self.t % self.statistics_every == 0:
            self.seen += 1
        if self.coupled:
            g = g + self.decay * self.w
        pieces = np.zeros(self.shape)
        g = g.reshape(self.shape)
        for block, state in zip(self.blocks, self.states):
            pieces[block] = self._block(g[block], state)
        p = pieces.reshape(self.w.shape)
        if self.momentum:
            self.buffer = self.momentum * self.buffer + (1 - self.dampening) * p
            ahead = (1 - self.dampening) * p + self.momentum * self.buffer
            p = ahead if self.nesterov else self.buffer
        if self.decay and not self.coupled:
            p = p + self.decay * self.w
        self.w = self.w - self.lr * p
        return self.w

    def _block(self, g: np.ndarray, s: dict[str, Any]) -> np.ndarray:
        t, k = self.t, g.ndim
        sides = list(range(k))
        if self.sides == "smaller" and k:
            sides = [min(sides, key=lambda i: (g.shape[i], i))]
        for i in sides:
            u = np.moveaxis(g, i, 0).reshape(g.shape[i], -1)
            if t == 1 or t % self.statistics_every == 0:
                s["L"][i] = self._average(s["L"][i], u @ u.T, self.beta2)
        if t == self.start or (t > self.start and t % self.every == 0):
            for i in sides:
                correction = 1 - self.beta2**self.seen if self.beta2 < 1 else 1.0
                lam, q = np.linalg.eigh(s["L"][i] / correction)
                power = -2 * self.e / len(sides)
                s["X"][i] = (q * (np.maximum(lam, 0) + self.epsilon) ** power) @ q.T
        m = g
        if self.beta1:
            m = self.beta3 * s["M"] + (1 - self.beta3) * g
            m = m / (1 - self.beta3 * self.beta1 ** (t - 1))
            s["M"] = self._average(s["M"], g, self.beta1)
        p = m
        for i in range(k):
            p = np.moveaxis(np.tensordot(s["X"][i], p, axes=(1, i)), 0, i)
        if self.grafting is None:
            return p
        p_g = self._partner(m, g, s)
        if t < self.start or (self.diagonal and k < 2):
            return p_g
        return p * (np.linalg.norm(p_g) / (np.linalg.norm(p) + 1e-16))

    def _partner(self, m: np.ndarray, g: np.ndarray, s: dict[str, Any]) -> np.ndarray:
        if self.grafting == "sgd":
            return m
        if self.grafting == "adagrad":
            s["V"] = s["V"] + g * g
            return m / (np.sqrt(s["V"]) + 1e-8)
        s["V"] = self._average(s["V"], g * g, self.grafting_beta2)
        v = s["V"] / (1 - self.grafting_beta2**self.t if self.grafting == "adam" else 1.0)
        return m / (np.sqrt(v) + 1e-8)

    @staticmethod
    def _average(old: np.ndarray, new: np.ndarray, beta: float) -> np.ndarray:
        return old + new if beta == 1 else beta * old + (1 - beta) * new
