"""Prompts by the million in, shards of pictures out: tar and Parquet files that other tools read."""
