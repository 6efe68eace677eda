"""What is attached to a model, layer by layer and in all."""
