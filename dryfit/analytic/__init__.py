"""The closed form: the memory of a step from its configuration alone, without torch."""
