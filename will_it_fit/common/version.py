"""The project's version, which documents and provenance carry; CITATION.cff and CHANGELOG.md name the same one."""

VERSION = "0.1.0"
