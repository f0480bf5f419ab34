"""Data shipped with tilecut."""
