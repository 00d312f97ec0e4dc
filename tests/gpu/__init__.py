"""Checks of what is measured on a card, as far as a driver that only counts can hold them."""
