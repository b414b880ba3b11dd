"""Stores: where the log, the checkpoints and the exceptions are kept. `base` is the protocol, `sqlite` the default."""
