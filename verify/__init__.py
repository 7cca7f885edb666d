"""What is in a source or bundle, and whether it is what its manifest says. Never writes weights."""
