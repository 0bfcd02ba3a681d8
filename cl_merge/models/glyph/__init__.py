"""The embedded model, a small CLIP of characters; README.md beside this file tells its making."""
