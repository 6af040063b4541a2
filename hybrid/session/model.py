"""HybridModel: load a Mixture-of-Experts model, write text with it, say how that went."""

from __future__ import annotations

import copy
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from typing import Any, overload

import torch

from hybrid.demo import demo_path
from hybrid.errors import UsageError
from hybrid.fast.prompt import prompts_told
from hybrid.formats.notes import Note
from hybrid.ledger.metrics import GenerationTimes, RunReport
from hybrid.ledger.prediction import begin_run
from hybrid.ledger.slow_paths import refusals
from hybrid.loading import load_tokenizer, set_threads
from hybrid.machine import host
from hybrid.session.generation_stream import OnText, Stopped, Watch
from hybrid.session.keepsakes import Keepsakes
from hybrid.session.open import load_model
from hybrid.session.report import run_report
from hybrid.sharing.placement import Placement
from hybrid.textstream import TextStream, as_ids

#: New tokens when text is asked for and neither the caller nor the model gives a limit.
DEFAULT_NEW_TOKENS = 256

_LENGTHS = ("max_length", "max_new_tokens")

Message = dict[str, Any]


class HybridModel(Keepsakes):
    """A causal language model whose experts run from the packed store.

    Make one with :meth:`from_pretrained`. One call computes at a time; calls from other
    threads wait for it.

    Attributes
    ----------
    model
        The transformers model, ready for anything that takes one.
    tokenizer
        Its tokenizer.
    threads
        Threads of torch and of the kernels; both always have the same number.
    placement
        How it lies on a device; None on the CPU alone.
    told
        What was said to be slower or smaller than it could be when it was loaded.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        threads: int,
        placement: Placement | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.threads = threads
        self.placement = placement
        self.told: tuple[Note, ...] = ()
        self._name = name
        self._load_s = 0.0
        self._reserved: int | None = None
        self._times: GenerationTimes | None = None
        self._turn = threading.Lock()

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
        vram: str | int | None = None,
        ram: str | int | None = None,
        context: int | None = None,
        popularity: str | PathLike[str] | None = None,
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
        start = time.perf_counter()
        threads = set_threads(host.default_threads() if threads is None else threads)
        loaded = load_model(
            demo_path() if path is None or path == "demo" else path,
            experts=experts,
            dense=dense,
            verify=verify,
            dtype=dtype,
            device=device,
            vram=vram,
            ram=ram,
            context=context,
            popularity=popularity,
            threads=threads,
            keep_timeline=keep_timeline,
            record_routing=record_routing,
        )
        tokenizer = load_tokenizer(loaded.directory)
        name = "demo" if path is None else str(path)
        self = cls(
            loaded.network, tokenizer, name=name, threads=threads, placement=loaded.placement
        )
        self.told, self._reserved = loaded.notes, loaded.context
        self._warm_up()
        self._tell_refusals()
        self._load_s = time.perf_counter() - start
        return self

    @property
    def context(self) -> int | None:
        """The most tokens that the model takes, prompt included; None when it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

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
            ``temperature``, ``streamer``, ``stop_strings``, ``generation_config`` ...
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
            return self._write(self.encode(prompt), **options)
        ids = as_ids(prompt)
        self._check_length(ids)
        if options.get("stop_strings"):
            options.setdefault("tokenizer", self.tokenizer)
        return self._generate(ids, Watch(streamer=options.pop("streamer", None)), **options)

    def stream(self, prompt: str | torch.Tensor | Sequence[int], **options: Any) -> Iterator[str]:
        """Continue ``prompt`` (text, or ids ``[1, T]``), giving the text piece by piece.

        Takes what :meth:`generate` takes. The model runs in a thread of its own; leaving the
        loop early stops it.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else as_ids(prompt)
        self._check_length(ids)
        return self._pieces(ids, options)

    def _pieces(self, ids: torch.Tensor, options: dict[str, Any]) -> Iterator[str]:
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        left = threading.Event()
        failure: list[BaseException] = []

        def on_text(piece: str) -> None:
            if left.is_set():
                raise Stopped
            pieces.put(piece)

        def write() -> None:
            try:
                self._write(ids, on_text=on_text, **options)
            except BaseException as error:
                failure.append(error)
            finally:
                pieces.put(None)

        writer = threading.Thread(target=write, name="hybrid-generate", daemon=True)
        writer.start()
        try:
            yield from iter(pieces.get, None)
        finally:
            left.set()
            writer.join()
        if failure:
            raise failure[0]

    def chat(self, messages: Sequence[Message], **options: Any) -> str:
        """Return the model's answer to ``messages`` (``[{"role": ..., "content": ...}]``).

        Takes what :meth:`generate` takes for text.

        Raises
        ------
        UsageError
            When the tokenizer has no chat template, or as :meth:`generate`.
        """
        return self._write(self.encode_chat(messages), **options)

    def encode(self, text: str) -> torch.Tensor:
        """Return the ids ``[1, T]`` of ``text``, special tokens added as the model wants them."""
        return torch.tensor([self.tokenizer(text)["input_ids"]], dtype=torch.long)

    def encode_chat(self, messages: Sequence[Message]) -> torch.Tensor:
        """Return the ids ``[1, T]`` that ask for the answer to ``messages``."""
        self.require_chat_template()
        encoded = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )
        return torch.tensor([encoded["input_ids"]], dtype=torch.long)

    def require_chat_template(self) -> None:
        """Raise UsageError when the tokenizer has no chat template."""
        if not self.tokenizer.chat_template:
            raise UsageError(
                f"the model {self._name} has no chat template: it was not trained to chat",
                hint="continue a text with it instead ('hybrid run'), or give it a template",
            )

    def report(self) -> RunReport:
        """Say what runs, how, how fast the last call was, and what ran slower than it could."""
        return run_report(
            self.model,
            self.placement,
            self._times,
            name=self._name,
            threads=self.threads,
            load_s=self._load_s,
            context=self._reserved,
            told=self.told,
        )

    def _warm_up(self) -> None:
        """Run a few tokens, so that loading the kernels counts as loading and not as TTFT."""
        self.generate([0, 0], max_new_tokens=2, min_new_tokens=2, do_sample=False)
        self._times = None
        if self.placement is not None and self.placement.executor is not None:
            self.placement.executor.forget_counts()

    def _tell_refusals(self) -> None:
        """Say why plain steps go past the fast path, if they do; before any text is written."""
        if self.model.hybrid_fast.path.fast and self.model.hybrid_fast.refused:
            found = tuple(refusals(self.model.hybrid_fast))
            for note in found:
                print(f"hybrid: {note}", file=sys.stderr)
            self.told = (*self.told, *found)

    def _write(
        self,
        ids: torch.Tensor,
        *,
        on_text: OnText | None = None,
        stop_strings: str | Sequence[str] | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> str:
        """Generate after ``ids``, ``[1, T]``, and return the new text."""
        self._check_length(ids)
        stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if "" in stops:
            raise UsageError("a stop string is empty", hint="leave it out")
        rows = len(ids) * (self._setting("num_return_sequences", options) or 1)
        if rows != 1:
            raise UsageError(
                f"a text result is one sequence, {rows} are asked for",
                hint="generate() with token ids as the prompt returns several sequences of ids",
            )
        wanted = self._wanted_tokens(options, ids.shape[1])
        if wanted < 1:
            raise UsageError(
                f"{wanted} new tokens are asked for after a prompt of {ids.shape[1]}",
                hint="give max_new_tokens of at least 1, or a max_length beyond the prompt",
            )
        room = wanted if self.context is None else min(wanted, self.context - ids.shape[1])
        watch = Watch(
            streamer=streamer,
            text=TextStream(self.tokenizer, ids[0].tolist(), stops),
            on_text=on_text,
            limit=room,
            limit_name="max_new_tokens" if room == wanted else "context full",
        )
        self._generate(
            ids,
            watch,
            **{"attention_mask": torch.ones_like(ids)} | self._text_options(options, room),
        )
        return watch.written

    def _setting(self, name: str, options: dict[str, Any]) -> Any:
        """Return a generation setting as transformers resolves it."""
        if options.get(name) is not None:
            return options[name]
        given = getattr(options.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name, None) if given is None else given

    def _wanted_tokens(self, options: dict[str, Any], prompt_tokens: int) -> int:
        new_tokens = self._setting("max_new_tokens", options)
        if new_tokens is not None:
            return int(new_tokens)
        length = self._setting("max_length", options)
        return DEFAULT_NEW_TOKENS if length is None else int(length) - prompt_tokens

    def _text_options(self, options: dict[str, Any], room: int) -> dict[str, Any]:
        """Return ``options`` with the number of new tokens and a padding id settled."""
        settled = {"max_new_tokens": room}
        if self._setting("pad_token_id", options) is None:
            end = self._setting("eos_token_id", options)
            settled["pad_token_id"] = end[0] if isinstance(end, list) else end
        rest = {name: value for name, value in options.items() if name not in _LENGTHS}
        if options.get("generation_config") is None:
            return rest | settled
        config = copy.deepcopy(options["generation_config"])
        config.update(max_length=None, **settled)
        return rest | {"generation_config": config}

    def _generate(self, ids: torch.Tensor, watch: Watch, **options: Any) -> Any:
        """Run transformers' loop under ``watch``; None when the watch left it early."""
        on_prompt = options.pop("on_prompt", None)
        told = nullcontext() if on_prompt is None else prompts_told(self.model, on_prompt)
        # Masks and the like belong where the ids are.
        options = {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        streams = (self._setting("num_beams", options) or 1) == 1
        if streams:
            options["streamer"] = watch
        elif watch.streams:
            raise UsageError(
                "beam search (num_beams > 1) knows no text before it ends, so it cannot stream",
                hint="leave out num_beams, or the streamer",
            )
        with self._turn:
            set_threads(self.threads)
            if self.placement is not None:
                self.placement.begin_run()
            else:
                begin_run(self.model, ids.shape[1])
            self.model.hybrid_fast.refused.clear()
            watch.start(ids)
            try:
                with told:
                    result = self.model.generate(ids.to(self.model.device), **options)
                if not streams:
                    watch.take(getattr(result, "sequences", result))
                return result
            except Stopped:
                return None
            finally:
                drawn, written = self._setting("do_sample", options), watch.text is not None
                asides = [name for name, is_so in (("sampling", drawn), ("text", written)) if is_so]
                self._times = replace(watch.times(), asides=tuple(asides))

    def _check_length(self, ids: torch.Tensor) -> None:
        tokens, context = ids.shape[-1], self.context
        if tokens == 0:
            raise UsageError("the prompt has 0 tokens", hint="give it at least one character")
        if context is not None and tokens >= context:
            raise UsageError(
                f"the prompt has {tokens} tokens and the model's context is {context}, which "
                "must also hold the answer",
                hint=f"shorten the prompt to {context - 1} tokens or fewer",
            )
