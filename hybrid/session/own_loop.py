"""Decides which calls of ``generate`` take our loop, and settles their options for it."""

from __future__ import annotations

from typing import Any

from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation.logits_process import LogitsProcessorList

from hybrid.loop.penalties import OccurrencePenalties
from hybrid.session.generation_options import setting

#: What sends a call to another way of generating than token by token, and the values that do not.
_OTHER_WAYS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1,)),
    **dict.fromkeys(("penalty_alpha", "use_mtp", "is_assistant", "token_healing"), (0, False)),
    **dict.fromkeys(("constraints", "force_words_ids", "dola_layers"), ()),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit"), ()),
    **dict.fromkeys(("assistant_model", "custom_generate", "synced_gpus"), ()),
    **dict.fromkeys(("return_dict_in_generate",), (False,)),
}
_OCCURRENCE = ("presence_penalty", "frequency_penalty")


def with_penalties(options: dict[str, Any], prompt_tokens: int) -> dict[str, Any]:
    """Return ``options`` with the penalties that transformers does not have as a processor."""
    given = [setting(None, name, options) or 0.0 for name in _OCCURRENCE]
    rest = {name: value for name, value in options.items() if name not in _OCCURRENCE}
    if not any(given):
        return rest
    before = rest.get("logits_processor") or ()
    penalties = OccurrencePenalties(prompt_tokens, *map(float, given))
    return rest | {"logits_processor": LogitsProcessorList([*before, penalties])}


def with_own_loop(network: Any, options: dict[str, Any], loop: Any) -> dict[str, Any]:
    """Return ``options`` with a loop of ours, or as they are where they ask for another.

    :class:`~hybrid.loop.loop.Loop` itself still leaves a call to transformers' where it finds what
    it does not know.
    """
    config = network.generation_config
    for name, nothing in _OTHER_WAYS.items():
        value = setting(config, name, options)
        if value is not None and value not in nothing:
            return options
    # transformers hands the tokenizer that stop strings need to its own loops alone.
    given = "stop_strings" in options
    stops = options["stop_strings"] if given else setting(config, "stop_strings", options)
    settled = {name: value for name, value in options.items() if name != "tokenizer"}
    if stops is not None:
        if options.get("tokenizer") is None or options.get("generation_config") is not None:
            return options
        settled["stop_strings"] = None
        criteria = StopStringCriteria(options["tokenizer"], stops)
        before = settled.get("stopping_criteria") or ()
        settled["stopping_criteria"] = StoppingCriteriaList([*before, criteria])
    return settled | {"custom_generate": loop}
