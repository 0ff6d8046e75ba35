"""What an inference engine beside a training holds: vLLM's memory by its own rules, without torch."""
