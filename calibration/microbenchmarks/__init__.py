"""Measurements of the machine they run on: torch, numpy, scipy and the standard library, nothing else.

`python -m servecast.calibration.microbenchmarks` writes a journal of samples, from which `servecast.calibration.fits`
makes parameters. torch is imported only when a device is opened, so that a journal can be read without it.
"""
