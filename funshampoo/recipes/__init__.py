"""Recipes: short functions that return chains."""

from funshampoo.recipes.diagonal import adamw, sgd
from funshampoo.recipes.shampoo import shampoo

__all__ = ["adamw", "sgd", "shampoo"]
