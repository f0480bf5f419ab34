"""How the kernels hold a width: as chunks that are powers of two, largest first, never padded but to 16."""

GRANULE = 16


def split_width(width: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of a width's chunks: 96 -> ((0, 64), (64, 32)); the sizes of 200 are 128, 64 and 16."""
    chunks, start = [], 0
    rest = -(-width // GRANULE) * GRANULE
    while rest:
        size = 1 << (rest.bit_length() - 1)
        chunks.append((start, size))
        start, rest = start + size, rest - size
    return tuple(chunks)
