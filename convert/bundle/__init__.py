"""What is written: recipe, target, plan, writer, manifest, reader."""
