"""Sweeps: recipes over sources, cell by cell, on this machine or on a Ray cluster."""
