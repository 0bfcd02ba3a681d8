"""Runs: train a stream, evaluate methods from what is stored, and read the folder it leaves."""
