"""The types that a user's checker sees: of trees through a step, of options."""

from __future__ import annotations

import importlib.resources
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import funshampoo as fs
from funshampoo.optim.shampoo import ShampooOptions, WrapperOptions

ROOT = Path(__file__).parents[2]
USERS = Path(__file__).with_name("users.py")


@pytest.mark.slow
def test_mypy_finds_in_a_users_code_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    source = tmp_path / "users.py"  # the configuration of this repository is not a user's
    source.write_text(USERS.read_text())
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir"]
    done = subprocess.run(
        [*command, str(tmp_path / "cache"), str(source)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # And it can fail: a marked line without its mark is an error of that kind.
    marks = USERS.read_text().count("# type: ignore[")
    assert marks >= 12
    source.write_text(USERS.read_text().replace("# type: ignore[", "# ["))
    done = subprocess.run(
        [*command, str(tmp_path / "cache"), str(source)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == marks, done.stdout
    typo = next(line for line in errors if '"momentun" for "Shampoo"' in line)
    assert 'did you mean "momentum"' in typo


def types_of(function: object) -> dict[str, object]:
    hints = typing.get_type_hints(function)
    return {name: x for name, x in hints.items() if name not in ("return", "options", "params")}


def test_the_options_of_the_wrapper_are_those_of_the_recipe() -> None:
    recipe = types_of(fs.shampoo)
    learning_rate, *betas = [recipe.pop(n) for n in ("learning_rate", "beta1", "beta2")]
    own = types_of(fs.Shampoo.__init__)
    assert learning_rate == own.pop("lr") | fs.Schedule  # the wrapper has schedulers for that
    assert own.pop("betas") == tuple[tuple(betas)]  # type: ignore[misc]
    options = typing.get_type_hints(ShampooOptions)
    assert ShampooOptions.__required_keys__ == frozenset()
    assert options.keys().isdisjoint(own)
    everywhere = typing.get_type_hints(WrapperOptions)
    assert own | options == recipe | everywhere


def test_the_defaults_of_the_wrapper_are_those_of_the_recipe() -> None:
    """But for the learning rate, which the recipe has none for."""
    recipe = {n: p.default for n, p in inspect.signature(fs.shampoo).parameters.items()}
    own = {n: p.default for n, p in inspect.signature(fs.Shampoo.__init__).parameters.items()}
    assert own.pop("betas") == (recipe["beta1"], recipe["beta2"])
    shared = own.keys() & recipe.keys()
    assert {"epsilon", "weight_decay", "momentum", "nesterov", "every", "max_size"} == shared
    assert all(own[name] == recipe[name] for name in shared)


def test_every_option_is_taken_with_the_recipes_default() -> None:
    parameters = inspect.signature(fs.shampoo).parameters
    others = {"compile": False, "maximize": True, "consolidate": True, "accept_adamw": True}
    others |= {"cuda_graph": True, "tf32": True, "stochastic_rounding": True}
    assert others.keys() == WrapperOptions.__annotations__.keys()
    given = {
        name: parameters[name].default
        for name in ShampooOptions.__annotations__
        if name not in others
    }
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))  # which stochastic_rounding needs
    optimizer = fs.Shampoo([p], lr=0.5, **given, **others)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.detach().tolist() == pytest.approx([0.5, 0.5], abs=2**-8)
    with pytest.raises(TypeError, match="'momentun'; did you mean 'momentum'"):
        fs.Shampoo([p], momentun=0.9)


def test_the_package_says_that_it_is_typed() -> None:
    assert importlib.resources.files(fs).joinpath("py.typed").is_file()
