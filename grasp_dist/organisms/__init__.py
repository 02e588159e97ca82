"""Small models with a known latent factor, made on the spot and written as ordinary files (docs/organisms.md)."""
