"""The states of a sequence and every legal move between them: one table, checked at each move.

`by` names who may make the move. `by_machine`: what is awaited before it is a worker's progress, which the watchdog
bounds by `Config.hang_limit_s`; else the wait is the caller's own load (a queue). Moves are checked.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class State(Enum):
    WAITING = "waiting"  # holds no block anywhere; queued by arrival
    PREFILLING = "prefilling"  # holds its blocks wherever it will be; chunks are launched
    COPYING = "copying"  # prefilled; its last blocks are on their way to the decode card
    READY = "ready"  # resident on the card that decodes it, waits for a slot
    DECODING = "decoding"  # has a slot; steps are launched
    EVACUATING = "evacuating"  # its blocks are on their way to the prefill card
    EVACUATED = "evacuated"  # resident on the prefill card only
    RETURNING = "returning"  # its blocks are on their way from card 0 to the decode card
    FINISHED = "finished"  # holds nothing; copies and launched steps may still own its former blocks


class Move(NamedTuple):
    by: str
    by_machine: bool
    when: str


TRANSITIONS: dict[tuple[State, State], Move] = (
    {
        (State.WAITING, State.PREFILLING): Move("admission", False, "blocks on both cards were taken, all at once"),
        (State.PREFILLING, State.COPYING): Move("prefill result", True, "the last chunk ended, copies have not"),
        (State.PREFILLING, State.READY): Move("prefill result", True, "the last chunk ended and all is resident"),
        (State.COPYING, State.READY): Move("copy result", True, "the last copy ended"),
        (State.READY, State.DECODING): Move("decode admission", False, "a slot was free"),
        (State.READY, State.EVACUATING): Move("decode card full", False, "it was the youngest"),
        (State.READY, State.RETURNING): Move(
            "hand-off", False, "card 0 kept it; prompts queue, or the decode card has few, and has room"
        ),
        (State.DECODING, State.RETURNING): Move("hand-off", False, "card 0 decoded it; as above"),
        (State.DECODING, State.EVACUATING): Move(
            "decode card full", False, "it was the youngest; or card 0 takes it over"
        ),
        (State.EVACUATING, State.EVACUATED): Move("copy result", True, "the copy to the prefill card ended"),
        (State.EVACUATING, State.READY): Move("copy result", True, "it was taken over: card 0 decodes it from now on"),
        (State.EVACUATED, State.RETURNING): Move("return admission", False, "the decode card has room again"),
        (State.RETURNING, State.READY): Move("copy result", True, "the copy back ended"),
    }
    | {
        (state, State.WAITING): Move(
            "both cards full, or fault",
            False,
            "it was the youngest, or its card was given up; its KV is computed again",
        )
        for state in (State.READY, State.DECODING)
    }
    | {
        (state, State.WAITING): Move("fault", False, "a copy or a card was given up; its prompt is prefilled again")
        for state in (State.PREFILLING, State.COPYING, State.EVACUATING, State.EVACUATED, State.RETURNING)
    }
    | {
        (state, State.FINISHED): Move("engine", False, "stop, length, abort or error")
        for state in State
        if state is not State.FINISHED
    }
)
