"""Recipes: short functions that return chains."""

from funshampoo.recipes.diagonal import adamw, sgd
from funshampoo.recipes.kl import kl_shampoo, kl_soap
from funshampoo.recipes.muon import muon, normuon, spectral_descent
from funshampoo.recipes.shampoo import shampoo
from funshampoo.recipes.signs import lion, sign_descent
from funshampoo.recipes.soap import soap

__all__ = [
    "adamw",
    "kl_shampoo",
    "kl_soap",
    "lion",
    "muon",
    "normuon",
    "sgd",
    "shampoo",
    "sign_descent",
    "soap",
    "spectral_descent",
]
