"""tilecut_passes: what the compiler knows and does to a graph. One idea a file; the README lists them in order."""
