"""The commands, one module for each family; `cli.py` registers them."""
