"""Recipes: short functions that return chains. Those in `__all__` are also known by name."""

from collections.abc import Callable

from funshampoo.core.contract import GradientTransformation
from funshampoo.recipes.diagonal import adamw, sgd
from funshampoo.recipes.eigenvalue_shampoo import eigenvalue_shampoo
from funshampoo.recipes.kl import kl_shampoo, kl_soap
from funshampoo.recipes.muon import muon, normuon, spectral_descent
from funshampoo.recipes.shampoo import shampoo
from funshampoo.recipes.signs import lion, sign_descent
from funshampoo.recipes.soap import soap
from funshampoo.recipes.soap_muon import soap_muon
from funshampoo.recipes.splus import splus

__all__ = [
    "adamw",
    "eigenvalue_shampoo",
    "kl_shampoo",
    "kl_soap",
    "lion",
    "muon",
    "normuon",
    "sgd",
    "shampoo",
    "sign_descent",
    "soap",
    "soap_muon",
    "spectral_descent",
    "splus",
]

RECIPES: dict[str, Callable[..., GradientTransformation]] = {
    name: globals()[name] for name in __all__
}
"""All of them, by name."""

ELEMENTWISE = frozenset({"adamw", "lion", "sgd", "sign_descent"})
"""Those to which a matrix is its entries; all others take `merge`, to know one from another."""

OF_ADAMS_LENGTH = frozenset({"adamw", "eigenvalue_shampoo", "kl_soap", "shampoo", "soap"})
"""Those whose steps are by default as long as Adam's, so that one learning rate serves both."""

LOOK_AHEAD = frozenset({"eigenvalue_shampoo", "kl_soap", "normuon", "soap"})
"""Those that nesterov=True made better on a task, and on none worse by more than the error; their
papers have it off. See docs/defaults.md."""
