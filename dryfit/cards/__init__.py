"""GPUs: the catalogue, their names as people write them, what is usable and what is free."""
