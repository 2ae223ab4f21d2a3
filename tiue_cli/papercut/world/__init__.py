"""The papercut world: its grammar, its paper, its shapes, and the scenes that they make."""
