"""What fits and what to change: search, suggestions, several GPUs, a deadline."""
