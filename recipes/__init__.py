"""What to do: recipes, their loader, and the command-line programs."""
