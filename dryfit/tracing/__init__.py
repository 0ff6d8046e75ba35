"""A scenario's step on the meta device and on this machine: trace, loading, measurement, evaluation."""
