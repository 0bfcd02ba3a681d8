"""The figures of the MagMax paper."""
