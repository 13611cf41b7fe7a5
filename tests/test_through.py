"""Agents and conversations of the platform, with the gateway itself behind it: the small model that calls tools, streams and what they cost, lists of models, arms of experiments, limits."""
import asyncio, json, logging, sys, threading
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent/"fakes"))
from models import FakeModels, completion
from somaagent.abtest.assign import assign
from somaagent.abtest.life import Experiments
from somaagent.core.records import Arm, Experiment
from somaagent.llm.ask import Scripted, ask, stream
from somaagent.llm.embed import Embedder
from somaagent.llm.prompts import Prompt, Prompts
from somaagent.llm.targets import Target
from somaagent.rag.search import Index
from somaagent.serve import pipeline
from somaagent.serve.agent import Agent
from somaagent.serve.asking import _scope, acall, call
from somaagent.serve.config import Provider, check
from somaagent.serve.engine import Local
from somaagent.serve.gateway import Gateway
from somaagent.serve.keys import Keys
from somaagent.serve.platform import app as platform
from somaagent.serve.upstream import upstreams
from somaagent.store.state import State

class Rows(list):
    "A spool that keeps its rows at hand"
    error, bytes, most, taken, durable = None, 0, 1, 0, 0
    def append(self, row): super().append(row); return len(self)
    async def flushed(self, n): pass
    def close(self, s): pass

class Place:
    def __init__(self, home, url, trusted="word"):
        self.st = State(f"sqlite:///{home/'state.db'}")
        self.keys, self.rows = Keys(self.st), Rows()
        cfg = check(dict(providers=dict(desk=dict(base_url=url, key_env="DESK_KEY", tries=1)), models={"desk/small": dict(price=dict(input=1, output=10)), "desk/gone": dict(price=dict(input=1, output=1))}))
        self.gate = Gateway(cfg, self.keys, self.rows, ups=upstreams(cfg) | dict(local=Local(Provider("local", "local"))))
        self.gate.trusted = trusted
        self.app, self.home = platform(self.st, self.keys, self.gate, warehouse=lambda: None, home=home, trusted=trusted), home
        self.auth, self.loop = self.key(), asyncio.new_event_loop()     # one loop: connections belong to theirs
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
    def key(self, scopes=("chat", "read", "write"), **limits): return dict(authorization="Bearer "+self.keys.create("k", scopes, limits)[0])
    def ask(self, method, path, body=None, status=200, headers=None, app=None):
        path, _, query = path.partition("?")
        r = asyncio.run_coroutine_threadsafe(acall(app or self.app, method, path, json=body, headers=headers or self.auth, query=query), self.loop).result(60)
        assert r.status == status, r
        return r.json() if "json" in r.headers.get("content-type", "") else [(e.split("\n")[0][7:], json.loads(e.split("\n")[1][6:])) for e in r.body.decode().strip().split("\n\n")]
    def agent(self, **spec): return self.ask("POST", "/agents", dict(dict(name="helper", model="desk/small", tools=["calculator"]), **spec), 201)

@pytest.fixture
def fake(home, monkeypatch):
    monkeypatch.setenv("DESK_KEY", "sk-desk")
    with FakeModels() as f: yield f

@pytest.fixture
def at(home, fake):
    home.mkdir(parents=True)
    p = Place(home, fake.url)
    yield p
    p.loop.call_soon_threadsafe(p.loop.stop)
    p.st.close()

# ---- agents ----------------------------------------------------------------------------------------------------------------------------------

def test_the_tiny_model_really_calls_tools(at):
    at.agent(model="local/tiny", max_steps=3)
    out = at.ask("POST", "/agents/helper/run", dict(input="What is 6*7?"))
    calls = [c for s in out["steps"] for c in s["calls"]]
    assert calls and calls[0]["name"] == "calculator" and out["cost_usd"] is not None and Decimal(out["cost_usd"]) == 0
    assert [r["meta"].get("decision", "") for r in at.rows][0] == "true" and at.rows[-1]["meta"].get("decision") is None, "the answer itself is no decision"
    assert len({r["meta"]["trace"] for r in at.rows}) == 1 == len({r["session_id"] for r in at.rows})

def test_a_list_of_models_is_asked_in_turn(at, fake):
    at.agent(model=["nobody/knows", "desk/gone", "desk/small"], tools=[])
    fake.plan += [lambda b: {} if b["model"] == "small" else dict(status=404)]*2
    out = at.ask("POST", "/agents/helper/run", dict(input="Hello?"))
    assert out["output"] == "Your card is on its way." and out["model"] == "desk/small" and out["finish"] == "done"

def test_a_budget_ends_where_the_cost_is_not_known():
    eng = Scripted(("calculator", dict(expression="1+1")), "two")
    r = Agent("w", model=Target("odd/engine", "local", "odd", "odd", engine=eng), tools=["calculator"], budget_usd="1").run("?")
    assert r.finish == "budget" and r.cost_usd is None and len(r.steps) == 1 == eng.n

def test_an_agent_streams_in_a_conversation(at, fake):
    at.agent()
    c = at.ask("POST", "/conversations", dict(agent="helper"), 201)["id"]
    fake.plan += [dict(calls=[("calculator", dict(expression="6*7"))]), dict(text="It is 42, I think.")]
    got = at.ask("POST", f"/conversations/{c}/messages", dict(content="6*7?", stream=True))
    names = [n for n, _ in got]
    assert [n for i, n in enumerate(names) if names[i-1:i] != [n]] == ["start", "step", "tool_call", "tool_result", "step", "delta", "message", "reply", "done"] and names.count("delta") > 1
    reply = next(d for n, d in got if n == "reply")
    assert "".join(d["text"] for n, d in got if n == "delta") == "It is 42, I think." == reply["content"]
    assert Decimal(reply["cost_usd"]) == 2*(Decimal(1200)*1+Decimal(300)*10)/1_000_000 == sum(r["cost_usd"] for r in at.rows)
    assert [m["role"] for m in at.ask("GET", f"/conversations/{c}/messages")["data"]] == ["user", "assistant"]

def test_what_an_agent_had_said_is_kept_when_its_reader_leaves_or_the_stream_breaks(at, fake):
    at.agent(tools=[])
    c = at.ask("POST", "/conversations", dict(agent="helper"), 201)["id"]
    class Half:
        "A gateway whose stream stops in the middle, or never ends"
        waits = False
        async def __call__(self, scope, receive, send):
            one = lambda t: b"data: "+json.dumps(dict(id="c", created=0, model="m", choices=[dict(index=0, delta=dict(content=t), finish_reason=None)])).encode()+b"\n\n"
            await send(dict(type="http.response.start", status=200, headers=[(b"content-type", b"text/event-stream")]))
            await send(dict(type="http.response.body", body=one("Half a ")+one("word"), more_body=True))
            if self.waits: await asyncio.sleep(2)
            await send(dict(type="http.response.body", body=b""))
    half = Half()
    app = platform(at.st, at.keys, half, home=at.home)
    got = at.ask("POST", f"/conversations/{c}/messages", dict(content="Well?", stream=True), app=app)
    assert [n for n, _ in got][-3:] == ["message", "reply", "error"] and [d["content"] for n, d in got if n == "reply"] == ["Half a word"]
    half.waits = True
    async def leave():
        seen = b""
        async def send(m):
            nonlocal seen
            seen += m.get("body", b"")
            if b"word" in seen: task.cancel()
        sent = iter([dict(type="http.request", body=json.dumps(dict(content="And now?", stream=True)).encode(), more_body=False)])
        async def receive():
            if (m := next(sent, None)) is not None: return m
            await asyncio.sleep(60)
        task = asyncio.ensure_future(app(_scope("POST", f"/conversations/{c}/messages", {**at.auth, "content-type": "application/json"}, ""), receive, send))
        with pytest.raises(asyncio.CancelledError): await asyncio.wait_for(task, 20)
    asyncio.run_coroutine_threadsafe(leave(), at.loop).result(60)
    rows = at.ask("GET", f"/conversations/{c}/messages")["data"]
    assert [(m["role"], m["content"], m["finish"]) for m in rows] == [("user", "Well?", ""), ("assistant", "Half a word", "cut"), ("user", "And now?", ""), ("assistant", "Half a word", "cut")]

# ---- experiments -----------------------------------------------------------------------------------------------------------------------------

def tone(at):
    ps, life = Prompts(at.st), Experiments(at.st)
    for t in ("brief", "kind"): ps.save(Prompt.of(dict(name="tone", messages=[dict(role="system", content=t), dict(role="user", content="{{ question }}")], variables=dict(question="str"))))
    life.create(Experiment(name="tone-test", arms=[Arm(name="brief", weight=.5, config=dict(prompt="tone@1")), Arm(name="kind", weight=.5, config=dict(prompt="tone@2"))], metrics=[dict(name="ok", kind="rate", value="ok", over="requests", role="primary")], horizon=dict(units=1000)))
    return life.start("tone-test") and life.get("tone-test")

def test_an_experiment_over_prompts_meets_agents_of_the_platform(at, fake):
    x = tone(at)
    at.agent(prompt="tone", tools=[])
    for i in range(8): at.ask("POST", "/agents/helper/run", dict(input="?", user_id=f"u{i}"))
    rows = {r["user_id"]: r for r in at.rows}
    for i in range(8):
        r, arm = rows[f"u{i}"], assign(f"u{i}", x)
        assert (r["experiment"], r["arm"], r["meta"]["propensity"], r["meta"]["revision"], r["meta"]["exposure"]) == (x.id, arm, "0.5", str(x.revision), "hash") and r["messages"][0]["content"].startswith(arm)
    assert {r["arm"] for r in rows.values()} == {"brief", "kind"}

def test_a_client_cannot_name_its_own_arm(at, fake):
    said = {"x-soma-arm": json.dumps(dict(experiment="exp_1", arm="kind", propensity=.5, reason="hash", revision=1))}
    for more in ({}, {"x-soma-trusted": ""}, {"x-soma-trusted": "guess"}, {"x-soma-trusted": "wörd"}):
        at.ask("POST", "/v1/chat/completions", dict(model="desk/small", messages=[dict(role="user", content="?")]), headers={**at.auth, **said, **more}, app=at.gate)
        assert at.rows[-1]["experiment"] == "" == at.rows[-1]["arm"]
    at.ask("POST", "/v1/chat/completions", dict(model="desk/small", messages=[dict(role="user", content="?")]), headers={**at.auth, **said, "x-soma-trusted": "word"}, app=at.gate)
    assert (at.rows[-1]["experiment"], at.rows[-1]["arm"], at.rows[-1]["meta"]["revision"]) == ("exp_1", "kind", "1")
    at.gate.trusted = ""     # an office that has said nothing yet
    at.ask("POST", "/v1/chat/completions", dict(model="desk/small", messages=[dict(role="user", content="?")]), headers={**at.auth, **said, "x-soma-trusted": ""}, app=at.gate)
    assert at.rows[-1]["experiment"] == ""

def test_an_experiment_over_prompts_is_no_fault_of_the_gateways(monkeypatch):
    warned = []
    monkeypatch.setattr(logging.getLogger("somaagent.serve.pipeline"), "warning", lambda m, *a: warned.append(m % a))
    cfg = check(dict(providers=dict(desk=dict(base_url="http://127.0.0.1:9/v1")), models={"desk/small": {}}))
    t, arm = pipeline.Tests(cfg), lambda n, **kw: dict(name=n, weight=.5, **kw)
    prompts = Experiment(id="exp_1", name="tone", arms=[arm("a", config=dict(prompt="tone@1")), arm("b", config=dict(prompt="tone@2"))])
    mixed = Experiment(id="exp_2", name="mixed", arms=[arm("a", model="desk/small"), arm("b", config=dict(prompt="tone@2"))])
    for _ in range(2): t.update([prompts, mixed])
    assert t.elsewhere == ["tone"] and list(t.skipped) == ["mixed"] and "names no model" in t.skipped["mixed"]
    assert len(warned) == 1 and "mixed" in warned[0]

# ---- what streams cost -----------------------------------------------------------------------------------------------------------------------

def test_a_streamed_reply_has_its_cost(at, fake):
    c = at.ask("POST", "/conversations", dict(model="desk/small"), 201)["id"]
    got = dict(at.ask("POST", f"/conversations/{c}/messages", dict(content="Hi", stream=True)))
    assert got["reply"]["cost_usd"] == "0.0042" == format(at.rows[-1]["cost_usd"].normalize(), "f") and got["reply"]["usage"] == dict(prompt_tokens=1200, completion_tokens=300)

def test_ask_believes_the_gateways_prices(fake, monkeypatch):
    monkeypatch.setenv("SOMA_BASE_URL", fake.url); monkeypatch.setenv("SOMA_API_KEY", "k")
    fake.plan += [dict(status=200, body=completion(), headers={"x-soma-cost-usd": "0.0123"})]
    assert ask("soma/desk/small", "Hi").cost_usd == Decimal("0.0123")
    use = dict(prompt_tokens=3, completion_tokens=2, total_tokens=5, cost_usd="0.5")
    fake.plan += [dict(usage=use)]
    s = stream("soma/desk/small", "Hi")
    assert "".join(s) and s.answer.cost_usd == Decimal("0.5") and s.answer.usage.prompt == 3
    fake.plan += [dict(usage=dict(use, cost_usd="nonsense"))]
    assert ask("soma/desk/small", "Hi").cost_usd is None

# ---- limits ----------------------------------------------------------------------------------------------------------------------------------

def test_a_keys_limits_hold_on_the_platforms_routes(at):
    slow, free = at.key(rpm=3), at.key()
    got = [call(at.app, "GET", "/me", headers=slow) for _ in range(5)]
    assert [r.status for r in got] == [200]*3+[429]*2 and got[0].headers["x-ratelimit-limit-requests"] == "3"
    d = got[3].json()
    assert d["code"] == "rate_limit" and d["status"] == 429 and got[3].headers["content-type"] == "application/problem+json" and 1 <= int(got[3].headers["retry-after"]) <= 20
    assert call(at.app, "GET", "/agents", headers=slow).status == 429, "of all routes together"
    assert all(call(at.app, "GET", "/me", headers=free).status == 200 for _ in range(8)), "a key without limits has none"
    assert at.keys.check(slow["authorization"]).limits.rpm.left() == pytest.approx(3, abs=.01), "the gateway's count is its own"

def test_requests_at_once_of_one_key(at, fake):
    one = at.key(("chat", "read"), concurrent=1)
    c = at.ask("POST", "/conversations", dict(model="desk/small"), 201, one)["id"]
    fake.plan += [dict(wait=1)]
    from concurrent.futures import ThreadPoolExecutor
    def say(): return asyncio.run_coroutine_threadsafe(acall(at.app, "POST", f"/conversations/{c}/messages", json=dict(content="Hi"), headers=one), at.loop).result(30).status
    with ThreadPoolExecutor(3) as pool: assert sorted(pool.map(lambda _: say(), range(3))) == [201, 429, 429]
    assert say() == 201, "and it is free again"

# ---- search by meaning -----------------------------------------------------------------------------------------------------------------------

class Books:
    "A warehouse with as many interactions as there are rows"
    def __init__(self): self.rows, self.open = [], threading.Event()
    def stream(self, sql, params):
        import polars as pl
        assert self.open.wait(20)
        if self.rows: yield pl.DataFrame(self.rows)
    def add(self, ident, session, prompt, answer): self.rows.append(dict(id=ident, ts=1.8e9, app="k", user_id="u", session_id=session, prompt=prompt, answer=answer, category="", model="desk/small", rating=None))

class Letters(Embedder):
    "Counts letters: what is loaded is not the point"
    name, dim, max_tokens = "letters", 26, 256
    def _vectors(self, texts): return np.array([[t.lower().count(chr(97+i))+.01 for i in range(26)] for t in texts], np.float32), np.zeros(len(texts), bool)

def test_search_by_meaning_waits_for_no_index(at, fake, monkeypatch):
    monkeypatch.setattr("somaagent.rag.search.load_embedder", lambda name: Letters())
    place, books, other = at.app.state.place, Books(), at.key()
    place._wh = books
    Index("conversations", at.home/"indexes", store="memory").close()
    said = {}
    for who, headers, text, answer in (("mine", None, "Where is my parcel?", "The parcel left on Monday"), ("theirs", other, "My parcel?", "Your parcel is lost")):
        said[who] = c = at.ask("POST", "/conversations", dict(model="desk/small"), 201, headers)["id"]
        fake.plan += [dict(text=answer)]
        x = at.ask("POST", f"/conversations/{c}/messages", dict(content=text), 201, headers)
        books.add(x["reply"]["interaction"], c, text, answer)
    first = at.ask("GET", "/search/conversations?q=parcel&mode=hybrid")
    assert first["mode"] == "text" and "being indexed" in first["note"] and {h["conversation"] for h in first["data"]} == {said["mine"]}, "words alone, at once"
    books.open.set()
    worker = place.indexing.worker
    worker.join(60)
    for mode in ("hybrid", "bm25", "vector"):
        got = at.ask("GET", f"/search/conversations?q=where%20is%20the%20parcel&mode={mode}")
        assert got["mode"] == mode and not got["note"] and [(h["conversation"], h["message"] != "") for h in got["data"]] == [(said["mine"], True)], "of others nothing is found"
    assert place.indexing.worker is worker, "not again for every question"
    books.add("int_new", said["mine"], "And the invoice?", "The invoice was sent twice")
    place.indexing.every = 0
    at.ask("GET", "/search/conversations?q=invoice&mode=bm25")
    place.indexing.worker.join(60)
    assert place.indexing.worker is not worker and [h["interaction"] for h in at.ask("GET", "/search/conversations?q=invoice&mode=bm25")["data"]] == ["int_new"]

def test_an_index_that_cannot_be_made_is_said(at):
    c = at.ask("POST", "/conversations", dict(model="desk/small"), 201)["id"]
    at.ask("POST", f"/conversations/{c}/messages", dict(content="the blue parcel", reply=False), 201)
    at.app.state.place._wh = None          # no warehouse at all
    at.ask("GET", "/search/conversations?q=parcel&mode=vector")
    at.app.state.place.indexing.worker.join(60)
    got = at.ask("GET", "/search/conversations?q=parcel&mode=vector")
    assert "cannot be made" in got["note"] and [h["text"] for h in got["data"]] == ["the blue parcel"]
