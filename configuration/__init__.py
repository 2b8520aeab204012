"""What is run: recipes as short, validated data."""

from .recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
