"""Recipes: short functions that return chains."""

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
