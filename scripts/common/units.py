"""Bytes of a unit; a GB of makers and of documents is decimal."""

MIB, GIB = 2**20, 2**30
GB = 10**9
