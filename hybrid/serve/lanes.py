"""Says what a token takes in each lane (CPU, GPU, link), predicted beside measured."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from hybrid.errors import UsageError
from hybrid.ledger.metrics import LANES, STEP, GenerationTimes
from hybrid.ledger.prediction import calibrating, computes_otherwise, predicted
from hybrid.ledger.residual import DECODE
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.serve.refusals import wrong_value
from hybrid.serve.served import Served
from hybrid.session.chat_template import thinking_switches
from hybrid.session.generation import Generation
from planner.describe.terms import TEXT
from planner.errors import PlannerError

_MOST = 1 << 20
"""Tokens after which one is predicted, where the model says nothing of its context."""
_Lane = dict[str, float | None]


class Lanes:
    """Keeps what the last answer took.

    Parameters
    ----------
    served
        The model that answers.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._times: GenerationTimes | None = None
        self._shared: dict[str, _Lane] = {}
        self._hit_rate: float | None = None
        self._predicted = lru_cache(maxsize=64)(self._predict)

    def note(self, generation: Generation) -> None:
        """Remember an answer; called by the thread that wrote it, while nothing is computed."""
        times, placement = generation.times, self._served.model.placement
        if placement is not None and placement.executor is not None:
            rows = placement.terms(times)
            self._shared = {
                row.name: _lane(row.predicted_s, row.measured_s)
                for row in rows
                if row.phase == DECODE and row.name in (STEP, *LANES)
            }
            self._hit_rate = placement.figures()["hit_rate"].value
        self._times = times

    def answer(self, given: str | None) -> dict[str, Any]:
        """Return what is asked for with a ``context`` that was ``given``, or without.

        Raises
        ------
        Refusal
            When that is no number of tokens.
        """
        if given is None:
            return self.figures()
        most = self._served.context or _MOST
        digits = given.isascii() and given.isdigit() and len(given) < 10
        if not digits or not 1 <= int(given) <= most:
            raise wrong_value("context", given, f"a whole number between 1 and {most}")
        return self.figures(int(given))

    def figures(self, context: int | None = None) -> dict[str, Any]:
        """Return the lanes as JSON, in seconds of one token.

        Parameters
        ----------
        context
            Tokens after which a token is predicted, before it is written; else the last answer's
            tokens are told, predicted and measured.
        """
        model, times = self._served.model, self._times
        found: dict[str, Any] = {
            "model": self._served.name,
            "device": None if model.placement is None else str(model.placement.device),
            "thinking": sorted(thinking_switches(self._served.template)),
            "last": None if times is None else _told(times),
            "token": _lane(None, None),
            "lanes": dict.fromkeys(LANES),
            "hit_rate": self._hit_rate,
            "note": None,
        }
        if model.placement is not None:
            found["token"] = self._shared.get(STEP, found["token"])
            found["lanes"] = {name: self._shared.get(name) for name in LANES}
            return found
        token_s = None
        if context is None:
            if times is None:
                return found
            new = times.new_tokens
            context = times.kept_tokens + times.prompt_tokens + new // 2  # the mean token's
            token_s = times.decode_s / (new - 1) if new > 1 else None
        seconds, found["note"] = self._predicted(
            max(1, context), (TEXT,) if times is None else times.extras
        )
        found["token"] = found["lanes"]["cpu"] = _lane(seconds, token_s)
        return found

    def _predict(self, context: int, extras: tuple[str, ...]) -> tuple[float | None, str | None]:
        """Return the seconds that a token of a text alone should take, or why nobody knows."""
        model = self._served.model
        try:
            found = predicted(model.loaded, context, 2, threads=model.threads, extras=extras)
        except (PlannerError, UsageError) as error:  # no figure is worth an answer
            return None, error.message
        if found is not None:
            return found.tpot.value, None
        otherwise = computes_otherwise(model.loaded)
        if otherwise is not None:
            return None, otherwise
        missing = calibrations.missing(Identity.of_this_machine(model.threads))
        command = calibrating(model.loaded, self._served.name, model.threads)
        return None, f"{missing}; {command} measures it"


def _lane(predicted_s: float | None, measured_s: float | None) -> _Lane:
    return {"predicted_s": predicted_s, "measured_s": measured_s}


def _told(times: GenerationTimes) -> dict[str, Any]:
    """Return what tells an answer from others, and how fast it was."""
    prompt, new = times.prompt_tokens + times.kept_tokens, times.new_tokens
    rate = (new - 1) / times.decode_s if new > 1 and times.decode_s > 0 else None
    return {
        "prompt_tokens": prompt,
        "new_tokens": new,
        "ttft_s": times.ttft_s,
        "tokens_per_s": rate,
        "ended": times.ended,
    }
