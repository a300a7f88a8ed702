"""Recipes: short functions that return chains. Those of `__all__` are known by name, too."""

from collections.abc import Callable

from funshampoo.core.contract import GradientTransformation
from funshampoo.recipes.diagonal import adamw, sgd
from funshampoo.recipes.muon import muon, normuon, spectral_descent
from funshampoo.recipes.shampoo import shampoo
from funshampoo.recipes.signs import lion, sign_descent
from funshampoo.recipes.soap import soap

__all__ = [
    "adamw",
    "lion",
    "muon",
    "normuon",
    "sgd",
    "shampoo",
    "sign_descent",
    "soap",
    "spectral_descent",
]

RECIPES: dict[str, Callable[..., GradientTransformation]] = {
    name: globals()[name] for name in __all__
}
"""All of them, by name."""

ELEMENTWISE = frozenset({"adamw", "lion", "sgd", "sign_descent"})
"""Those to which a matrix is its entries; all others take `merge`, to know one from another."""
