"""Writes a record of ``hybrid bench model`` as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybrid.ledger.metrics import STEP, Term, most_off
from hybrid.machine.calibrations import REMEDY
from hybrid.measure.interference import DISTURBED


def model_table(result: dict[str, Any]) -> str:
    """Return the record as text."""
    prefill, decode = result["prefill"], result["decode"]
    rows = [
        ("family", f"{result['family']}, experts {result['experts']}, dense {result['dense']}"),
        ("computed in", result["dtype"]),
        ("single tokens", result["decode_path"]),
        ("start", _started(result["start"])),
        ("prefill", f"{prefill['tokens_per_s']:.1f} tokens/s, {_range(prefill)}"),
        ("decode", f"{decode['tokens_per_s']:.1f} tokens/s, {_range(decode)} a token"),
        *_prediction(result),
        ("read bandwidth", _bandwidth(result)),
        ("peak memory", f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB, mapped files included"),
        ("anonymous", f"{_mib(result['start'], 'peak_anonymous_bytes')} at most"),
    ]
    if result["disturbed"] >= DISTURBED:
        rows.append(
            ("disturbed", f"other programs used {result['disturbed']:.0%} of the processors")
        )
    if result["read_fraction"] is not None:
        share = f"{result['bytes_per_token'] / 1e6:.1f} MB, {result['read_fraction']:.2f} of"
        rows.append(("read a token", f"{share} the bandwidth"))
    return "\n".join(f"{name:<15} {value}" for name, value in rows)


def _bandwidth(result: dict[str, Any]) -> str:
    """Now, and when it was calibrated: a machine's speed drifts, and predictions with it."""
    now = f"{result['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    known = result["calibration"]
    if known is None:
        return now
    return f"{now}, {known['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s when calibrated"


def _started(start: dict[str, Any]) -> str:
    """What a fresh process took."""
    load, first = start["load_s"], start["load_to_first_token_s"]
    whole = f"{start['process_to_first_token_s']:.2f} s with {start['import_s']:.2f} s of imports"
    return f"loaded in {load:.2f} s, first token after {first:.2f} s ({whole})"


def _mib(values: dict[str, Any], name: str) -> str:
    return f"{values[name] / 2**20:,.0f} MiB"


def _prediction(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Prefill and a token as they were predicted, from what, and by which terms they are off."""
    found = result["predicted"]
    if found is None:
        yield "predicted", f"nothing: {REMEDY}"
        return
    residuals = result["residuals"]
    yield (
        "predicted",
        f"prefill {found['ttft_s'] * 1e3:.1f} ms ({residuals['ttft']:+.0%} against measured), "
        f"decode {found['tpot_s'] * 1e3:.1f} ms ({residuals['tpot']:+.0%} against measured)",
    )
    yield "", f"from {result['calibration']['from']}; {result['calibration']['machine']}"
    terms = []
    for phase, key in (("prefill", "ttft_s"), ("decode", "tpot_s")):
        terms.append(Term(phase, STEP, found[key], result[phase]["seconds_median"]))
        for term in result["terms"]:
            if term["phase"] == phase:
                terms.append(Term(phase, term["name"], term["predicted_s"], term["measured_s"]))
                yield phase, f"{term['name']}: {terms[-1]}"
    yield from most_off(terms)


def _range(times: dict[str, Any]) -> str:
    low, high = times["seconds_quartiles"]
    return f"{times['seconds_median'] * 1e3:.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f})"
