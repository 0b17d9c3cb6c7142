"""Profiles: the documents that carry fitted constants, and the fits that make the shipped one."""
