"""What is measured: each suite takes a `Session` and gives rows."""
