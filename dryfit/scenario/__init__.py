"""One training step as a value: its fields, each stated once, their checks, the model, its Hub id."""
