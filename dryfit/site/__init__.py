"""The calculator and the documents as static files."""
