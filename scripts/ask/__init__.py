"""The question from anywhere: one line, a Hub id, another tool's configuration, a Python program."""
