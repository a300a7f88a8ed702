"""kl_statistics and scale_by_eigenvalues; their numbers are compared in tests/migrate too."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import funshampoo as fs
from funshampoo import linalg
from funshampoo.recipes import RECIPES
from tests.sooner import these

Shape = tuple[int, ...]


def gradients(shape: Shape, steps: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def stepped(tx: fs.GradientTransformation, grads: list[Any], state: Any = None) -> Any:
    state = tx.init({"w": next(g for g in grads if g is not None)}) if state is None else state
    for g in grads:
        updates, state = tx.update({"w": g}, state)
    return updates["w"], state


def around_roots(**options: Any) -> fs.GradientTransformation:
    exponents = dict.fromkeys((1, 2, 3), 0.5)
    root = fs.root_inverse(1, exponents=exponents, solver=linalg.eigh(relative_epsilon=0.0))
    return fs.chain(fs.kl_statistics(0.5, through="roots", **options), root)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4)], ids=str)
def test_through_roots_each_side_is_whitened_by_the_others(shape: Shape) -> None:
    """mat_i(G) (⊗_{j≠i} S_j^-1) mat_i(G)ᵀ, written with whole Kronecker products."""
    grads = gradients(shape, 13)
    _, state = stepped(around_roots(), grads[:-1])  # of full rank by now
    old, weight = state["kl_statistics"].statistics
    _, state = stepped(around_roots(), grads[-1:], state)
    new = state["kl_statistics"].statistics
    assert new.weight["w"] == pytest.approx(0.5 * float(weight["w"]) + 0.5)
    for i, d in enumerate(shape):
        rest = torch.eye(1, dtype=torch.float64)
        for j, L in enumerate(old["w"]):
            rest = torch.kron(rest, (L / weight["w"]).inverse()) if j != i else rest
        x = grads[-1].movedim(i, 0).reshape(d, -1)
        expected = 0.5 * old["w"][i] + 0.5 * x @ rest @ x.mT / x.shape[1]
        assert torch.allclose(new.factors["w"][i], expected, rtol=1e-7)


@pytest.mark.slow  # 3,000 steps
def test_equal_covariances_are_a_fixed_point() -> None:
    """Gradients of covariance A ⊗ B leave the estimates at A and B but for one factor."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([1.0, 9.0]).double()
    tx = fs.chain(
        fs.kl_statistics(0.998), fs.in_eigenbasis(fs.scale_by_eigenvalues(), every=50, offset=1)
    )
    state = tx.init({"w": torch.zeros(3, 2, dtype=torch.float64)})
    for _ in range(3000):
        noise = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        _, state = tx.update({"w": a.sqrt()[:, None] * noise * b.sqrt()}, state)
    rows, columns = state["kl_statistics"].eigenvalues["w"]
    expected = torch.outer(a.sort()[0], b.sort()[0])
    found = torch.outer(rows.sort()[0], columns.sort()[0])
    assert torch.allclose(found, expected, rtol=0.25)


@pytest.mark.parametrize("through", ["eigenvalues", "ritz"])
def test_a_gradient_of_none_or_nan_changes_nothing(through: Any) -> None:
    options: Any = {"least_eigenvalue": 0.1} if through == "ritz" else {"damping": 0.1}
    stages = [
        fs.kl_statistics(0.5, through=through, bias_correction=False, **options),
        fs.in_eigenbasis(fs.scale_by_adam(), every=1),
    ]
    tx = fs.blocked(fs.guarded(fs.chain(*stages)), 4)
    grads = gradients((3, 4), 4)
    _, before = stepped(tx, grads)
    for bad in (None, grads[0] * float("nan")):
        updates, after = tx.update({"w": bad}, before, {"w": grads[0]})
        old, new = [fs.state.state_dict(x) for x in (before, after)]
        names = [name for name in old if "kl_statistics" in name]
        assert names
        assert all(torch.equal(old[name], new[name]) for name in names)
        assert bad is None or not updates["w"].any()


def test_the_first_gradient_gives_bases_alone() -> None:
    tx = fs.chain(fs.kl_statistics(0.5), fs.in_eigenbasis(fs.scale_by_eigenvalues(), every=1))
    grads = gradients((3, 4), 2)
    first, state = stepped(tx, grads[:1])
    assert not first.any()
    assert all((x == 0.1).all() for x in state["kl_statistics"].eigenvalues["w"])
    second, state = stepped(tx, grads[1:], state)
    assert torch.allclose(second, grads[1] / 0.1)  # all eigenvalues are 0.1 still
    assert all((x != 0.1).all() for x in state["kl_statistics"].eigenvalues["w"])


def test_a_side_without_a_factor_has_eigenvalues() -> None:
    def first_alone(block: Shape) -> list[bool]:
        return [True, *[False] * (len(block) - 1)]

    statistics = fs.kl_statistics(0.5, sides=first_alone)
    tx = fs.chain(statistics, fs.in_eigenbasis(fs.scale_by_eigenvalues(), every=1))
    _, state = stepped(tx, gradients((3, 4)))
    assert state["kl_statistics"].statistics.factors["w"][1] == ()
    assert [x.shape[0] for x in state["kl_statistics"].eigenvalues["w"]] == [3, 4]


def test_in_turn_is_about_three_sides() -> None:
    def final(shape: Shape, in_turn: bool) -> Tensor:
        statistics = fs.kl_statistics(0.5, in_turn=in_turn)
        tx = fs.chain(statistics, fs.in_eigenbasis(fs.scale_by_eigenvalues(), every=1))
        found: Tensor = stepped(tx, gradients(shape))[0]
        return found

    assert torch.equal(final((3, 4), True), final((3, 4), False))
    assert (final((2, 3, 4), True) - final((2, 3, 4), False)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta2": 1.0}, ValueError, "beta2 is 1.0"),
        ({"through": "root"}, ValueError, "through is 'root'"),
        ({"damping": -1.0}, ValueError, "damping is -1.0"),
        ({"initial_eigenvalue": 0.0}, ValueError, "initial_eigenvalue is 0.0"),
        ({"least_eigenvalue": -1.0}, ValueError, "least_eigenvalue is -1.0"),
        ({"through": "ritz"}, ValueError, 'least_eigenvalue is 0.0; with through="ritz".*give'),
        ({"starts_whole": True}, ValueError, "starts_whole stands with bias_correction=False"),
        ({"starts_whole": True, "through": "roots"}, ValueError, "starts_whole stands with thr"),
        ({"in_turn": True, "through": "roots"}, ValueError, "in_turn stands with through"),
        ({"damping": 0.1, "through": "roots"}, ValueError, "damping stands with through"),
        ({"damping": torch.tensor(0.1), "through": "roots"}, ValueError, "damping stands with thr"),
        ({"initial_eigenvalue": 1.0, "through": "roots"}, ValueError, "initial_eigenvalue stands"),
        ({"least_eigenvalue": 0.1, "through": "roots"}, ValueError, "by the epsilon of root_inv"),
        ({"in_turn": 1}, TypeError, "in_turn"),
        ({"sides": "larger"}, ValueError, "sides is 'larger'"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fs.kl_statistics(**options)


@pytest.mark.parametrize("through", ["eigenvalues", "ritz", "roots"])
def test_it_says_which_stage_it_misses(through: Any) -> None:
    wanted = "root_inverse" if through == "roots" else "in_eigenbasis"
    least = 0.0 if through == "roots" else 0.1
    statistics = fs.kl_statistics(0.5, through=through, least_eigenvalue=least)
    with pytest.raises(ValueError, match=rf"found no {wanted}\(\.\.\.\) for its blocks: put it"):
        stepped(fs.chain(statistics, fs.ema()), gradients((2, 2), 1))
    other = bases(1) if through == "roots" else fs.root_inverse(1)
    goes = "eigenvalues" if through == "roots" else "roots"
    with pytest.raises(ValueError, match=rf'that is there goes through="{goes}"'):
        stepped(fs.chain(statistics, other), gradients((2, 2), 1))


ONE_FOR_BOTH: dict[str, Callable[[], list[fs.GradientTransformation]]] = {
    "eigenvalues": lambda: [fs.kl_statistics(0.5), fs.in_eigenbasis(fs.scale_by_adam())],
    "ritz": lambda: [
        fs.kl_statistics(0.5, through="ritz", least_eigenvalue=0.1),
        fs.in_eigenbasis(fs.sign()),
    ],
    "roots": lambda: [fs.kl_statistics(0.5, through="roots"), fs.root_inverse(1)],
    "shampoo": lambda: [fs.kronecker_statistics(), fs.root_inverse(1)],
    "soap": lambda: [fs.kronecker_statistics(), fs.in_eigenbasis(fs.scale_by_adam())],
}


@pytest.mark.parametrize("name", ONE_FOR_BOTH)
@pytest.mark.parametrize("hides", ["masked", "partition"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_parameter_that_half_of_a_pair_does_not_see_is_named(
    which: int, hides: str, name: str
) -> None:
    def hidden(stage: fs.GradientTransformation) -> fs.GradientTransformation:
        if hides == "masked":
            return fs.masked(stage, {"a": True, "b": False})
        return fs.partition({"x": stage, "y": stage}, {"a": "x", "b": "y"})

    pair, whole = ONE_FOR_BOTH[name](), fs.chain(*ONE_FOR_BOTH[name]())
    pair[which] = hidden(pair[which])
    tx, params = fs.chain(*pair), dict.fromkeys("ab", torch.ones(3, 3))
    is_fine = which == 1 and name in ("shampoo", "soap")  # statistics that nobody reads
    says = r"found no .* for '[ab]', which masked\(...\) or partition.*put a chain of the two"
    with contextlib.nullcontext() if is_fine else pytest.raises(ValueError, match=says):
        tx.update(params, tx.init(params))
    hidden(whole).update(params, hidden(whole).init(params))


OTHER_EIGENVALUES = {
    "none": (lambda: [fs.kronecker_statistics()], ": put"),
    "ritz": (
        lambda: [fs.kl_statistics(through="ritz", least_eigenvalue=0.1)],
        "in the nearest kl_statistics before it, whose through",
    ),
    "of other bases": (
        lambda: [fs.kl_statistics(), fs.in_eigenbasis(fs.sign()), fs.kronecker_statistics()],
        "in its bases: another in_eigenbasis",
    ),
    "of bases in a chain": (
        lambda: [fs.kl_statistics(), fs.chain(fs.in_eigenbasis(fs.scale_by_eigenvalues()))],
        "in its bases: another in_eigenbasis",
    ),
    "of the other branch's bases": (
        lambda: [
            fs.kl_statistics(),
            fs.graft(
                fs.in_eigenbasis(fs.scale_by_eigenvalues(), every=1),
                onto=fs.in_eigenbasis(fs.scale_by_eigenvalues(), every=3),
            ),
        ],
        "in its bases: another in_eigenbasis",
    ),
}


@pytest.mark.parametrize(
    ("through", "later"),
    [("roots", fs.root_inverse(1)), ("eigenvalues", fs.in_eigenbasis(fs.scale_by_adam()))],
)
def test_other_statistics_between_are_refused(through: Any, later: Any) -> None:
    """The later stage goes by those, and these would be whitened by what is not theirs."""
    own = fs.kl_statistics(0.5, through=through)
    tx = fs.chain(own, fs.kronecker_statistics(0.9), later)
    (g,) = gradients((3, 4), 1)
    with pytest.raises(ValueError, match="is followed by other statistics"):
        tx.init({"w": g})


@pytest.mark.parametrize("name", OTHER_EIGENVALUES)
def test_scale_by_eigenvalues_says_which_stage_it_misses(name: str) -> None:
    before, message = OTHER_EIGENVALUES[name]
    own = [] if "branch" in name else [fs.in_eigenbasis(fs.scale_by_eigenvalues(), every=3)]
    tx = fs.chain(*before(), *own)
    with pytest.raises(ValueError, match=f"scale_by_eigenvalues found no eigenvalues.*{message}"):
        tx.init({"w": torch.ones(2, 2)})


IN_EIGENBASES = fs.in_eigenbasis(fs.scale_by_eigenvalues(), every=1)


@pytest.mark.parametrize("shape", these([(4,), (3, 4), (2, 3, 4)], sooner=[(4,), (3, 4)]), ids=str)
@pytest.mark.parametrize("through", ["eigenvalues", "roots"])
def test_after_zeros_for_long_nothing_overflows(through: Any, shape: Shape) -> None:
    """What was whitened by roots of 1e19 had infinite squares, and the block never moved again."""
    beta2 = 0.1
    root = fs.root_inverse(1, exponents=dict.fromkeys((1, 2, 3), 0.5))
    later = root if through == "roots" else IN_EIGENBASES
    tx = fs.chain(fs.kl_statistics(beta2, through=through), later)
    grads = [g.float() for g in gradients(shape, 200)]
    for i in range(3, 60):
        grads[i] = torch.zeros(shape)  # 0.1^57 is no number of float32
    state = tx.init({"w": grads[0]})
    for g in grads:
        updates, state = tx.update({"w": g}, state)
        for name, x in fs.state.state_dict(state).items():
            assert x.isfinite().all(), name
        assert updates["w"].isfinite().all()
    expected = stepped(tx, grads[100:])[0]  # as if there had been no zeros
    assert expected.norm() / 10 < updates["w"].norm() < 10 * expected.norm()


@pytest.mark.parametrize("sort", [False, True])
def test_orthogonal_iteration_finds_the_eigenvectors(sort: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    A = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    A = A @ A.mT
    Q = torch.linalg.qr(torch.randn(2, 5, 5, generator=generator, dtype=torch.float64))[0]
    basis = linalg.orthogonal_iteration(sort, steps=2)
    for _ in range(300):
        Q, found = basis(A, Q, torch.zeros(2, dtype=torch.bool))
    D = Q.mT @ A @ Q
    assert found.all()
    assert torch.allclose(D, torch.diag_embed(D.diagonal(dim1=-2, dim2=-1)), atol=1e-8)
    assert (D.diagonal(dim1=-2, dim2=-1).diff() < 0).all()


def test_orthogonal_iteration_begins_with_a_decomposition() -> None:
    A = torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)).expand(2, 3, 3)
    old = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    Q, _ = linalg.orthogonal_iteration()(A, old, torch.tensor([True, False]))
    assert Q[0].abs().argmax(0).tolist() == [1, 2, 0]  # the largest first
    assert Q[1].abs().argmax(0).tolist() == [0, 1, 2]  # a step from the old one


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 3), (0, 2, 2)], ids=str)
@pytest.mark.parametrize("through", ["eigenvalues", "ritz", "roots"])
def test_a_parameter_without_entries_beside_others(through: Any, shape: Shape) -> None:
    later = fs.root_inverse(1) if through == "roots" else fs.in_eigenbasis(fs.scale_by_adam(), 1)
    least = 0.0 if through == "roots" else 0.1
    tx = fs.chain(fs.kl_statistics(0.5, through=through, least_eigenvalue=least), later)
    params = {"w": torch.ones(2, 3), "nothing": torch.zeros(shape)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state)
    assert updates["nothing"].shape == shape
    assert updates["w"].isfinite().all()
    fs.state.check(state)


def test_bases_that_begin_as_the_identity() -> None:
    """What `seen` would count is not asked: λ_i is renewed from the first gradient on."""
    bases = fs.in_eigenbasis(fs.scale_by_adam(), every=9, start=9, first="identity")
    tx = fs.chain(fs.kl_statistics(0.5, initial_eigenvalue=0.25), bases)
    g = gradients((3, 4), 1)
    _, state = stepped(tx, g)
    rows, columns = state["kl_statistics"].eigenvalues["w"]
    squares = g[0].square() / 0.25  # seen through the other side's eigenvalues, in the identity
    torch.testing.assert_close(rows, 0.5 * 0.25 + 0.5 * squares.mean(1))
    torch.testing.assert_close(columns, 0.5 * 0.25 + 0.5 * squares.mean(0))


PAIRS = {
    "roots": lambda: ("roots", fs.root_inverse(1)),
    "soap": lambda: ("eigenvalues", fs.in_eigenbasis(fs.scale_by_rms(0.5), 1)),
    "shampoo": lambda: ("eigenvalues", fs.in_eigenbasis(fs.scale_by_eigenvalues(), 1)),
}


@pytest.mark.parametrize("other", PAIRS)
@pytest.mark.parametrize("one", PAIRS)
def test_two_in_a_chain_are_pairs_with_the_stages_behind_them(one: str, other: str) -> None:
    """Another pair changes nothing for the first, nor for the stage that is in its bases."""

    def pair(name: str) -> list[fs.GradientTransformation]:
        through, later = PAIRS[name]()
        return [fs.kl_statistics(0.5, through=through), later]

    found: list[Any] = []
    seen = fs.stateless(lambda updates: found.append(updates["w"]) or updates, "seen")
    g = gradients((3, 4), 4)
    for pairs in (pair(one), [*pair(one), seen, *pair(other)]):
        updates, state = stepped(fs.chain(*pairs), g)
        found.append((updates, state["kl_statistics"]))
    alone, *_, first, both = found
    torch.testing.assert_close(both[1], alone[1], rtol=0, atol=0)
    torch.testing.assert_close(first, alone[0], rtol=0, atol=0)


WRAPPED: dict[str, Callable[..., fs.GradientTransformation]] = {
    "chain": fs.chain,
    "masked": lambda stage: fs.masked(stage, True),
    "guarded": lambda stage: fs.guarded(stage, by_leaf=True),
    "every_k": lambda stage: fs.every_k(stage, 1),
}


@pytest.mark.parametrize("part", ["statistics", "bases", "pair"])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_pair_is_one_too_where_part_of_it_is_in_a_combinator(wrap: str, part: str) -> None:
    """With another pair behind it, whose eigenvalues are others."""
    around = WRAPPED[wrap]

    def both(first: Any, second: Any) -> fs.GradientTransformation:
        behind = fs.kl_statistics(0.9), fs.in_eigenbasis(fs.scale_by_eigenvalues(), 1)
        return fs.chain(*first, *second, *behind)

    statistics, bases = fs.kl_statistics(0.5), fs.in_eigenbasis(fs.scale_by_eigenvalues(), 1)
    tx = {
        "statistics": lambda: both([around(statistics)], [bases]),
        "bases": lambda: both([statistics], [around(bases)]),
        "pair": lambda: both([around(fs.chain(statistics, bases))], []),
    }[part]()
    g = gradients((3, 4), 4)
    expected = stepped(both([statistics], [bases]), g)[0]
    torch.testing.assert_close(stepped(tx, g)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("tile", [None, 5])
@pytest.mark.parametrize("name", ["kl_shampoo", "kl_soap", "soap", "shampoo"])
def test_a_parameter_goes_its_way_whatever_rows_are_there(name: str, tile: int | None) -> None:
    """Of some stacks all rows, of others some, as one of them has no gradient: of which states the
    step sees, some are the stack's own tensors, and some are parts."""
    shapes = {"a": (3, 4), "b": (3, 4), "v": (4,), "w": (4,)}
    tx = RECIPES[name](0.01, every=2, tile=tile)
    for absent in shapes:
        params = {n: torch.ones(s, dtype=torch.float64) for n, s in shapes.items()}
        alone = {n: {n: p.clone()} for n, p in params.items()}
        state, states = tx.init(params), {n: tx.init(p) for n, p in alone.items()}
        for t, draws in enumerate(zip(*[gradients(s, 5) for s in shapes.values()])):
            grads = {n: None if n == absent and t % 2 else g for n, g in zip(shapes, draws)}
            state = fs.update_in_place(tx, grads, state, params)
            for n, own in alone.items():
                states[n] = fs.update_in_place(tx, {n: grads[n]}, states[n], own)
        for n, own in alone.items():
            torch.testing.assert_close(params[n], own[n], rtol=0, atol=1e-12)


def bases(every: int) -> fs.GradientTransformation:
    return fs.in_eigenbasis(fs.sign(), every)


root = functools.partial(fs.root_inverse, exponents="shampoo_squared")
NEXT: dict[str, tuple[str, Any, list[Any]]] = {  # through, whom it reads, what is in the chain
    "graft": ("eigenvalues", bases, [fs.graft(bases(1), onto=bases(3))]),
    "pairs": (
        "eigenvalues",
        bases,
        [fs.chain(bases(1), fs.chain(fs.kl_statistics(0.9), bases(3)))],
    ),
    "roots": ("roots", root, [fs.chain(root(1), fs.kronecker_statistics(), root(3))]),
    "beside bases": ("roots", root, [fs.graft(root(1), onto=bases(1))]),
    **{f"behind {name}": ("roots", root, [w(bases(1)), root(1)]) for name, w in WRAPPED.items()},
}


@pytest.mark.parametrize("name", NEXT)
def test_statistics_are_whitened_by_the_next_stage_in_whatever_it_stands(name: str) -> None:
    """Bases are no roots, and a second stage of the kind has other values."""
    through: Any
    through, read, behind = NEXT[name]
    g, statistics = gradients((3, 4), 4), fs.kl_statistics(0.5, through=through)
    found, expected = [
        stepped(fs.chain(statistics, *later), g)[1]["kl_statistics"]
        for later in (behind, [read(1)])
    ]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_bases_in_a_combinator_are_no_roots_either(wrap: str) -> None:
    tx = fs.chain(fs.kl_statistics(through="roots"), WRAPPED[wrap](bases(1)))
    with pytest.raises(ValueError, match=r"found no root_inverse\(...\)"):
        stepped(tx, gradients((3, 4), 1))


def test_the_last_state_before_a_stage_is_found_in_whatever_it_stands() -> None:
    """Two statistics: the roots are those of the nearer, though it is part of another state."""
    g, root = gradients((3, 4), 3), fs.root_inverse(1)
    two = fs.chain(fs.kronecker_statistics(0.5), fs.chain(fs.kronecker_statistics(0.9)), root)
    one = fs.chain(fs.kronecker_statistics(0.9), root)
    torch.testing.assert_close(stepped(two, g)[0], stepped(one, g)[0], rtol=0, atol=0)
