"""Recipes: short functions that return chains."""

from funshampoo.recipes.diagonal import adamw, sgd
from funshampoo.recipes.reference import from_reference
from funshampoo.recipes.shampoo import shampoo

__all__ = ["adamw", "from_reference", "sgd", "shampoo"]
