"""Knowledge of models: architecture families, and loading a frozen base."""
