"""What people run: shipped recipes and the command-line programs."""
