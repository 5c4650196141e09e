"""From a model to graphs that run as it does."""
