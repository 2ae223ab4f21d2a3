"""From prompts to pictures: which model, which images, make them."""
