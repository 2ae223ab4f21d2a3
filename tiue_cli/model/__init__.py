"""What torch computes: the split UNet, schedules, noise, and the folders that models come in."""
