"""The algorithm alone, without files or engines: see docs/algorithm.md."""
