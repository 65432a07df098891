"""The model's own inputs and outputs, by role: what a decoder's ONNX names mean to a schedule.

A schedule works on states of `context` positions; the model on caches as long as what has been used. Roles:
token_ids, attention_mask, position_ids, cache_position, past.key.<i>, past.value.<i>, present.key.<i>,
present.value.<i>, logits; write_index, last_index, total_length (of a cache: rows with tokens before the
step, index of the last, rows after it), use_cache (whether there are any), beam_index; unused (the graph
reads it nowhere).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ScheduleError, UsageError
from mapper.runtime.caches import AXES, Entry, Place, arrays, read_places
from mapper.runtime.execute import Session
from mapper.schedule.tables import Phase, Schedule

Array = npt.NDArray[Any]
LENGTHS = ("write_index", "last_index", "total_length")
STEERING = (*LENGTHS, "use_cache", "beam_index", "unused")
Declared = Mapping[str, tuple[Any, Sequence[Any]]]
"""Input name -> (NumPy dtype, shape: numbers, or anything else where the size is free)."""


@dataclass(frozen=True)
class Interface:
    """The model's ONNX inputs and outputs by what they are. `layout` orders the axes of its caches, `places`
    says where each cache is where they are not all alike; `steering` maps further inputs to their roles."""

    token_ids: str
    logits: str
    attention_mask: str | None
    positions: tuple[str, ...]
    past: Mapping[Entry, str]
    present: Mapping[Entry, str]
    layout: str = AXES
    places: Mapping[Entry, Place] = field(default_factory=dict)
    steering: Mapping[str, str] = field(default_factory=dict)

    def where(self) -> dict[Entry, Place]:
        """Where every cache is."""
        plain = {e: Place(n, self.present.get(e, ""), (), self.layout) for e, n in self.past.items()}
        return plain | dict(self.places)

    def states(self, arrays: Mapping[str, Array], batch: int, given: bool) -> dict[Entry, Array]:
        """The caches [B, Hkv, L, D] in the model's inputs (`given`) or outputs, those that are there."""
        found = {e: (p, p.input if given else p.output) for e, p in self.where().items()}
        return {e: p.state(np.asarray(arrays[n]), batch) for e, (p, n) in found.items() if n in arrays}

    def inputs(
        self,
        declared: Declared,
        shapes: Mapping[Entry, Sequence[int]],
        ids: Array,
        past: int,
        caches: Mapping[Entry, Array],
    ) -> dict[str, Array]:
        """The model's inputs for tokens `ids` [B, S] after `past` positions; `caches` [B, Hkv, past, D], none
        where they are empty. `shapes` are those of the schedule's states."""
        batch, tokens = ids.shape
        room = max([past + tokens, *(s[2] for s in shapes.values())])
        where = self.where()
        empty = {e: _empty(p, shapes.get(e), declared[p.input][1], batch) for e, p in where.items()}
        made = arrays(where, empty | dict(caches), room, given=True)
        made[self.token_ids] = ids
        for name in declared:
            array = self._steered(name, declared[name][1], batch, tokens, past)
            if array is not None:
                made[name] = array
        return {n: made[n].astype(declared[n][0], order="C") for n in declared if n in made}

    def _steered(self, name: str, shape: Sequence[Any], batch: int, tokens: int, past: int) -> Array | None:
        if name == self.attention_mask:
            room = shape[1] if isinstance(shape[1], int) else past + tokens
            return np.broadcast_to(np.arange(room) < past + tokens, (batch, room))
        if name in self.positions:
            position = np.arange(past, past + tokens)
            return position if len(shape) == 1 else np.broadcast_to(position, (batch, tokens))
        role = self.steering.get(name)
        if role == "beam_index":
            return np.arange(batch)
        value = {
            "write_index": past, "last_index": past + tokens - 1, "total_length": past + tokens,
            "use_cache": past > 0, "unused": 0,
        }.get(role or "")  # fmt: skip
        whole = [d if isinstance(d, int) else batch for d in shape]
        return None if value is None else np.full(whole, value)

    def to_state(self, array: Array) -> Array:
        """A cache of the model as [B, Hkv, L, D]."""
        return np.transpose(array, [self.layout.index(a) for a in AXES])

    def from_state(self, array: Array) -> Array:
        """A [B, Hkv, L, D] cache as the model has it."""
        return np.transpose(array, [AXES.index(a) for a in self.layout])


def _empty(place: Place, state: Sequence[int] | None, declared: Sequence[Any], batch: int) -> Array:
    """No rows of a cache [B, Hkv, 0, D]; its heads and width are the state's, or as declared."""
    known = dict(zip(place.axes, declared, strict=True)) if state is None else {}
    _, heads, _, width = state or (batch, known["H"], 0, known["D"])
    return np.zeros((batch, heads, 0, width), np.float32)


def interface(roles: Any) -> Interface:
    """Reads `Schedule.roles`. Raises ScheduleError where no input is token ids or no output logits, and
    UsageError for an input whose role a compiled schedule has no place for."""
    try:
        inputs, outputs = dict(roles["inputs"]), dict(roles["outputs"])
    except (TypeError, KeyError, ValueError) as error:
        raise ScheduleError("the schedule does not say what the model's inputs and outputs are") from error
    by_role = {str(role): str(name) for name, role in (*inputs.items(), *outputs.items())}
    if "token_ids" not in by_role or "logits" not in by_role:
        raise ScheduleError("the model has no input of token ids or no output of logits")
    try:
        places = read_places(roles.get("caches", {}))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ScheduleError(f"the schedule's table of caches is malformed: {error}") from error
    layout = AXES if places else str(roles.get("kv_layout", AXES))
    if sorted(layout) != sorted(AXES):
        raise ScheduleError(f"KV caches of layout {layout!r} cannot be mapped to {AXES}")
    known = ("token_ids", "attention_mask", "position_ids", "cache_position", *STEERING)
    for name, role in inputs.items():
        if role not in known and not str(role).startswith("past."):
            raise UsageError(f"input {name} ({role}) of the model has no place in a compiled schedule")
    return Interface(
        by_role["token_ids"],
        by_role["logits"],
        by_role.get("attention_mask"),
        tuple(by_role[r] for r in ("position_ids", "cache_position") if r in by_role),
        _entries(by_role, "past") if not places else {e: p.input for e, p in places.items()},
        _entries(by_role, "present") if not places else {e: p.output for e, p in places.items()},
        layout,
        places,
        {str(n): str(r) for n, r in inputs.items() if r in STEERING},
    )


def _entries(by_role: Mapping[str, str], prefix: str) -> dict[Entry, str]:
    out = {}
    for role, name in by_role.items():
        parts = role.split(".")
        if parts[0] == prefix and len(parts) == 3 and parts[1] in ("key", "value") and parts[2].isdigit():
            out[(parts[1], int(parts[2]))] = name
    return dict(sorted(out.items(), key=lambda e: (e[0][1], e[0][0])))


def state_name(entry: Entry) -> str:
    """The state port of a cache."""
    return f"cache.{entry[0]}.{entry[1]}"


def states(schedule: Schedule) -> dict[Entry, tuple[int, ...]]:
    """The caches of a decoder schedule and their shapes [B, Hkv, L, D]."""
    out = {}
    for port in schedule.ports:
        parts = port.name.split(".")
        if port.kind == "state" and len(parts) == 3 and parts[0] == "cache" and parts[2].isdigit():
            out[(parts[1], int(parts[2]))] = port.shape
    return dict(sorted(out.items(), key=lambda e: (e[0][1], e[0][0])))


@dataclass(frozen=True)
class Decoder:
    """A session of a decoder schedule: feeds tokens in the pieces that its programs take."""

    session: Session

    @property
    def context(self) -> int:
        """Positions that the caches have room for."""
        shapes = states(self.session.schedule).values()
        return min((s[2] for s in shapes), default=self.session.schedule.request.context)

    @property
    def prompt(self) -> int | None:
        """Tokens that the prefill program takes, None where there is none."""
        program = self.session.schedule.programs.get("prefill")
        return None if program is None else program.sequence

    def feed(self, ids: Array, past: int) -> Array:
        """Run the programs over `ids` [B, S] after `past` positions; the logits [B, S, V].

        The prefill program takes the first tokens of an empty cache, the decode program one token at a time.
        Raises UsageError where the programs cannot take this many tokens, or the context is too short.
        """
        total = ids.shape[1]
        vocabulary = next(p.shape[-1] for p in self.session.schedule.ports if p.name == "logits")
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= vocabulary:
            raise UsageError(f"token ids must be 0 to {vocabulary - 1}")
        if past + total > self.context:
            raise UsageError(f"{past} + {total} tokens do not fit the schedule's context of {self.context}")
        pieces: list[Array] = []
        done = 0
        prompt = self.prompt
        if past == 0 and prompt is not None and total >= prompt:
            pieces.append(self._run("prefill", ids[:, :prompt], 0))
            done = prompt
        if done < total and "decode" not in self.session.schedule.programs:
            raise UsageError(
                f"the schedule has no decode program, and its prefill takes {prompt} tokens, not {total}"
            )
        for at in range(done, total):
            pieces.append(self._run("decode", ids[:, at : at + 1], past + at))
        return np.concatenate(pieces, axis=1)

    def _run(self, phase: Phase, ids: Array, past: int) -> Array:
        given = {"input_ids": ids, "past_length": np.array(past)}
        wanted = {p.name for p in self.session.ports("input", phase=phase)}
        return self.session.run(phase, {k: v for k, v in given.items() if k in wanted})["logits"]

    def entries(self, begin: int, end: int) -> dict[Entry, Array]:
        """Positions [begin, end) of every cache: [B, Hkv, end - begin, D]."""
        names = states(self.session.schedule)
        return {e: self.session.state(state_name(e))[:, :, begin:end] for e in names}

    def fill(self, caches: Mapping[Entry, Array]) -> None:
        """Set the first positions of every cache ([B, Hkv, P, D] each) and clear the others. UsageError where
        a cache does not fit."""
        for entry, (b, h, room, d) in states(self.session.schedule).items():
            whole = np.zeros((b, h, room, d), np.float32)
            if entry in caches:
                shape = caches[entry].shape
                if (shape[0], shape[1], shape[3]) != (b, h, d) or shape[2] > room:
                    name = f"the {entry[0]} cache of layer {entry[1]}"
                    raise UsageError(f"{name} has shape {shape}; the schedule takes {(b, h, f'<={room}', d)}")
                whole[:, :, : shape[2]] = caches[entry]
            self.session.set_state(state_name(entry), whole)


def read_inputs(model: Interface, inputs: Mapping[str, Array]) -> tuple[Array, dict[Entry, Array]]:
    """(token ids [B, S], caches [B, Hkv, P, D]) from the model's inputs by ONNX name; no caches where none
    are given or they are empty. Raises UsageError for what a schedule assumes away (padding, gaps)."""
    known = {model.token_ids, model.attention_mask, *model.positions, *model.past.values(), *model.steering}
    unknown = sorted(set(inputs) - known)
    if unknown:
        raise UsageError(f"the model has no input {unknown[0]!r}")
    if model.token_ids not in inputs:
        raise UsageError(f"input {model.token_ids} is missing")
    ids = np.asarray(inputs[model.token_ids])
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise UsageError(f"{model.token_ids} must be whole numbers of shape [batch, tokens]")
    past = _past(model, inputs, ids.shape[1])
    if past == 0:
        caches: dict[Entry, Array] = {}
    else:
        try:
            caches = model.states(inputs, ids.shape[0], given=True)
        except (ValueError, IndexError) as error:
            raise UsageError(f"the caches given do not have the axes {model.layout}: {error}") from error
    if 0 < len(caches) < len(model.past):
        raise UsageError("the caches must be given all, with four dimensions each, or none")
    lengths = {c.shape[2] for c in caches.values()} or {0}
    if len(lengths) > 1:
        raise UsageError(f"the caches given differ in length: {sorted(lengths)}")
    past = lengths.pop() if past is None else past
    _plain(model, inputs, ids.shape, past)
    return ids, {e: c[:, :, :past] for e, c in caches.items()} if past else {}


def _past(model: Interface, inputs: Mapping[str, Array], tokens: int) -> int | None:
    """How many positions came before, as steering inputs or positions say; None where the caches tell."""
    less = {"write_index": 0, "last_index": tokens - 1, "total_length": tokens}
    told = {
        int(v) - less[r]
        for n, r in model.steering.items()
        if r in less and n in inputs
        for v in np.ravel(inputs[n])
    }
    if any(r == "use_cache" and n in inputs and not np.any(inputs[n]) for n, r in model.steering.items()):
        told.add(0)
    fixed = any(p.rows is not None for p in model.places.values())
    if fixed and not told:
        told = {int(np.ravel(inputs[n])[0]) for n in model.positions if n in inputs and np.size(inputs[n])}
    if len(told) > 1:
        raise UsageError(f"the inputs say different lengths of the past: {sorted(told)}")
    return told.pop() if told else None


def execute(session: Session, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run the model's own inputs, by their ONNX names, and return its outputs: logits [B, S, V] and caches
    after the step. Raises UsageError where the inputs ask for what the schedule excludes (padding, gaps)."""
    model = interface(session.schedule.roles)
    ids, caches = read_inputs(model, inputs)
    past = next((c.shape[2] for c in caches.values()), 0)
    decoder = Decoder(session)
    decoder.fill(caches)
    out = {model.logits: decoder.feed(ids, past)}
    present = decoder.entries(0, past + ids.shape[1])
    where = {e: p for e, p in model.where().items() if e in present and p.output}
    for entry, old in model.states(inputs, ids.shape[0], given=True).items():
        if where[entry].rows is not None:  # what is behind the tokens stays
            present[entry] = np.concatenate([present[entry], old[:, :, past + ids.shape[1] :]], axis=2)
    return out | arrays(where, present, decoder.context, given=False)


def _plain(model: Interface, inputs: Mapping[str, Array], shape: tuple[int, ...], past: int) -> None:
    """Raises UsageError unless the mask is all ones and positions follow on the cache without gaps."""
    batch, tokens = shape
    mask = inputs.get(model.attention_mask) if model.attention_mask else None
    if mask is not None and np.ndim(mask) == 2 and any(p.rows is not None for p in model.places.values()):
        if np.any(np.asarray(mask)[:, past + tokens :]):
            raise UsageError(f"{model.attention_mask} must be zero behind the tokens that are there")
        mask = np.asarray(mask)[:, : past + tokens]
    if mask is not None and (np.shape(mask) != (batch, past + tokens) or not np.all(np.asarray(mask) == 1)):
        raise UsageError(f"{model.attention_mask} must be ones of shape {(batch, past + tokens)}: no padding")
    for name in model.positions:
        wanted = np.arange(past, past + tokens)
        if name in inputs and (
            np.shape(inputs[name])[-1:] != (tokens,) or not np.all(np.asarray(inputs[name]) == wanted)
        ):
            raise UsageError(f"{name} must be {past}..{past + tokens - 1}: positions follow on the cache")
