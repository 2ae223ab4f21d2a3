"""What goes into a distillation: prompts, text states, pairs, and their order."""
