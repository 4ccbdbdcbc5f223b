"""The shares of a batch, without processes."""

from hypothesis import given
from hypothesis import strategies as st

from dsmini.distributed.mesh import Mesh


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), st.integers(1, 4))
def test_shares_of_all_ranks_are_the_sequences_in_order(gaps: list[tuple[int, int]], parts: int) -> None:
    """Ranges of sequences with others between them, which are left out."""
    ranges, at = [], 0
    for gap, length in gaps:
        ranges.append((at + gap, at + gap + length * parts))
        at = ranges[-1][1]
    shares = []
    for part in range(parts):
        mesh = Mesh()
        mesh.part, mesh.parts = part, parts
        shares.append([n for first, count in mesh.share(ranges) for n in range(first, first + count)])
    assert len({len(share) for share in shares}) == 1
    assert [n for share in shares for n in share] == [n for pair in ranges for n in range(*pair)]
