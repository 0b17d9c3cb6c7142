"""Fits of kernel surfaces, engine constants and error bands to measurements."""
