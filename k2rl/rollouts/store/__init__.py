"""Where episodes are kept from being asked for to being learned from: SQLite in a file, or Redis."""
