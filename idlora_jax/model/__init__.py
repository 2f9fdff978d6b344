"""The networks, as pure functions of parameters."""
