"""What is in a source or bundle, and whether a bundle computes what its source computes. Never writes weights."""
