"""What every room uses: errors, files, digests, sizes, the terminal; nothing of the domain."""
