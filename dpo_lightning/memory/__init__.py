"""How much memory training will take, known before any weight is loaded."""
