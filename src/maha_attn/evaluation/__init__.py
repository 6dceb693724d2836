"""How good a language model is, beside how good counting is, and how it uses its scales."""
