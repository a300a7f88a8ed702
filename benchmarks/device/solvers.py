"""Roots of real factor matrices, and the factorizations that they could be made from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.device.clock import Reading, read, summary, turns
from benchmarks.device.group import Cell, Row, Setting, in_a_line
from benchmarks.device.products import tf32
from benchmarks.factors import Stack, stack
from funshampoo import linalg
from funshampoo.linalg.cholesky_qr import cholesky_qr

SIDES = (256, 1024, 512, 128, 2048, 64)
COUNTS = (8, 64, 1)
POWER = 4
EPSILON = 1e-6
DRIFT = 0.1  # the share of other gradients in the statistics that the old basis is of
COLUMNS = 16  # of the gradients
LONGEST = 4.0  # seconds that one call may be expected to take
ONCE = 1.0  # seconds from which on one call is enough


class Case(NamedTuple):
    """A stack to take roots of, and what is known of it.

    Attributes:
        A: (N, d, d) float32.
        damped: A and the damping of 1e-6 of the largest eigenvalue, which is 1.
        old: (N, d, d) float32, eigenvectors of statistics that differ by a tenth.
        names: of the spectra.
        gradients: {kind: (N, d, columns) float64}.
        wanted: {kind: the same, preconditioned in float64}.
    """

    A: Tensor
    damped: Tensor
    old: Tensor
    names: list[str]
    gradients: dict[str, Tensor]
    wanted: dict[str, Tensor]


Answer = Callable[[], Tensor | linalg.InverseRoot | None]

Known = dict[str, tuple[int, int, float]]
"""{solver: (side, count, seconds)} of the last call: what the next will take is told by it."""


def cells(setting: Setting) -> Iterator[Cell]:
    """One for every side and number of matrices."""
    known: Known = {}
    for side in setting.pick(SIDES, (32, 64)):
        for count in setting.pick(COUNTS, (8, 16, 1)):
            least = 6.0 if side > 512 else 3.0
            name = f"{count} of {side}"
            yield Cell(name, partial(_cell, side, count, known, setting), setting.pick(least, 1.0))


def _cell(side: int, count: int, known: Known, setting: Setting) -> Iterator[Row]:
    case = case_of(side, count, setting.device)
    answers = answers_for(case)
    first: dict[str, Reading] = {}
    accuracy: dict[str, Row] = {}
    for name, answer in answers.items():
        expected = _expected(known.get(name), side, count)
        if expected > min(LONGEST, setting.left() / 2):
            yield {"of": name, "skipped": f"about {expected:.1f} s"}
            continue
        try:
            first[name], found = read(answer, setting.device)
            accuracy[name] = _errors(found, case)
        except Exception as error:
            yield {"of": name, "error": in_a_line(error)}
            continue
        known[name] = (side, count, first[name].device)
        if first[name].device > ONCE:
            yield {"of": name, "cold": True} | summary([first[name]]) | accuracy.pop(name)
    often = {name: answers[name] for name in accuracy}
    seconds = min(setting.pick(1.5, 0.1), setting.left() / 4)
    readings = turns(often, setting.device, seconds=seconds, least=3, most=20, warmup=1)
    for name, found in readings.items():
        known[name] = (side, count, min(r.device for r in found))
        yield {"of": name} | summary(found) | accuracy[name]


def _expected(known: tuple[int, int, float] | None, side: int, count: int) -> float:
    """Seconds, from another stack: they grow with the square of the side as long as it is small."""
    if known is None:
        return 0.0
    other, others, seconds = known
    return seconds * (side / other) ** 2 * count / others


def case_of(side: int, count: int, device: torch.device) -> Case:
    """The first `count` factors; more than there are spectra are copies of them."""
    whole = _distinct(side, device)
    n = len(whole.names)
    order = [i % n for i in range(count)]
    rows = torch.tensor(order, device=device)
    return Case(
        *(x[rows] for x in whole[:3]),
        [whole.names[i] for i in order],
        *({kind: x[rows] for kind, x in known.items()} for known in whole[4:]),
    )


@functools.lru_cache(maxsize=1)
def _distinct(side: int, device: torch.device) -> Case:
    factors: Stack = stack(side, 8, device)
    A = factors.A
    values, Q = torch.linalg.eigh(A.double())  # of what was rounded, as every solver gets it
    make = torch.Generator(device).manual_seed(side)

    def drawn(columns: int) -> Tensor:
        shape = (*A.shape[:-1], columns)
        return torch.randn(shape, generator=make, device=device, dtype=torch.float64)

    root = values.clamp(min=0).sqrt()[..., None]
    Z, late = drawn(COLUMNS), drawn(side)
    gradients = {"": Q @ (root * (Q.mT @ Z)), "white_": Z}
    old = _older_basis(Q, root, Q @ (root * (Q.mT @ late)))
    damping = EPSILON * values[:, -1:]
    power = (values.clamp(min=0) + damping)[..., None] ** (-1 / POWER)
    wanted = {kind: Q @ (power * (Q.mT @ G)) for kind, G in gradients.items()}
    damped = A + damping.float()[..., None] * torch.eye(side, device=device)
    return Case(A, damped, old, factors.names, gradients, wanted)


def _older_basis(Q: Tensor, root: Tensor, late: Tensor) -> Tensor:
    """Eigenvectors of statistics like A's, with a tenth of other gradients of the same kind.

    That of the largest eigenvalue comes first: each column of D Q leans towards those before it,
    which the QR decomposition takes out.
    """
    share = late @ late.mT / late.shape[-1]
    older = (Q * (1 - DRIFT) * root.mT**2) @ Q.mT + DRIFT * share
    return torch.linalg.eigh(older.float()).eigenvectors.flip(-1)


def answers_for(case: Case) -> dict[str, Answer]:
    """By name. What returns None is a factorization alone, whose time is of interest."""
    A, D, Q = case.A, case.damped, case.old
    eigh = linalg.eigh(relative_epsilon=EPSILON)
    schulz = linalg.newton_schulz(relative_epsilon=EPSILON, condition=1 / EPSILON)
    newton = linalg.coupled_newton(relative_epsilon=EPSILON)

    def in_float64() -> linalg.InverseRoot:
        found = eigh(A.double(), POWER)
        return found._replace(root=found.root.float())

    def rounded(solver: linalg.Solver) -> linalg.InverseRoot:
        with tf32():
            return solver(A, POWER)

    def alone(factorization: Callable[[Tensor], object]) -> None:
        factorization(D)

    return {
        "eigh": lambda: eigh(A, POWER),
        "newton_schulz": lambda: schulz(A, POWER),
        "coupled_newton": lambda: newton(A, POWER),
        "QR of the old basis": lambda: in_basis(D, torch.linalg.qr(D @ Q).Q),
        "Cholesky-QR of the old basis": lambda: in_basis(D, cholesky_qr(D @ Q, Q)),
        "torch.linalg.eigh alone": lambda: alone(torch.linalg.eigh),
        "torch.linalg.qr alone": lambda: alone(torch.linalg.qr),
        "torch.linalg.cholesky_ex alone": lambda: alone(torch.linalg.cholesky_ex),
        "newton_schulz, TF32": lambda: rounded(schulz),
        "coupled_newton, TF32": lambda: rounded(newton),
        "eigh in float64": in_float64,
    }


def in_basis(D: Tensor, Q: Tensor) -> Tensor:
    """D^(-1/p), were Q its eigenvectors: Q diag(QᵀDQ)^(-1/p) Qᵀ."""
    values = (Q * (D @ Q)).sum(-2)
    return (Q * values.clamp(min=EPSILON)[..., None, :] ** (-1 / POWER)) @ Q.mT


def _errors(found: Tensor | linalg.InverseRoot | None, case: Case) -> Row:
    """Relative errors of preconditioned gradients: the median, and the worst and of which."""
    if found is None:
        return {}
    row: Row = {}
    if isinstance(found, linalg.InverseRoot):
        row["converged"] = float(found.converged.double().mean())
        found = found.root
    distinct = len(set(case.names))
    X = found[:distinct].double()
    for kind, G in case.gradients.items():
        wanted = case.wanted[kind][:distinct]
        each = (X @ G[:distinct] - wanted).norm(dim=(-2, -1)) / wanted.norm(dim=(-2, -1))
        each = each.nan_to_num(nan=torch.inf)
        row[f"{kind}relative_error"] = float(each.median())
        row[f"{kind}worst"] = float(each.max())
        row[f"{kind}worst_of"] = case.names[int(each.argmax())]
    return row
