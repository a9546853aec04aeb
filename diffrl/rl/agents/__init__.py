"""The algorithms, one `Agent` a file."""
