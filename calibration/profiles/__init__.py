"""The shipped profiles, one JSON document each."""
