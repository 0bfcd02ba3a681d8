"""Models: the CLIP classifier, its zero-shot head, and where pre-trained weights come from."""
