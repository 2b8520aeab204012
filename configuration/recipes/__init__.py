"""Training recipes: one module each, which defines `RECIPE`."""
