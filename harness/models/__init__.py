"""Model definitions: trainable, folded, and integer forms."""
