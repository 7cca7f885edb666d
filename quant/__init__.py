"""Numerics on arrays: the affine group format and its quantizers. Knows no files, names or networks."""
