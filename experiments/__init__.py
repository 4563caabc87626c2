"""What the papers claim, tried in the small: `python -m experiments` lists them."""
