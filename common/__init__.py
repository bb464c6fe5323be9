"""What the four scripts share and no paper is about. Nothing here imports a script."""
