"""Scripts that run inside the private environments, not in tilecut's: JSON on stdin, an answer as the last line of stdout."""
