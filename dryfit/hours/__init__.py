"""How long a step takes on a GPU that is not there; hours, cost and energy of a run."""
