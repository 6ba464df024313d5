"""Group sources: what `task.groups` answers when the run names a source."""
