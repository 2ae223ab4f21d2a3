"""Models of one file, in the layout of the original Stable Diffusion code (LDM), made into folders."""
