"""The demos: small trainings that need no download."""
