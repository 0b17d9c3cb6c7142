"""Machine profiles that ship with the package, each with its raw samples beside it."""
