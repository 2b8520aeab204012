"""The recipes, one module each, with the recipe as `RECIPE`."""
