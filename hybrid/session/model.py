"""Loads a Mixture-of-Experts model, writes text with it, and reports how that went."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch

from cpu_experts.jit.turns import Turn
from hybrid.ask.options import Options
from hybrid.ask.sizes import Size
from hybrid.demo import demo_path
from hybrid.errors import UsageError
from hybrid.ledger.metrics import LANES, RunReport
from hybrid.loading import model_directory, set_threads
from hybrid.loop.prepared import Prepared
from hybrid.loop.speculation import Drafts
from hybrid.paths import write_whole
from hybrid.session.generation import Generation
from hybrid.session.generation_options import (
    check_length,
    setting,
)
from hybrid.session.generation_stream import GenerationStream, OnText, pieces_of
from hybrid.session.kept_cache import KeptCache
from hybrid.session.prompt_ids import chat_ids, check_known, text_ids
from hybrid.session.spine import (
    Session,
    drafts_of,
    generate,
    open_session,
    prepare,
    report,
)
from hybrid.session.writing import Writing, make_writing
from hybrid.sharing.executor import Executor
from hybrid.textstream import as_ids
from hybrid.transformers_api import cache_argument
from hybrid.weights.checks import check_before_loading
from hybrid.weights.gguf_checkpoint import GgufCheckpoint, checkpoint_at
from hybrid.weights.tokenizer import load_tokenizer
from planner.decide.policies import DEFAULT_POLICY
from planner.decide.popularity import Popularity
from planner.errors import PlannerError
from planner.foretell.perfetto import trace_events

Message = dict[str, Any]


class HybridModel:
    """A causal language model whose experts run from the packed store.

    Make one with :meth:`from_pretrained`. One call computes at a time; calls from other
    threads wait for it.

    Attributes
    ----------
    model
        The transformers model, ready for anything that takes one.
    loaded
        What is known of it; ``print(model.loaded.changes())`` says what is changed about it.
    tokenizer
        Its tokenizer.
    threads
        Threads of torch and of the kernels; both always have the same number.
    placement
        How it lies on a device; None on the CPU alone.
    notes
        What was said to be slower or smaller than it could be when it was loaded.
    """

    def __init__(self, session: Session, tokenizer: Any) -> None:
        self.model = session.model.network
        self.loaded = session.model
        self.tokenizer = tokenizer
        self.threads = session.threads
        self.placement = session.placement
        self.notes = session.notes
        self._session = session
        with suppress(PlannerError, UsageError):  # it may run without being predicted
            self.loaded.asked  # noqa: B018 (read while the directory is where it was)
        self._last: Generation | None = None
        self._turn = Turn()
        self._writer: int | None = None  # the thread whose turn it is

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str] | None = None,
        *,
        experts: str | None = None,
        dense: str | None = None,
        threads: int | None = None,
        verify: bool = False,
        dtype: str | torch.dtype | None = None,
        device: str | int | torch.device | None = None,
        vram: Size = None,
        ram: Size = None,
        context: int | None = None,
        popularity: str | PathLike[str] | None = None,
        policy: str = DEFAULT_POLICY,
        speculate: str | int | None = None,
        keep_timeline: bool = False,
        record_routing: bool = False,
    ) -> HybridModel:
        """Load a model directory.

        Parameters
        ----------
        path
            A directory made by ``hybrid convert``, or any Hugging Face MoE directory, which
            is converted into the cache folder first (once). None or ``"demo"`` is the small
            model that ships with the package.
        experts, dense
            Formats to convert to: ``"q4_0"`` experts, and dense layers as the checkpoint has
            them, unless given. A converted directory has its own; asking for another is an
            error.
        threads
            For torch and the kernels alike; ``OMP_NUM_THREADS`` or every core unless given,
            and then no more than numba has, which is said.
        verify
            Compare the checksum of every expert with the store's index before use.
        dtype
            What dense layers that are not quantized compute in: ``"float32"``, ``"bfloat16"``
            or another floating ``torch.dtype``. ``"auto"`` and None are bfloat16 on processors that
            multiply it natively and float32 on all others, where torch's bfloat16 products were
            measured 3 to 10 times slower on prompts and no faster on single tokens. Small models,
            the one that ships among them, are computed in float32 everywhere.
        device
            ``"cuda"``, ``"cuda:1"`` (or as torch takes it), ``"emulated"`` or ``"cpu"``. Unless
            given, the GPU that is there and otherwise the CPU alone, or, where vram is asked for,
            an emulated GPU.
        vram, ram
            How much of the device's and of the host's memory to use, as bytes or a text such as
            ``"4GiB"``; ``"auto"`` and None are what is free, and vram 0 is the CPU alone. Experts
            that ram does not hold are read from disk when they are used; that is said.
        context
            Tokens of cache to keep memory for: 4096, or what the model was made for if less. More
            are computed while there is memory, and reported.
        popularity
            A file of :meth:`save_popularity`, or a routing trace (``.npz``): the experts used most
            there are on the device from the start.
        policy
            Name of the cache policy that decides which experts stay on the device.
        speculate
            Tokens to draft from what followed in the text before, to be computed in one step:
            ``"auto"`` and None as many as pay, ``"off"`` none, a number so many wherever the text
            repeats itself. Drafts change no text.
        keep_timeline
            Keep what every lane did when, for :meth:`perfetto`.
        record_routing
            Keep which experts every token used, for :meth:`save_routing`.

        Raises
        ------
        CheckpointError, StoreError, UnsupportedModelError, DiskSpaceError
            When the directory cannot be read, converted or run.
        UsageError
            When an argument has a value that cannot be used.
        """
        options = Options.of(
            experts=experts,
            dense=dense,
            threads=threads,
            verify=verify,
            dtype=dtype,
            device=device,
            vram=vram,
            ram=ram,
            context=context,
            popularity=popularity,
            policy=policy,
            speculate=speculate,
            keep_timeline=keep_timeline,
            record_routing=record_routing,
        )
        return cls.open(path, options)

    @classmethod
    def open(
        cls, path: str | PathLike[str] | None, options: Options, *, name: str | None = None
    ) -> HybridModel:
        """Load a model directory as :meth:`from_pretrained` does, with what is asked for.

        ``name`` is what the user calls it, where that is not ``path``.
        """
        called = "demo" if path is None else str(path)
        directory = model_directory(demo_path() if called == "demo" else called)
        own, tokenizer = not isinstance(checkpoint_at(directory), GgufCheckpoint), None
        if own and directory.is_dir():  # first of all, so that what is refused is not converted
            check_before_loading(directory)
            tokenizer = load_tokenizer(directory)
        session = open_session(directory, options, name or called)
        if not own:  # a GGUF file's is made when that is converted
            tokenizer = load_tokenizer(session.model.directory)
        return cls(session, tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        """A copy generates by itself, and has nothing to report yet.

        Raises
        ------
        UsageError
            When a device has a part of the model, which is in no copy.
        """
        if self.placement is not None:
            raise UsageError(
                f"a part of this model lies on {self.placement.device}: it can neither be copied "
                "nor pickled",
                hint="load it where it is needed, or copy one that runs on the CPU alone (vram=0)",
            )
        return vars(self) | {"_turn": None, "_writer": None, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._turn = Turn()

    @property
    def context(self) -> int | None:
        """The most tokens that the model takes, prompt included; None when it does not say."""
        return self.loaded.context

    @overload
    def generate(
        self,
        prompt: str,
        *,
        on_text: OnText | None = None,
        stop_strings: str | Sequence[str] | None = None,
        **options: Any,
    ) -> str: ...

    @overload
    def generate(self, prompt: torch.Tensor | Sequence[int], **options: Any) -> Any: ...

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue ``prompt``.

        Parameters
        ----------
        prompt
            Text, or token ids ``[T]`` or ``[B, T]``.
        options
            What transformers' ``generate`` takes: ``max_new_tokens``, ``do_sample``,
            ``temperature``, ``streamer``, ``stop_strings``, ``generation_config`` ..., and
            ``presence_penalty`` and ``frequency_penalty``, which lower the logits of tokens that
            were generated before: once, and for each time.
            For text also ``on_text``, a function that is given every piece of text as soon
            as it is certain. ``on_prompt`` is given a :class:`~hybrid.fast.prompt.PromptProgress`
            after every 512 tokens of the prompt, where the fast path computes it.

        Returns
        -------
        For text, the text that follows it, without the prompt and without the stop string;
        it ends at the model's context if ``max_new_tokens`` reaches beyond. For ids, exactly
        what transformers' ``generate`` returns.

        Raises
        ------
        UsageError
            When the prompt has no tokens or does not fit into the model's context, or when the
            options of a text leave no new token to write.
        """
        if isinstance(prompt, str):
            return self.write(self.encode(prompt), **options).text
        ids = as_ids(prompt)
        check_length(ids.shape[-1], self.context)
        if setting(self.model.generation_config, "stop_strings", options):
            options.setdefault("tokenizer", self.tokenizer)
        stream = GenerationStream(streamer=options.pop("streamer", None))
        return self._generate(ids, stream, **options).result

    def stream(self, prompt: str | torch.Tensor | Sequence[int], **options: Any) -> Iterator[str]:
        """Continue ``prompt`` (text, or ids ``[1, T]``), giving the text piece by piece.

        Takes what :meth:`generate` takes. The model runs in a thread of its own; leaving the
        loop early stops it.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else as_ids(prompt)
        check_length(ids.shape[-1], self.context)
        return pieces_of(lambda on_text: self.write(ids, on_text=on_text, **options))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        on_thought: OnText | None = None,
        template_args: Mapping[str, Any] | None = None,
        kept: KeptCache | None = None,
        **options: Any,
    ) -> str:
        """Return the model's answer to ``messages`` (``[{"role": ..., "content": ...}]``).

        Parameters
        ----------
        on_thought
            Called with each piece of what the model thinks before it answers, which is no part of
            the answer.
        template_args
            Variables of the chat template, such as ``{"enable_thinking": False}``.
        kept
            The cache of a conversation: what is computed of it goes on from there. See
            :class:`~hybrid.session.conversation.Conversation`, which keeps one.
        options
            What :meth:`generate` takes for text.

        Raises
        ------
        UsageError
            When the tokenizer has no chat template or it refuses the messages, or as
            :meth:`generate`.
        """
        ids = self.encode_chat(messages, **(template_args or {}))
        return self.answer(ids, on_thought=on_thought, kept=kept, **options)

    def answer(
        self,
        ids: torch.Tensor,
        *,
        on_thought: OnText | None = None,
        kept: KeptCache | None = None,
        **options: Any,
    ) -> str:
        """Return the model's answer to messages whose ids ``[1, T]`` :meth:`encode_chat` returned.

        Takes what :meth:`chat` takes, and raises what it raises.
        """
        return self.write(ids, on_thought=on_thought or _ignore, kept=kept, **options).text

    def encode(self, text: str) -> torch.Tensor:
        """Return the ids ``[1, T]`` of ``text``, special tokens added as the model wants them.

        A text that has the token for its beginning already gets no second one.
        """
        return torch.tensor([text_ids(self.tokenizer, text, self.context)], dtype=torch.long)

    def encode_chat(self, messages: Sequence[Message], **template_args: Any) -> torch.Tensor:
        """Return the ids ``[1, T]`` that ask for the answer to ``messages``.

        Raises
        ------
        UsageError
            When there is no chat template, or it refuses the messages.
        """
        self.require_chat_template()
        ids = chat_ids(self.tokenizer, messages, template_args, self.context)
        return torch.tensor([ids], dtype=torch.long)

    def require_chat_template(self) -> None:
        """Raise UsageError when the tokenizer has no chat template."""
        if not self.tokenizer.chat_template:
            raise UsageError(
                f"the model {self._session.name} has no chat template: it was not trained to chat",
                hint="continue a text with it instead ('hybrid run'), or give it a template",
            )

    def report(self) -> RunReport:
        """Say what runs, how, how fast the last call was, and what ran slower than it could."""
        return report(self._session, self._last)

    def write(
        self,
        ids: torch.Tensor,
        *,
        on_text: OnText | None = None,
        on_thought: OnText | None = None,
        stop_strings: str | Sequence[str] | None = None,
        streamer: Any = None,
        marks: Collection[str] = (),
        kept: KeptCache | None = None,
        **options: Any,
    ) -> Generation:
        """Write the text that follows ``ids``, ``[1, T]``, and return all that came of it.

        Thoughts are told apart from the text only where ``on_thought`` is given, and the special
        tokens ``marks`` are then told as text. Everything else is as of :meth:`chat`. A
        :class:`~hybrid.session.generation_stream.Stopped` that a callback or ``streamer`` raises
        ends the text where it is.
        """
        writing = self.writing(
            ids,
            on_text=on_text,
            on_thought=on_thought,
            stop_strings=stop_strings,
            streamer=streamer,
            marks=marks,
            **options,
        )
        return self._generate(
            ids, writing.stream, kept, settings=writing.settings, **writing.options
        )

    def writing(
        self,
        ids: torch.Tensor,
        *,
        on_text: OnText | None = None,
        on_thought: OnText | None = None,
        stop_strings: str | Sequence[str] | None = None,
        streamer: Any = None,
        marks: Collection[str] = (),
        context: int | None = None,
        **options: Any,
    ) -> Writing:
        """Return how :meth:`write` writes: its options settled and its stream made, and no more.

        ``context`` takes the place of the model's own, where it is shorter.
        """
        return make_writing(
            self.model,
            self.tokenizer,
            ids,
            on_text=on_text,
            on_thought=on_thought,
            stop_strings=stop_strings,
            streamer=streamer,
            marks=marks,
            context=min((c for c in (context, self.context) if c is not None), default=None),
            options=options,
        )

    def prepare(self, writing: Writing) -> tuple[Prepared | None, Drafts | None]:
        """Return the loop that writes a text, and its drafts, for who has the :meth:`turn`.

        Its stream's clock starts. No loop where it is not one of ours on the CPU, no drafts where
        there are to be none.
        """
        check_known(writing.ids, self.loaded.vocabulary, self.tokenizer)
        stream, options = writing.stream, dict(writing.options)
        options.pop("on_prompt", None)
        prepared, chosen = prepare(
            self._session, writing.ids, stream, settings=writing.settings, **options
        )
        drafts = drafts_of(self._session, writing.ids)
        stream.start(writing.ids, chosen=chosen, drafts=drafts)
        return prepared, drafts

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Compute with the model alone meanwhile; its other callers wait."""
        with self._alone():
            set_threads(self.threads)
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._turn:
            self._writer = threading.get_ident()
            try:
                yield
            finally:
                self._writer = None

    def _generate(
        self,
        ids: torch.Tensor,
        stream: GenerationStream,
        kept: KeptCache | None = None,
        **options: Any,
    ) -> Generation:
        """Generate, in turn, and remember how that went; a ``kept`` cache is gone on from."""
        if self._writer == threading.get_ident():
            raise UsageError(
                "the model was asked to generate by a callback of its own generate, which it "
                "would wait for without end",
                hint="let the callback return first, or load the model a second time",
            )
        check_known(ids, self.loaded.vocabulary, self.tokenizer)
        with self._alone():
            cache = None if kept is None else kept.begin(self.model, ids)
            if kept is not None and cache is not None:
                options |= cache_argument(cache)
                stream.on_first = lambda: kept.prompt_done(cache, ids.shape[1])
            try:
                return generate(self._session, ids, stream, **options)
            finally:
                if kept is not None and cache is not None and stream.started:  # or interrupted
                    kept.end(cache, [*ids[0].tolist(), *stream.generation().ids[0].tolist()])
                if stream.started:  # without its result, the caller's alone: it may hold a cache
                    self._last = stream.generation()

    def save_popularity(self, path: str | PathLike[str]) -> None:
        """Write how often each expert was used, for a later start with a device.

        Counts this model's calls, and those that ``popularity`` told when it was loaded.

        Raises
        ------
        UsageError
            When the model runs on the CPU alone, where nobody counts, or ``path`` cannot be
            written.
        """
        usage = self.require_executor("counts which experts are used").usage
        known = Popularity(self._session.name, usage.tokens, usage.uses, self.loaded.weights)
        before = self.placement.popularity if self.placement else None
        if before is not None:
            tokens, uses = usage.tokens + before.tokens, usage.uses + before.uses
            known = replace(known, tokens=tokens, uses=uses)
        write_whole(Path(path), known.to_json())

    def save_routing(self, path: str | PathLike[str]) -> None:
        """Write which experts every token used as a trace, for ``hybrid plan --trace``.

        Raises
        ------
        UsageError
            When ``record_routing`` was not asked for, nothing was generated yet, or ``path``
            exists, cannot be written, or has another ending than ``.npz``, by which traces are
            told from popularity files.
        """
        if Path(path).suffix != ".npz":
            raise UsageError(
                f"{path}: the name of a routing trace ends in .npz",
                hint=f"for example {Path(path).with_suffix('.npz')}",
            )
        recorder = self.require_executor("records the routers' choices").usage.recorder
        if recorder is None:
            raise UsageError("no routing was kept", hint="load the model with record_routing=True")
        recorder.save(Path(path))
        if recorder.left_out:
            print(
                f"hybrid: {path} has {recorder.tokens} tokens, {recorder.left_out} came after",
                file=sys.stderr,
            )

    def perfetto(self) -> str:
        """Return what every lane did since loading as Chrome trace events, for ui.perfetto.dev.

        Raises
        ------
        UsageError
            When the model runs on the CPU alone, or ``keep_timeline`` was not asked for.
        """
        timeline = self.require_executor("has lanes to show").timeline
        if not timeline.keep:
            raise UsageError("no timeline was kept", hint="load the model with keep_timeline=True")
        timeline.finish()
        title = f"{self._session.name} on {self.placement.device}"  # type: ignore[union-attr]
        return trace_events(title, timeline.events, LANES)

    def close(self) -> None:
        """Give the device's memory back; the model goes on with its experts on the CPU."""
        if self.placement is not None and self.placement.executor is not None:
            self.placement.executor.close()

    def require_executor(self, what: str) -> Executor:
        """Return who shares the experts with a device; UsageError when nobody ``what``."""
        executor = None if self.placement is None else self.placement.executor
        if executor is None:
            raise UsageError(
                f"on the CPU alone nothing {what}", hint="load the model with a device (vram=...)"
            )
        return executor


def _ignore(piece: str) -> None:
    """Leave a piece of a thought untold."""
