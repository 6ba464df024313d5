"""One file per dataset family: its card and how its official files are read."""
