"""What every dimension of every tensor is: axis inference by type unification. See docs/axes.md."""
