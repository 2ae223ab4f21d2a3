"""A report's files: JSON, Markdown and one HTML page."""
