"""Written bytes as intervals, against one flag per byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapper.errors import ExecutionFault
from mapper.runtime.written import Written, require_written

SIZE = 24
STEP = st.tuples(
    st.sampled_from(["add", "remove", "set", "flags"]), st.integers(0, SIZE), st.integers(0, SIZE)
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=25))
def test_intervals_are_flags(steps: list[tuple[str, int, int]]) -> None:
    written, flags = Written(SIZE), np.zeros(SIZE, np.bool_)
    for what, low, high in steps:
        if what == "flags":
            written.flags()
        elif what == "remove":
            before, dense = flags.copy(), any(w == "flags" for w, *_ in steps)
            told = np.zeros(SIZE, np.bool_)
            for a, b in written.remove(low, high):
                assert low <= a < b <= high
                told[a:b] = True
            flags[low:high] = False
            assert (told >= (before & ~flags)).all()
            assert dense or (told == (before & ~flags)).all()
        else:
            if what == "add":
                written.add(low, high)
            else:
                written[low:high] = True
            flags[low:high] = True
        assert (written[:] == flags).all()
        for a in range(SIZE):
            for b in range(a, SIZE + 1):
                holes = np.flatnonzero(~flags[a:b])
                assert written.missing(a, b) == (a + holes[0] if len(holes) else None)


def test_copies_are_apart_and_the_byte_is_named() -> None:
    written = Written(1 << 50)
    written.add(0, 1 << 40)
    copied = written.copy()
    copied[5:7] = False
    assert written.missing(0, 1 << 40) is None
    with pytest.raises(ExecutionFault, match="a step: byte 5 is read"):
        require_written(copied, 0, 10, "a step")
    with pytest.raises(ValueError, match="neighbours"):
        written[0:10:2] = True
