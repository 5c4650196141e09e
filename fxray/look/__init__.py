"""Pictures of architectures, arrays and numbers."""
