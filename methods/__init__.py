"""One file per method. A file dropped here is registered by its decorator; nothing else needs an edit."""
