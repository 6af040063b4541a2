"""What ``hybrid run`` and ``hybrid chat`` share: their options, loading, writing, the summary."""

from __future__ import annotations

import gc
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpu_experts.backends import choices
from hybrid.errors import UsageError
from hybrid.ledger.metrics import summary_line
from hybrid.paths import check_writable, write_whole

if TYPE_CHECKING:
    from hybrid.session.model import HybridModel

Model = Annotated[
    str | None,
    typer.Argument(
        show_default=False,
        help="A converted directory or any Hugging Face MoE directory, which is converted into "
        "the cache first. Without it: the small model that ships with this program.",
    ),
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
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from this many likeliest tokens.")]
MinP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Drop tokens below this share of the likeliest's probability."),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option(min=0.01, help="Above 1, tokens that occurred become less likely."),
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
PopularityFile = Annotated[
    Path | None,
    typer.Option(
        "--popularity",
        help="Begin with the experts that were used most in this file (if it is there), and "
        "add this session's uses to it at the end.",
    ),
]
RoutingFile = Annotated[
    Path | None,
    typer.Option(
        "--routing",
        help="Write which experts every token used to this .npz file, for 'hybrid plan --trace'.",
    ),
]
Perfetto = Annotated[
    Path | None,
    typer.Option(help="Write what CPU, GPU and link did when to this file, for ui.perfetto.dev."),
]
Verify = Annotated[bool, typer.Option("--verify", help="Check the store's checksums first.")]


def sampling_options(
    *,
    greedy: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repeat_penalty: float | None,
    seed: int | None,
) -> dict[str, Any]:
    """Return transformers' options for the command line's.

    Any of temperature, top_p, top_k, min_p or seed asks for sampling; none of them leaves
    the choice to the model's generation config.

    Raises
    ------
    UsageError
        When greedy is asked for together with what only sampling uses.
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    options: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    penalty = {} if repeat_penalty is None else {"repetition_penalty": repeat_penalty}
    if temperature == 0:
        greedy = True
        del options["temperature"]
    if greedy and (options or (temperature or 0) > 0):
        raise UsageError(
            "greedy decoding was asked for together with sampling options",
            hint="leave out --greedy (or --temperature 0), or the sampling options",
        )
    if greedy:
        return {"do_sample": False} | penalty
    if options or seed is not None:
        return {"do_sample": True} | options | penalty
    return penalty


def load(model: str | None, **options: Any) -> HybridModel:
    """Import what is needed and load ``model``; takes what ``HybridModel.from_pretrained`` takes.

    Collecting garbage while importing torch and transformers costs a fifth of the start and
    finds nothing, so it waits until the model is there.
    """
    gc.disable()
    try:
        from transformers.utils import logging

        from hybrid.session.model import HybridModel

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return HybridModel.from_pretrained(model, **options)
    finally:
        gc.freeze()
        gc.enable()


def prompt_progress(model: HybridModel) -> AbstractContextManager[None]:
    """Show how far a long prompt is, on stderr."""
    from hybrid.fast.prompt import prompt_bar

    return prompt_bar(model.model)


def set_seed(seed: int | None) -> None:
    """Make what is sampled next repeatable."""
    if seed is not None:
        import torch

        torch.manual_seed(seed)


def check_files(
    *, perfetto: Path | None = None, routing: Path | None = None, popularity: Path | None = None
) -> None:
    """Refuse files that could not be written at the end, before anything takes long.

    Raises
    ------
    UsageError
        When one exists that is not added to, cannot be made, or has a name that cannot be used.
    """
    check_writable("--perfetto", perfetto)
    check_writable("--routing", routing)
    if routing is not None and routing.suffix != ".npz":
        raise UsageError(
            f"--routing {routing}: the name of a routing trace ends in .npz",
            hint=f"for example --routing {routing.with_suffix('.npz')}",
        )
    if popularity is None:
        return
    if popularity.suffix == ".npz":
        if not popularity.is_file():
            raise UsageError(
                f"--popularity {popularity}: there is no such routing trace",
                hint="record one with --routing, or name a .json file that is written at the end",
            )
        return
    check_writable("--popularity", popularity, replaced=True)


def require_device(device: str | None, vram: str | None, **files: Path | None) -> None:
    """Refuse files that only a model on a device fills, where it will run on the CPU alone.

    Raises
    ------
    UsageError
        Naming the option.
    """
    given = [f"--{name}" for name, file in files.items() if file is not None]
    if not given:
        return
    from hybrid.machine.devices import choose_device

    if choose_device(device, vram) is None:
        raise UsageError(
            f"{given[0]}: on the CPU alone there is nothing to write to it",
            hint=f"add --vram or --device, or leave {' and '.join(given)} out",
        )


def require_sharing(model: HybridModel, **files: Path | None) -> None:
    """Refuse the same files where a device turns out not to take experts of this model.

    Raises
    ------
    UsageError
        Naming the option.
    """
    given = [f"--{name}" for name, file in files.items() if file is not None]
    if given and (model.placement is None or model.placement.executor is None):
        raise UsageError(
            f"{given[0]}: all experts of this model run on the CPU, nothing is written to it",
            hint=f"leave {' and '.join(given)} out",
        )


def write_timeline(model: HybridModel, file: Path | None) -> None:
    """Write the timeline of all lanes, if a file is given, and say so on stderr."""
    if file is None:
        return
    write_whole(file, model.perfetto())
    print(f"wrote {file}: open it in ui.perfetto.dev", file=sys.stderr)


def known(file: Path | None) -> Path | None:
    """Return a popularity file to begin with: none where it is yet to be written."""
    return file if file is not None and file.exists() else None


def write_popularity(model: HybridModel, file: Path | None) -> None:
    """Write the session's uses of experts, if a file is given, and say so on stderr."""
    if file is None:
        return
    if file.suffix == ".npz":  # a trace is read and stays as it is
        return
    model.save_popularity(file)
    print(f"wrote {file}: which experts this session used", file=sys.stderr)


def write_routing(model: HybridModel, file: Path | None) -> None:
    """Write the routing trace, if a file is given, and say so on stderr."""
    if file is not None:
        model.save_routing(file)
        print(f"wrote {file}: a routing trace", file=sys.stderr)


def summarise(model: HybridModel, *, whole: bool = False) -> None:
    """Tell on stderr how it went.

    One line of figures and one for everything that ran slowly and was not told before, or the
    ``whole`` report.
    Without figures, when it was interrupted before the model began, nothing.
    """
    report = model.report()
    if whole:
        print(report, file=sys.stderr)
        return
    if "new_tokens" not in report.figures:
        return
    print(summary_line(report.figures), file=sys.stderr)
    for path in report.slow_paths:
        if path.cause in {told.cause for told in model.told}:
            continue
        model.told = (*model.told, path)
        print(f"slow: {path}", file=sys.stderr)


def read_text(file: Path) -> str:
    """Return the content of ``file``, which must be UTF-8."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {file}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    return decode_utf8(data, str(file))


def decode_utf8(data: bytes, name: str) -> str:
    """Return ``data`` as text; ``name`` says where it comes from if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="convert the text to UTF-8, for example with iconv",
        ) from error
