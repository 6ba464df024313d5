"""Suites: one TOML file each, listing the runs of one leaderboard."""
