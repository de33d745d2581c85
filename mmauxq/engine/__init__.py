"""What surrounds the model: launching, optimizers, hooks."""
