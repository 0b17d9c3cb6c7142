"""Records and closed forms: numpy in, numpy out; no I/O, no clock, no randomness, no logging."""
