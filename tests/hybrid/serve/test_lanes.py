"""What the server tells of lanes, and the page's files: headers, keys, nothing from elsewhere."""

from __future__ import annotations

import re
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import pytest

from hybrid.ledger.metrics import STEP
from hybrid.ledger.residual import DECODE
from hybrid.serve.engine import Engine
from hybrid.serve.lanes import Lanes
from hybrid.serve.served import Served
from hybrid.session.model import HybridModel
from planner.describe.estimate import Estimate, Source
from shared_demo import placed

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}


def test_the_page_needs_no_key(model: HybridModel, engine: Engine) -> None:
    """What it asks does; its own files come from this server alone and run nothing else."""
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    pytest.importorskip("httpx", reason="asking it in this process needs httpx")
    from fastapi.testclient import TestClient

    from hybrid.serve.app import make_app

    app = make_app(Served(model, "demo"), engine, key="k", tell=lambda line: None)
    with TestClient(app) as ask:
        names = {each.name for each in files("hybrid.serve").joinpath("page").iterdir()}
        assert {"index.html", "chat.js", "page.css"} <= names
        for name in names:
            answer = ask.get("/" if name == "index.html" else f"/page/{name}")
            assert answer.status_code == 200, name
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            outside = set(re.findall(r"https?://[\w.]+", answer.text)) - {"http://www.w3.org"}
            assert not outside, name
            assert "innerHTML" not in answer.text
        assert "javascript" in ask.get("/page/chat.js").headers["content-type"]
        assert ask.get("/page/none.js").status_code == 404
        assert ask.get("/lanes").status_code == 401


@pytest.mark.parametrize("given", ["x", "", "0", "-1", "1e3", "9" * 5000, "\u0663", "1025"])
def test_a_context_that_is_none(ask: Any, given: str) -> None:
    """Refused by its name, whatever it is."""
    answer = ask.get("/lanes", params={"context": given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "context"


def test_the_cpu_alone(ask: Any, model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured is what the last answer's tokens took, predicted what this text alone should."""
    assert ask.get("/lanes").json()["last"] is None
    body = {"prompt": "import os\n", "max_tokens": 5, "temperature": 0}
    usage = ask.post("/v1/completions", json=body).json()["usage"]
    told = ask.get("/lanes").json()
    last, cpu = told["last"], told["lanes"]["cpu"]
    assert (last["prompt_tokens"], last["new_tokens"]) == (usage["prompt_tokens"], 5)
    assert cpu == told["token"]
    assert cpu["measured_s"] == pytest.approx(1 / last["tokens_per_s"])
    assert cpu["predicted_s"] is None
    assert "hybrid calibrate" in told["note"]
    assert told["lanes"]["gpu"] is told["lanes"]["link"] is told["device"] is None
    asked = []

    def predicted(loaded: Any, prompt: int, new: int, **more: Any) -> Any:
        assert loaded is model.loaded
        asked.append((prompt, new))
        return SimpleNamespace(tpot=Estimate(0.25, Source.MEASURED, 0.0))

    monkeypatch.setattr("hybrid.serve.lanes.predicted", predicted)
    ahead = ask.get("/lanes", params={"context": 99}).json()
    assert ahead["token"] == {"predicted_s": 0.25, "measured_s": None}
    assert ahead["note"] is None
    ask.get("/lanes", params={"context": 99})
    assert asked == [(99, 2)]  # it is computed once


def test_beside_a_device() -> None:
    """The figures of the report: the whole token, the three lanes, and the hit rate."""
    shared = placed("demo", 40)
    generation = shared.write(shared.encode("import os\n"), **GREEDY)
    lanes = Lanes(Served(shared, "demo"))
    lanes.note(generation)
    told, report = lanes.figures(), shared.report()
    wanted = {
        term.name: {"predicted_s": term.predicted_s, "measured_s": term.measured_s}
        for term in report.terms
        if term.phase == DECODE
    }
    assert told["token"] == wanted[STEP]
    assert told["lanes"] == {name: wanted[name] for name in ("cpu", "gpu", "link")}
    assert told["hit_rate"] == report.figures["hit_rate"].value
    assert told["device"].startswith("emulated")
    assert told["lanes"]["gpu"]["measured_s"] > 0
    assert lanes.figures(500)["token"] == told["token"]  # a device's are measured alone
    lanes.note(shared.write(shared.encode("import os\n"), **GREEDY | {"max_new_tokens": 1}))
    told = lanes.figures()
    assert told["token"] == {"predicted_s": None, "measured_s": None}
    assert told["hit_rate"] is told["lanes"]["gpu"] is told["last"]["tokens_per_s"] is None
