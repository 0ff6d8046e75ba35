"""Records families for the derived form: ``python -m dryfit.recorder FAMILY``."""
