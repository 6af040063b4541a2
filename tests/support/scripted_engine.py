"""An engine of the server that answers what a test has written."""

from __future__ import annotations

import threading
from typing import Any

import torch

from hybrid.ledger.metrics import GenerationTimes
from hybrid.serve.engine import Done, Failed, Job, Piece
from hybrid.serve.refusals import Refusal
from hybrid.serve.served import Served
from hybrid.session.generation import Generation


class Script:
    """Stands where the engine stands; each answer is its pieces, those in brackets thoughts.

    Attributes
    ----------
    answers
        What comes next; a Refusal is one.
    pause_s
        Seconds between pieces.
    """

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.asked: list[str] = []
        self.served: Served | None = None
        self.pause_s = 0.0
        self.left = threading.Event()
        self.jobs = 0

    def submit(self, job: Job) -> None:
        assert self.served is not None
        self.asked.append(self.served.model.tokenizer.decode(job.asked.ids[0]))
        answer = self.answers.pop(0)
        if isinstance(answer, Refusal):
            raise answer
        threading.Thread(target=self._write, args=(job, answer), daemon=True).start()

    def leave(self, job: Job) -> None:
        job.left.set()

    def _write(self, job: Job, answer: list[Any]) -> None:
        new = 0
        for piece in answer:
            if job.left.wait(self.pause_s):
                self.left.set()
                return
            if isinstance(piece, Refusal):
                job.emit(Failed(piece))
                return
            new += 1
            thought = piece.startswith("[")
            job.emit(Piece(piece.strip("[]") if thought else piece, thought=thought))
        times = GenerationTimes(
            sequences=1,
            prompt_tokens=40,
            new_tokens=new,
            ttft_s=0.5,
            decode_s=0.02 * max(1, new - 1),
            ended="end token",
        )
        ids = torch.zeros(1, new, dtype=torch.long)
        job.emit(Done(Generation("", ids, times, "the likeliest tokens", None)))
