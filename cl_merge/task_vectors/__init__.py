"""Task vectors: what fine-tuning changed, by how much it counts, and for which parameters."""
