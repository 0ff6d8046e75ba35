"""Models that do not continue a text, by name: the small program that trains one, run over a simulated card.

:mod:`.recipe` reads the programs of ``dryfit/data/recipes``, :mod:`.models` finds a model's configuration, and
:mod:`.follow` runs the one with the other.
"""
