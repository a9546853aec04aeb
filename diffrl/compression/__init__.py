"""What happens between images and latents: pure mathematics on arrays, the twin of `diffusion`."""
