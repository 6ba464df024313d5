"""The engine. It knows no method and no dataset by name."""
