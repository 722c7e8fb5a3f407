"""Examples that use the package."""
