"""Which pieces share a row."""

import bisect

from torch import Tensor


def pack(lengths: Tensor, seq_len: int) -> list[list[int]]:
    """Rows of pieces, as their numbers, whose lengths add up to at most seq_len each.

    Best fit, longest first: a piece goes to the fullest row that has room. Depends on the lengths
    alone. Rows are in the order of their first piece, pieces in theirs.

    Args:
        lengths: int64 [num_pieces], each at most seq_len.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows
    rooms: list[int] = []  # its keys, sorted
    longest_first = lengths.sort(descending=True, stable=True)
    for length, piece in zip(*map(Tensor.tolist, longest_first), strict=True):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), seq_len
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        rows[row].append(piece)
        left = room - length
        if left and left not in open_rows:
            open_rows[left] = []
            bisect.insort(rooms, left)
        if left:
            open_rows[left].append(row)
    return sorted(sorted(row) for row in rows)


def one_each(num_pieces: int) -> list[list[int]]:
    """A row for each piece."""
    return [[piece] for piece in range(num_pieces)]
