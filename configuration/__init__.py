"""Training recipes: short files of validated settings."""

from .recipe import Recipe, load_recipe, recipe_names

__all__ = ["Recipe", "load_recipe", "recipe_names"]
