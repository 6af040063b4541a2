"""``hybrid serve``: answer OpenAI's clients until told to end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hybrid.ask.options import Options
from hybrid.ask.sizes import at_most, parse_bytes
from hybrid.cli import generation as cli
from hybrid.cli.options import Model, Yes, session_options, with_options
from hybrid.errors import UsageError
from hybrid.machine.host import memory_bytes

_ROOM = 4096
"""Tokens that a request has room for beside others where --context does not say."""


@with_options(options=session_options)
def serve(
    *,
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="Address to answer on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to answer on; 0 is any free one.")
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Answer only who sends this key.",
            envvar="HYBRID_API_KEY",
            show_default="whoever reaches the address",
        ),
    ] = None,
    parallel: Annotated[
        int,
        typer.Option(min=1, max=64, help="Requests that are answered at once, on the CPU alone."),
    ] = 4,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Memory for the keys and values of all requests and of what is remembered of "
            "earlier ones, such as 4GiB.",
            show_default="what those of --context tokens take, at most half of what is free",
        ),
    ] = None,
    prefix_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep what is remembered in when the server ends, for its next start.",
            show_default="nothing is kept",
        ),
    ] = None,
    prefix_cache_size: Annotated[
        str, typer.Option(help="How much of it at most, those used last.")
    ] = "4GiB",
    max_queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait while others are answered.")
    ] = 16,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            help="Let web pages of this origin ask, such as http://localhost:3000; can be given "
            "several times, * is every page.",
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            min=0,
            max=3600,
            help="Seconds that running answers have to finish on Ctrl-C or SIGTERM.",
        ),
    ] = 30.0,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A Jinja file to use instead of the model's own chat template."),
    ] = None,
    options: Options,
    yes: Yes = False,
) -> None:
    """Answer OpenAI's clients.

    Requests to /v1/chat/completions and /v1/completions are answered several at once on the CPU
    alone, and one after the other beside a device; one whose prompt begins as an earlier one did
    goes on from there. --context is also the most tokens that a request may have with its answer.
    What clients do not ask of sampling is as the model's own settings say. A line about each
    request goes to stderr.
    """
    from hybrid.serve.server import check_installed, is_loopback, listen, open_address
    from hybrid.serve.server import serve as answer

    check_installed()
    key = None if api_key is None else cli.given_text(api_key, "--api-key")
    if key is not None and not key.strip():
        raise UsageError("--api-key is empty", hint="give a key, or leave it out")
    cache_bytes = None if cache is None else parse_bytes(cache, "--cache")
    if cache_bytes is not None:
        at_most(cache_bytes, memory_bytes(), "--cache", "this machine")
    kept_bytes = parse_bytes(prefix_cache_size, "--prefix-cache-size")
    template = None if chat_template is None else cli.read_text(chat_template)
    opened = open_address(host, port)
    with opened:
        loaded = cli.load(model, options, yes=yes)
        if template is not None:
            loaded.tokenizer.chat_template = template
        from hybrid.engine.kept_prefixes import KeptPrefixes, tell
        from hybrid.engine.opening import open_together
        from hybrid.serve.app import make_app
        from hybrid.serve.engine import Engine
        from hybrid.serve.served import Served

        served = Served(loaded, model_name(model), options.context)
        room = options.context or min(_ROOM, served.context or _ROOM)
        together, told = open_together(loaded, parallel, cache_bytes, room)
        kept = None
        if prefix_cache is not None and together is not None:
            kept = KeptPrefixes(prefix_cache, loaded, kept_bytes)
            tell(together.load(kept))
        engine = Engine(loaded, max_queue, together)
        app = make_app(served, engine, key=key, origins=cors or ())
        url = listen(opened)
        print(f"hybrid: {told}", file=sys.stderr)
        print(
            f"{served.name} answers on {url}/v1, a page to chat is on {url}/, Ctrl-C ends it",
            file=sys.stderr,
            flush=True,
        )
        if key is None and not is_loopback(opened.getsockname()[0]):
            print(
                f"hybrid: whoever reaches {url} can ask: --api-key would ask for a key",
                file=sys.stderr,
            )
        answer(app, opened, engine, grace)
        if kept is not None and together is not None and not together.running:
            tell(together.save(kept))


def model_name(model: str | None) -> str:
    """Return what requests call a model: a file or folder by its name, others as they are given."""
    if model is None:
        return "demo"
    return Path(model).resolve().name if Path(model).exists() else model
