"""Everything that is written and read again."""
