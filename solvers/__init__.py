"""Searches over deployments on top of the model: a request in, a plan as frozen records out."""
