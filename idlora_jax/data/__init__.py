"""Data sets: making them, describing them, reading them."""
