"""Comparison of arrays and tokens, and the decoder's interface by roles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mapper.errors import ScheduleError, UsageError
from mapper.runtime.compare import compare, compare_tokens
from mapper.runtime.inputs import interface, read_inputs

ROLES: dict[str, Any] = {
    "inputs": {
        "ids": "token_ids",
        "mask": "attention_mask",
        "pos": "position_ids",
        "k0": "past.key.0",
        "v0": "past.value.0",
    },
    "outputs": {"out": "logits", "pk0": "present.key.0", "pv0": "present.value.0"},
}


def test_errors_are_absolute_and_over_the_largest_wanted() -> None:
    wanted = np.array([[1.0, -4.0], [2.0, 0.5]])
    got = wanted + np.array([[0, 0.1], [0, -0.2]])
    found = compare("x", got, wanted, 0.15)
    assert found.max_abs == pytest.approx(0.2)
    assert found.max_rel == pytest.approx(0.05)
    assert found.where == (1, 1) and not found.ok
    assert "x[1, 1] is 0.3 instead of 0.5" in str(found)
    assert compare("x", got, wanted, 0.25).ok


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_infinite_error(value: float) -> None:
    wanted = np.ones(3)
    got = np.array([1.0, value, 1.0])
    found = compare("x", got, wanted, 1e9)
    assert found.where == (1,) and found.max_abs == np.inf
    assert compare("x", got, got, 0.0).ok


def test_another_shape_is_an_error_and_nothing_is_equal() -> None:
    assert not compare("x", np.ones(3), np.ones(4), 1.0).ok
    assert compare("x", np.ones((0, 3)), np.ones((0, 3)), 0.0).ok


def test_a_differing_token_is_excused_only_by_a_small_margin() -> None:
    wanted = np.array([[1.0, 0.99, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    got = np.array([[0.99, 1.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = compare_tokens(got, wanted, 0.02)
    assert (found.equal, found.excused, found.wrong) == (1, 1, 1)
    assert compare_tokens(got, wanted, 0.001).wrong == 2


def test_the_interface_is_read_from_the_roles() -> None:
    face = interface(ROLES)
    assert face.token_ids == "ids" and face.logits == "out" and face.attention_mask == "mask"
    assert face.past == {("key", 0): "k0", ("value", 0): "v0"}
    swapped = interface({**ROLES, "kv_layout": "BLHD"})
    cache = np.zeros((1, 7, 2, 3))
    assert swapped.to_state(cache).shape == (1, 2, 7, 3)
    assert swapped.from_state(swapped.to_state(cache)).shape == cache.shape
    useless: list[Any] = [None, {}, {"inputs": {}, "outputs": {}}, {**ROLES, "kv_layout": "BSH"}]
    for roles in useless:
        with pytest.raises(ScheduleError):
            interface(roles)
    with pytest.raises(UsageError, match="encoder"):
        interface({**ROLES, "inputs": {**ROLES["inputs"], "encoder": "other"}})


def given(**changes: Any) -> dict[str, Any]:
    ids = np.array([[5, 6]])
    cache = np.zeros((1, 2, 3, 4), np.float32)
    whole = {"ids": ids, "mask": np.ones((1, 5)), "pos": np.array([[3, 4]]), "k0": cache, "v0": cache}
    return {k: v for k, v in (whole | changes).items() if v is not None}


def test_inputs_of_the_model() -> None:
    face = interface(ROLES)
    ids, caches = read_inputs(face, given())
    assert ids.tolist() == [[5, 6]] and caches[("key", 0)].shape == (1, 2, 3, 4)
    empty = np.zeros((1, 2, 0, 4), np.float32)
    fresh = given(k0=empty, v0=empty, mask=np.ones((1, 2)), pos=np.array([[0, 1]]))
    assert read_inputs(face, fresh)[1] == {}
    assert read_inputs(face, given(mask=None, pos=None, k0=None, v0=None))[1] == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": None},
        {"ids": np.ones((1, 2))},
        {"ids": np.zeros((1, 0), np.int64)},
        {"mask": np.array([[0, 1, 1, 1, 1]])},
        {"mask": np.ones((1, 4))},
        {"pos": np.array([[0, 1]])},
        {"v0": None},
        {"v0": np.zeros((1, 2, 4, 4), np.float32)},
        {"v0": np.zeros((1, 2, 3), np.float32)},
        {"other": np.ones(1)},
    ],
)
def test_inputs_that_a_schedule_assumes_away_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        read_inputs(interface(ROLES), given(**changes))
