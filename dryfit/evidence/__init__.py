"""Measured steps: what people measured on real GPUs, how far predictions were off, and which rows are like a step."""
