"""Recipes: short functions that return chains."""

from funshampoo.recipes.diagonal import adamw, sgd
from funshampoo.recipes.shampoo import shampoo
from funshampoo.recipes.soap import soap

__all__ = ["adamw", "sgd", "shampoo", "soap"]
