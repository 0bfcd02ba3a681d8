"""One YAML per method: what it is, which training it needs, how it merges."""
