"""The commands of `python -m eventbus`. Nothing of the library imports them."""
