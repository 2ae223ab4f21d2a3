"""What a bench measures: models, ready to be run."""
