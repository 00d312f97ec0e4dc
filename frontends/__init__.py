"""Frontends: anything a user holds (module, checkpoint, function, text) becomes a Program."""
