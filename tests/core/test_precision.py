"""The process' setting for products: full inside, the same afterwards, whoever set it and how."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from funshampoo.core.modes import asking_for_tf32, full_precision, product_precision
from funshampoo.core.precision import products_are_rounded
from tests.releases import wrong_before

NEW = hasattr(torch._C, "_get_fp32_precision_getter")
PLACES = [
    ("generic", "all"),
    ("cuda", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("mkldnn", "all"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
]


def write(*settings: tuple[str, str, str]) -> Callable[[], None]:
    def carry_out() -> None:
        for setting in settings:
            torch._C._set_fp32_precision_setter(*setting)

    return carry_out


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def one_after_the_other() -> None:
    torch.set_float32_matmul_precision("high")
    write(("mkldnn", "matmul", "bf16"))()


SETTINGS: dict[str, Callable[[], None]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": allow_tf32,
}
if NEW:
    SETTINGS |= {
        "cuda products": write(("cuda", "matmul", "tf32")),
        "cuda": write(("cuda", "all", "tf32")),
        "mkldnn products": write(("mkldnn", "matmul", "bf16")),
        "mkldnn": write(("mkldnn", "all", "bf16")),
        "everything": write(("generic", "all", "tf32")),
        "everything in bf16": write(("generic", "all", "bf16")),
        "everything and again": write(("generic", "all", "tf32"), ("cuda", "matmul", "tf32")),
        "all three": write(*[(a, b, "tf32") for a, b in PLACES if b != "conv"]),
        "but for cuda": write(("generic", "all", "bf16"), ("cuda", "all", "ieee")),
        "one after the other": one_after_the_other,
    }


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    assert not products_are_rounded()
    yield
    torch.set_float32_matmul_precision("highest")
    if NEW:
        for backend, operation in PLACES:
            value = "tf32" if (backend, operation) == ("cuda", "conv") else "none"
            torch._C._set_fp32_precision_setter(backend, operation, value)


def readings() -> list[object]:
    """What every place says, and what the older functions say or that they raise."""
    found: list[object] = []
    for read in (torch.get_float32_matmul_precision, torch._C._get_cublas_allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("raises")
    if NEW:
        found += [torch._C._get_fp32_precision_getter(*place) for place in PLACES]
    return found


def written() -> list[object]:
    """`readings`, and again where what places may follow is changed: this tells who follows."""
    found = readings()
    if NEW:
        for changed in (("generic", "all", "ieee"), ("cuda", "all", "ieee")):
            write(changed)()
            found += readings()
        write(("mkldnn", "all", "ieee"))()
        found += readings()
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_full_inside_and_the_same_afterwards(name: str) -> None:
    SETTINGS[name]()
    before = readings()
    assert products_are_rounded()
    with full_precision():
        assert not products_are_rounded()
        assert torch.get_float32_matmul_precision() == "highest"  # the two interfaces agree
        assert not torch.backends.cuda.matmul.allow_tf32
        with full_precision():
            assert not products_are_rounded()
        assert not products_are_rounded()
    assert readings() == before


@pytest.mark.parametrize("name", [*SETTINGS, "nothing"])
def test_rounded_where_that_is_asked_for_and_the_same_afterwards(name: str) -> None:
    """On a GPU, and nowhere else; inside of it what must be full is full."""
    SETTINGS.get(name, lambda: None)()
    before = readings()
    with asking_for_tf32(), product_precision():
        inside = readings()
        assert inside[1] is True or inside == before  # it was rounded, and this does not touch it
        with full_precision():
            assert not products_are_rounded()
        assert readings() == inside
    assert readings() == before


@pytest.mark.skipif(not NEW, reason="one setting for all devices")
def test_a_cpu_is_full_where_a_gpu_is_rounded() -> None:
    torch.set_float32_matmul_precision("medium")
    with asking_for_tf32(), product_precision():
        assert torch._C._get_fp32_precision_getter("mkldnn", "matmul") == "ieee"
        assert torch.backends.cuda.matmul.allow_tf32


def test_who_sets_another_precision_meanwhile_keeps_it() -> None:
    with asking_for_tf32(), product_precision():
        torch.set_float32_matmul_precision("medium")
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("first_out", ["rounded", "full"])
def test_a_thread_that_rounds_and_one_that_must_not(first_out: str) -> None:
    """Whoever leaves last, the setting is what it was before both."""
    before = readings()
    with asking_for_tf32():
        rounded = product_precision()
    full = full_precision
    rounded.__enter__()
    other: list[Any] = []

    def enter() -> None:
        other.append(full())
        other[0].__enter__()

    def leave() -> None:
        other[0].__exit__(None, None, None)

    def in_a_thread(function: Callable[[], None]) -> None:
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    in_a_thread(enter)
    assert not products_are_rounded()
    if first_out == "rounded":
        rounded.__exit__(None, None, None)
        in_a_thread(leave)
    else:
        in_a_thread(leave)
        rounded.__exit__(None, None, None)
    assert readings() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_what_followed_another_place_follows_it_again(name: str) -> None:
    SETTINGS[name]()
    expected = written()
    torch.set_float32_matmul_precision("highest")
    if NEW:
        write(*[(*place, "none") for place in PLACES if place[1] != "conv"])()
    SETTINGS[name]()
    with full_precision():
        pass
    assert written() == expected


def test_the_same_after_an_exception() -> None:
    torch.set_float32_matmul_precision("medium")
    before = readings()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), full_precision():
            raise error
        assert readings() == before


def test_nothing_is_entered_where_products_are_full() -> None:
    assert isinstance(full_precision(), contextlib.nullcontext)


def test_with_autocast() -> None:
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu"):
        with full_precision():
            assert not torch.is_autocast_enabled("cpu")
            assert not products_are_rounded()
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_float32_matmul_precision() == "high"


def test_the_last_one_out_puts_it_back() -> None:
    torch.set_float32_matmul_precision("high")
    first, second = full_precision(), full_precision()
    first.__enter__()
    third = full_precision()  # made where products are full already
    second.__enter__()
    third.__enter__()
    for context in (first, second):
        context.__exit__(None, None, None)
        assert not products_are_rounded()
    third.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "high"


def test_a_precision_that_somebody_sets_meanwhile() -> None:
    torch.set_float32_matmul_precision("high")
    with full_precision():
        torch.set_float32_matmul_precision("medium")
        with full_precision():
            assert not products_are_rounded()
    assert torch.get_float32_matmul_precision() == "medium"
    with full_precision():
        torch.set_float32_matmul_precision("high")
    assert torch.get_float32_matmul_precision() == "high"


def test_many_threads() -> None:
    torch.set_float32_matmul_precision("medium")
    before, wrong = readings(), []

    def work() -> None:
        for _ in range(300):
            with full_precision():
                wrong.extend([1] * products_are_rounded())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert readings() == before


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_in_a_graph(precision: str) -> None:
    """It is traced without a break, and sets nothing."""
    wrong_before("2.9", "a graph changes medium to high", precision == "medium")

    def product(x: torch.Tensor) -> torch.Tensor:
        with full_precision():
            return x @ x.mT

    torch.set_float32_matmul_precision(precision)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 4)
    torch.testing.assert_close(compiled(x), product(x))
    with full_precision():
        assert compiled(x).equal(product(x))
    assert torch.get_float32_matmul_precision() == precision
