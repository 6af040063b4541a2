"""The options that several commands share: each is declared once, and made into a value once.

A command names a value that it wants, :func:`with_options` puts the options it is made of in its
place. Loads neither torch nor numba.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

from gpu_experts.backends import choices
from hybrid.ask.options import Options
from hybrid.errors import UsageError
from planner.decide.policies import DEFAULT_POLICY

Model = Annotated[
    str | None,
    typer.Argument(
        show_default=False,
        help="A converted directory, any Hugging Face directory, a GGUF file, or ORG/NAME of the "
        "hub (@REVISION, :Q4_K_M), which is converted into the cache first. Without it: the small "
        "model that ships with this program.",
    ),
]
Yes = Annotated[
    bool,
    typer.Option("--yes", help="Download a model of the hub also where it does not fit."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", "-n", min=1, help="End after this many.", show_default="256"),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "--temp",
        min=0,
        help="Sharpness of sampling; 0 is --greedy.",
        show_default="the model's",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this joint probability."),
]
TopK = Annotated[
    int | None, typer.Option(min=0, help="Sample from this many likeliest tokens; 0 is all.")
]
MinP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Drop tokens below this share of the likeliest's probability."),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option(min=0.01, help="Above 1, tokens that occurred become less likely."),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(help="What a token loses that was generated before; below 0, what it gains."),
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="What a token loses for each time that it was generated.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=2**64 - 1, help="Make sampling repeatable; samples if nothing else says."
    ),
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the likeliest token every time.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End before this text; can be given several times."),
]
Experts = Annotated[
    str | None, typer.Option(help="Format to convert the experts to.", show_default="q4_0")
]
Dense = Annotated[
    str | None,
    typer.Option(help="Format to convert all other matrices to.", show_default="the checkpoint's"),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="What dense layers that are not quantized compute in: float32 or bfloat16; auto is "
        "bfloat16 where the processor multiplies it natively and the model is not small.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        min=1,
        help="For everything.",
        show_default="OMP_NUM_THREADS or all cores",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help=f"{choices()} or cpu.", show_default="the GPU if there is one, else cpu"),
]
Vram = Annotated[
    str | None,
    typer.Option(
        help="Of the GPU's memory, use this much, such as 4GiB; auto is what is free, 0 is the "
        "CPU alone.",
        show_default="auto",
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(
        help="Of the memory, use this much, such as 16GiB; auto is all of it. Experts beyond it "
        "are read from disk.",
        show_default="auto",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        "-c",
        min=1,
        help="Keep GPU memory for so many tokens.",
        show_default="4096, or the model's if less",
    ),
]
Policy = Annotated[
    str, typer.Option(help="Name of the cache policy that decides which experts stay on the GPU.")
]
Speculate = Annotated[
    str,
    typer.Option(
        help="Draft tokens that followed in the text before, and compute them in one step: auto "
        "as many as pay, off, lookup, or a number of them. Changes no text.",
    ),
]
Verify = Annotated[bool, typer.Option("--verify", help="Check the store's checksums first.")]


class Sampling(NamedTuple):
    """How tokens are drawn."""

    options: dict[str, Any]
    """What transformers' ``generate`` takes."""
    seed: int | None


def sampling_options(
    *,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repeat_penalty: RepeatPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    greedy: Greedy = False,
) -> Sampling:
    """Return what the command line asks of sampling.

    Any of temperature, top_p, top_k, min_p or seed asks for sampling; none of them leaves
    the choice to the model's generation config.

    Raises
    ------
    UsageError
        When greedy is asked for together with what only sampling uses.
    """
    penalties = {"presence": presence_penalty, "frequency": frequency_penalty}
    numbers = {"temperature": temperature, "repeat-penalty": repeat_penalty}
    numbers |= {f"{name}-penalty": value for name, value in penalties.items()}
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise UsageError(f"--{name} is {value}", hint=f"give --{name} a finite number")
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    options: dict[str, Any] = {name: value for name, value in drawing.items() if value is not None}
    penalty = {} if repeat_penalty is None else {"repetition_penalty": repeat_penalty}
    penalty |= {f"{name}_penalty": given for name, given in penalties.items() if given is not None}
    if temperature == 0:
        greedy = True
        del options["temperature"]
    if greedy and (options or (temperature or 0) > 0):
        raise UsageError(
            "greedy decoding was asked for together with sampling options",
            hint="leave out --greedy (or --temperature 0), or the sampling options",
        )
    if greedy:
        return Sampling({"do_sample": False} | penalty, seed)
    if options or seed is not None:
        return Sampling({"do_sample": True} | options | penalty, seed)
    return Sampling(penalty, seed)


def session_options(
    *,
    experts: Experts = None,
    dense: Dense = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    verify: Verify = False,
    device: Device = None,
    vram: Vram = None,
    ram: Ram = None,
    context: Context = None,
    policy: Policy = DEFAULT_POLICY,
    speculate: Speculate = "auto",
) -> Options:
    """Return what is asked of a session."""
    return Options.of(
        experts=experts,
        dense=dense,
        dtype=dtype,
        threads=threads,
        verify=verify,
        device=device,
        vram=vram,
        ram=ram,
        context=context,
        policy=policy,
        speculate=speculate,
    )


def with_options(**makers: Callable[..., Any]) -> Callable[[Callable[..., None]], Any]:
    """Give a command, in place of each parameter that is named here, those of what makes it."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parts = {name: _parameters(maker) for name, maker in makers.items()}
        parameters = [
            parameter
            for name, own in _parameters(command).items()
            for parameter in (parts[name].values() if name in parts else (own,))
        ]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            made = {
                name: makers[name](**{option: given.pop(option) for option in part})
                for name, part in parts.items()
            }
            command(**given, **made)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return a function's parameters, all of them by keyword, as typer calls it."""
    signature = inspect.signature(function, eval_str=True)
    return {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
    }
