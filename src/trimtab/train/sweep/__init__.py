"""A sweep: variants of one recipe, trained together on one copy of the base, of which the best is kept."""
