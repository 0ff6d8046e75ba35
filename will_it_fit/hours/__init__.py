"""How long a step takes on a card that is not there; hours, cost and energy of a run."""
