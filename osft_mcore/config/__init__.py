"""Configuration: the typed schema (every default), composition, and cross-field checks."""
