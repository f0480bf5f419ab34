"""The cuda target: an exported program that calls tilecut::attention."""
