"""Scores of the model against public measurements that no fit has seen."""
