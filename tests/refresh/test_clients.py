"""What people write on `Refreshing` passes the checks of every stage."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import funshampoo as fs
from funshampoo.testing import check_stage
from tests.refresh.clients import in_eigenbasis, kl_shampoo
from tests.sooner import these
from tests.test_position import one_thread

__all__ = ["one_thread"]  # a fixture, for all tests here

# By step 6 the statistics have full rank, and a basis is not a matter of rounding.
WHEN = {"every": 2, "start": 6}


def soap() -> fs.GradientTransformation:
    inner = fs.scale_by_adam(0.9, 0.95, 1e-3)
    return fs.chain(fs.kronecker_statistics(0.9), in_eigenbasis(inner, **WHEN))


def kl() -> fs.GradientTransformation:
    return kl_shampoo(0.9, **WHEN)


@pytest.mark.parametrize("method", these([soap, kl], sooner=[soap]))
def test_a_client_passes_the_checks_of_every_stage(
    method: Callable[[], fs.GradientTransformation],
) -> None:
    check_stage(method, steps=10)


@pytest.mark.parametrize("method", these([soap, kl], sooner=[kl]))
def test_a_client_in_blocks_passes_them_too(
    method: Callable[[], fs.GradientTransformation],
) -> None:
    check_stage(lambda: fs.blocked(fs.guarded(fs.chain(method())), 4), steps=10, compile=False)
