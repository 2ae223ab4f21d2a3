"""Distillation: from a many-step teacher and prompts to a one-pass student."""
