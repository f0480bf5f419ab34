"""What a report calls two of the contenders that it times; imported where torch is not installed too."""

PRUNED, FLOOR = "pruned artifact", "pruned, products alone"
