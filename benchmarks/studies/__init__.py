"""Scripts that measure; nothing else needs them."""
