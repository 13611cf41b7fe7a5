"The Python client: both kinds against a gateway that is played, then with the commands against one that runs."
import asyncio, datetime as dt, http.server, importlib, inspect, json, os, pathlib, pickle, random, re, subprocess, sys, threading, time, traceback
from decimal import Decimal

import httpx, pytest
from click.testing import CliRunner

from somaagent.sdk import AsyncSomaAgent, SomaAgent, credentials, errors as er
from somaagent.sdk.client import pause
from somaagent.sdk.streaming import Gathered, Lines

KEY = "soma_0123456789-not-a-real-key"
chunk = lambda text=None, finish=None, **kw: dict(id="c1", model="m", choices=[dict(index=0, delta=dict(content=text) if text else {}, finish_reason=finish)]) | kw
sse = lambda *parts: "".join(f"data: {p if isinstance(p, str) else json.dumps(p)}\n\n" for p in parts).encode()
GOOD = dict(id="c1", model="m", choices=[dict(index=0, message=dict(role="assistant", content="Hi"), finish_reason="stop")], brand_new=[1])
STREAM = sse(chunk("Hel"), chunk("lo"), chunk(finish="stop"), dict(choices=[], usage=dict(prompt_tokens=1, completion_tokens=2, total_tokens=3)), "[DONE]")

async def _all(x):
    "Whatever a method of the asynchronous client gives, without its awaiting"
    return await x if inspect.isawaitable(x) else x

class Both:
    "One kind of client over a list of answers: responses, exceptions, or functions of the request"
    def __init__(self, kind, *answers, **kw):
        self.kind, self.answers, self.seen, self.slept = kind, list(answers), [], []
        def handle(req):
            self.seen.append(req)
            a = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if isinstance(a, Exception): raise a
            return a(req) if callable(a) else httpx.Response(a.status_code, headers=a.headers, stream=a.stream) if not isinstance(a, dict) else httpx.Response(200, json=a)
        cls, h = (SomaAgent, httpx.Client) if kind == "sync" else (AsyncSomaAgent, httpx.AsyncClient)
        self.c = cls(KEY, "http://gate:1", http_client=h(transport=httpx.MockTransport(handle)), **kw)
        async def nap(s): self.slept.append(s)
        self.c._sleep, self.c._rng = self.slept.append if kind == "sync" else nap, lambda: 0.
    def run(self, fn):
        if self.kind == "sync": return fn(self.c)
        async def go(): return await _all(fn(self.c))
        return asyncio.run(go())
    def stream(self, fn=lambda c: c.chat.completions.create(model="m", messages="Hi", stream=True), most=10**9):
        "(the stream, its pieces' texts), read to the end or for `most` pieces"
        got = []
        def sync():
            with fn(self.c) as s:
                for p in s:
                    got.append(p.text)
                    if len(got) >= most: break
            return s, got
        async def go():
            async with await fn(self.c) as s:
                async for p in s:
                    got.append(p.text)
                    if len(got) >= most: break
            return s, got
        return sync() if self.kind == "sync" else asyncio.run(go())

@pytest.fixture(params=["sync", "async"])
def both(request): return lambda *answers, **kw: Both(request.param, *answers, **kw)

ask = lambda c, model="m", **kw: c.chat.completions.create(model=model, messages="Hi", **kw)
def public(x, at=""):
    "Every method of a client, by its dotted name: what is a property with methods of its own is looked into"
    from somaagent.sdk.calls import Resource
    for n in sorted(n for n in dir(type(x)) if not n.startswith("_") and n not in ("close", "with_options", "with_raw_response", "base_url")):
        v = getattr(x, n)
        if isinstance(v, Resource): yield from public(v, f"{at}{n}.")
        elif callable(v): yield f"{at}{n}"

say = lambda **kw: lambda c: c.conversations.messages.create("conv_1", "Hi", **kw)
CALLS = {   # a call of every method; a list where options make a difference
    "chat.completions.create": [ask, lambda c: ask(c, stream=True, temperature=0, session="s", category="k", headers={"x-mine": "1"})], "completions.create": lambda c: c.completions.create(model="m", prompt="a"),
    "embeddings.create": lambda c: c.embeddings.create(model="m", input=["a"]), "models.list": [lambda c: c.models.list(), lambda c: c.with_raw_response.models.list()], "models.get": lambda c: c.models.get("a/../b?c#d"), "health": lambda c: c.health(), "me": lambda c: c.me(),
    "feedback.create": [lambda c: c.feedback.create("int_1", rating=5), lambda c: c.feedback.create("int_1", thumbs=False, comment="no")],
    "conversations.create": lambda c: c.conversations.create(title="t", user="u-1", agent="desk", meta=dict(k="v")), "conversations.list": lambda c: c.conversations.list(user="u-1", limit=5), "conversations.get": lambda c: c.conversations.get("../x"),
    "conversations.delete": lambda c: c.conversations.delete("conv_1"), "conversations.search": lambda c: c.conversations.search("a b&c", k=3), "conversations.messages.list": lambda c: c.conversations.messages.list("conv_1"),
    "conversations.messages.create": [say(max_tokens=4), say(stream=True, idempotency_key="mine")],
    "agents.create": lambda c: c.agents.create("desk", tools=["calculator"], budget_usd=.05), "agents.list": lambda c: c.agents.list(), "agents.get": lambda c: c.agents.get("desk"), "agents.update": lambda c: c.agents.update("desk", name="desk", max_steps=3), "agents.delete": lambda c: c.agents.delete("desk"),
    "agents.run": [lambda c: c.agents.run("desk", "17*23?"), lambda c: c.agents.run("desk", "17*23?", stream=True)],
    "capsules.install": lambda c: c.capsules.install(b"PK", hash="sha256:00"), "capsules.list": lambda c: c.capsules.list(), "capsules.get": lambda c: c.capsules.get("count", version="1.0.0"), "capsules.delete": lambda c: c.capsules.delete("count"), "capsules.execute": lambda c: c.capsules.execute("count", dict(n=3)),
    "workflows.list": lambda c: c.workflows.list(), "workflows.get": lambda c: c.workflows.get("improve"), "workflows.start": lambda c: c.workflows.start("improve", dict(log="x"), again=True), "workflows.status": lambda c: c.workflows.status("job_1"), "workflows.cancel": lambda c: c.workflows.cancel("job_1"),
    "jobs.list": lambda c: c.jobs.list(kind="workflow", limit=3), "jobs.get": lambda c: c.jobs.get("job_1"), "jobs.cancel": lambda c: c.jobs.cancel("job_1"), "jobs.wait": lambda c: c.jobs.wait("job_1"),
    "training.start": lambda c: c.training.start(trainer="sft", dataset="d", config=dict(epochs=1), worker=False), "training.list": lambda c: c.training.list(status="queued"), "training.get": lambda c: c.training.get("j"), "training.status": lambda c: c.training.status("j"), "training.cancel": lambda c: c.training.cancel("j"),
    "training.logs": lambda c: c.training.logs("j", tail=5), "training.metrics": lambda c: c.training.metrics("j"), "training.wait": lambda c: c.training.wait("j"),
    "models.registered": lambda c: c.models.registered(), "models.describe": lambda c: c.models.describe("desk"), "models.versions": lambda c: c.models.versions("desk", limit=2), "models.version": lambda c: c.models.version("desk", "production"), "models.history": lambda c: c.models.history("desk"),
    "models.compare": lambda c: c.models.compare("desk", "1.0.0", "1.1.0", alpha=.1), "models.promote": lambda c: c.models.promote("desk", "1.1.0"), "models.rollback": lambda c: c.models.rollback("desk", "worse", to="1.0.0"),
    "ab_tests.create": lambda c: c.ab_tests.create(name="tone", template="prompt-versions", question="?"), "ab_tests.list": lambda c: c.ab_tests.list(archived=True), "ab_tests.get": lambda c: c.ab_tests.get("tone"), "ab_tests.results": lambda c: c.ab_tests.results("tone", at="2026-01-01T00:00:00Z"),
    "ab_tests.history": lambda c: c.ab_tests.history("tone"), **{f"ab_tests.{w}": (lambda w: lambda c: getattr(c.ab_tests, w)("tone", reason="r", revision=2))(w) for w in ("start", "pause", "resume", "stop", "archive")}, "ab_tests.analyze": lambda c: c.ab_tests.analyze("tone", decide=False),
    "ab_tests.decide": lambda c: c.ab_tests.decide("tone", "keep", "No gain."),
    "deployments.create": lambda c: c.deployments.create("desk", version="1.1.0", alias="d"), "deployments.list": lambda c: c.deployments.list(), "deployments.get": lambda c: c.deployments.get("dep_1"), "deployments.health": lambda c: c.deployments.health("dep_1"), "deployments.delete": lambda c: c.deployments.delete("dep_1"),
    "deployments.wait": lambda c: c.deployments.wait("dep_1"),
    "prompts.list": lambda c: c.prompts.list(), "prompts.get": lambda c: c.prompts.get("hi", ref="production"), "prompts.save": lambda c: c.prompts.save("hi", text="Hi {{ n }}", variables=dict(n=dict(type="str"))), "prompts.versions": lambda c: c.prompts.versions("hi"), "prompts.label": lambda c: c.prompts.label("hi", "production", 1),
    "prompts.render": lambda c: c.prompts.render("hi", values=dict(n="x")),
    "keys.create": lambda c: c.keys.create("web", scopes=["chat"], limits=dict(rpm=9)), "keys.list": lambda c: c.keys.list(), "keys.get": lambda c: c.keys.get("key_1"), "keys.revoke": lambda c: c.keys.revoke("key_1", reason="lost"), "usage.get": lambda c: c.usage.get(since=dt.date(2026, 1, 1), by=("day", "model")), "audit.list": lambda c: c.audit.list(action="key.create")}
flat = [(k, f) for k, fs in CALLS.items() for f in (fs if isinstance(fs, list) else [fs])]

def test_no_method_is_without_a_call():
    for cls, h in ((SomaAgent, httpx.Client), (AsyncSomaAgent, httpx.AsyncClient)): assert set(public(cls(KEY, "http://gate:1", http_client=h()))) == set(CALLS)

def test_both_clients_send_the_same():
    def sent(kind, fn):
        b = Both(kind, httpx.Response(418, text="tea"))
        with pytest.raises(er.APIError): b.run(fn)
        r, = b.seen
        body = json.loads(r.content) if r.content and r.headers["content-type"] == "application/json" else r.content
        if isinstance(body, dict): body.pop("ts", None)
        return r.method, str(r.url), {k: v for k, v in r.headers.items() if k not in ("idempotency-key", "content-length")}, body, "idempotency-key" in r.headers, {k: v > 0 for k, v in r.extensions["timeout"].items()}
    for name, fn in flat:
        got = sent("sync", fn)
        assert got == sent("async", fn), name
        assert got[4] == (got[0] == "POST" and name != "keys.create"), name
    of = lambda k, i=0: sent("sync", [f for n, f in flat if n == k][i])
    assert "%2F..%2Fb%3Fc%23d" in of("models.get")[1] and of("conversations.get")[1].endswith("/api/v1/conversations/..%2Fx") and of("conversations.search")[1].endswith("/search/conversations?q=a+b%26c&k=3") and of("capsules.install")[3] == b"PK"

def test_signatures_are_documented():
    c = SomaAgent(KEY, "http://gate:1", http_client=httpx.Client())
    for name in CALLS:
        f = c
        for part in name.split("."): f = getattr(f, part)
        assert f.__doc__ and f.__doc__.count("\n") == 0 and (f.__doc__[-1] != "."), name

ROWS = [dict(id=f"job_{i}", status="completed", fresh=i) for i in range(5)]
def paged(size=2):
    def answer(req):
        i = int(req.url.params.get("cursor", 0))
        return httpx.Response(200, json=dict(object="list", data=ROWS[i:i+size], has_more=i+size < len(ROWS), next_cursor=str(i+size) if i+size < len(ROWS) else None))
    return answer

def test_lists_go_on_with_the_next_page(both):
    b = both(paged())
    async def all_async():
        return [j.id async for j in b.c.jobs.list(limit=2)], [j.id async for j in await b.c.jobs.list(limit=2)]
    one, two = ([j.id for j in b.c.jobs.list(limit=2)],)*2 if b.kind == "sync" else asyncio.run(all_async())
    assert one == two == [r["id"] for r in ROWS] and [q.url.params.get("cursor") for q in b.seen[:3]] == [None, "2", "4"] and {q.url.params["limit"] for q in b.seen} == {"2"}
    n = len(b.seen)
    page = b.run(lambda c: c.jobs.list())
    assert len(page) == 2 and page.has_more and page[1].fresh == 1 and len(b.seen) == n+1
    assert b.run(lambda c: c.with_raw_response.jobs.list()).parse()[0].id == "job_0"
    for bad in (dict(data=3), [], dict(data=[dict(name="without an id")])):
        with pytest.raises(er.ResponseError, match="no list of Job"): both(httpx.Response(200, json=bad)).run(lambda c: c.jobs.list())
    circle = both(httpx.Response(200, json=dict(data=ROWS[:1], next_cursor="7")))
    async def turn(): return [j async for j in circle.c.jobs.list()]
    with pytest.raises(er.ResponseError, match="circle"): [*circle.c.jobs.list()] if circle.kind == "sync" else asyncio.run(turn())

def test_a_key_is_made_once(both):
    new = lambda c: c.keys.create("web", scopes=["chat"])
    for bad in (httpx.ReadError("gone"), httpx.Response(500), httpx.Response(502)):
        b = both(bad)
        with pytest.raises((er.APIConnectionError, er.InternalServerError)): b.run(new)
        assert len(b.seen) == 1 and "idempotency-key" not in b.seen[0].headers
    b = both(httpx.ConnectError("refused"), httpx.Response(503), dict(id="key_1", key="soma_0123456789abcdef"))
    k = b.run(new)
    assert k.key == "soma_0123456789abcdef" and k.key not in repr(k)+str(k) and len(b.seen) == 3

def test_waiting(both):
    job = lambda s: httpx.Response(200, json=dict(id="job_1", status=s))
    b = both(job("queued"), job("running"), job("failed"))
    assert b.run(lambda c: c.jobs.wait("job_1", every=.25)).status == "failed" and b.slept == [.25, .25]
    with pytest.raises(er.APITimeoutError, match="job_1 is still running after 0.1 s"): both(job("running")).run(lambda c: c.jobs.wait("job_1", timeout=.1))

def test_problems_are_errors(both):
    p = dict(type="about:blank", title="Conflict", status=409, detail="a test of this name is there", code="conflict", request_id="req_9")
    b = both(httpx.Response(409, json=p, headers={"content-type": "application/problem+json", "x-request-id": "req_9"}))
    with pytest.raises(er.ConflictError) as e: b.run(lambda c: c.ab_tests.create(name="tone", template="t"))
    assert (e.value.code, e.value.message, e.value.request_id) == ("conflict", "a test of this name is there", "req_9") and len(b.seen) == 1   # asking again would not free the name
    p = dict(title="Unprocessable", status=422, detail="2 fields are wrong", code="validation", errors=[dict(loc=["body", "scopes", 0], msg="no such scope"), dict(loc=["body", "name"], msg="too long")])
    with pytest.raises(er.ValidationError, match=r"2 fields are wrong \(scopes.0: no such scope; name: too long\)") as e: both(httpx.Response(422, json=p)).run(lambda c: c.keys.create("x", scopes=["y"]))
    assert e.value.errors[1]["msg"] == "too long"

def events(*pairs): return "".join(f"event: {n}\ndata: {json.dumps(d)}\n\n" for n, d in pairs).encode()
TOLD = [("message", dict(id="msg_1", role="user", content="Hi")), ("delta", dict(text="Hel")), ("delta", dict(text="lo")), ("reply", dict(id="msg_2", role="assistant", content="Hello", cost_usd="0.000001")), ("done", {})]

def test_streams_of_events(both):
    fn = lambda c: c.conversations.messages.create("conv_1", "Hi", stream=True)
    s, got = both(lambda req: httpx.Response(200, content=events(*TOLD))).stream(fn)
    assert got == ["", "Hel", "lo", "", ""] and s.done and s.text == s.final.text == "Hello" and s.final.reply.cost_usd == Decimal("0.000001")
    for tail, word in ((events(*TOLD[:3]), "before the answer did"), (events(*TOLD[:3], ("error", dict(title="Bad Gateway", detail="provider died"))), "provider died"), (events(*TOLD[:3])+b"event: delta\ndata: {oops\n\n", "not JSON"), (events(*TOLD[:3], ("reply", [])), "another kind")):
        with pytest.raises(er.StreamError, match=word) as e: both(httpx.Response(200, content=tail)).stream(fn)
        assert e.value.partial == "Hello"
    with pytest.raises(er.NotFoundError): both(httpx.Response(404, json=dict(title="Not Found"))).stream(fn)

def test_numbers_that_json_lacks_are_refused():
    b = Both("sync", GOOD)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(er.SomaAgentError, match="finite"): ask(b.c, temperature=bad)
        with pytest.raises(er.SomaAgentError, match="finite"): b.c.training.start(trainer="sft", config=dict(lr=[bad]))
    assert not b.seen

@pytest.mark.parametrize("status,kind", [(400, er.ValidationError), (401, er.AuthenticationError), (403, er.PermissionDeniedError), (404, er.NotFoundError), (409, er.ConflictError), (413, er.ValidationError), (422, er.ValidationError),
    (429, er.RateLimitError), (500, er.InternalServerError), (501, er.InternalServerError), (529, er.InternalServerError), (302, er.APIError), (418, er.APIError)])
def test_statuses(both, status, kind):
    b = both(httpx.Response(status, json=dict(error=dict(message="because", code="c")), headers={"x-request-id": "req_1"}))
    with pytest.raises(er.SomaAgentError) as e: b.run(ask)
    v = e.value
    assert type(v) is kind and (v.status_code, v.request_id, v.code, v.body["error"]["message"]) == (status, "req_1", "c", "because") and v.response.status_code == status
    assert len(b.seen) == (3 if status in (409, 429, 500, 529) else 1)
    assert str(pickle.loads(pickle.dumps(v))) == str(v)

def test_retries(both):
    b = both(httpx.Response(503), httpx.ConnectError("refused"), GOOD)
    r = b.run(ask)
    assert r.text == "Hi" and r.brand_new == [1] and b.slept == [.5, 1.] and len({q.headers["idempotency-key"] for q in b.seen}) == 1 and len({q.content for q in b.seen}) == 1
    b = both(httpx.Response(429, headers={"retry-after": "7"}), httpx.Response(503, headers={"retry-after-ms": "20"}), GOOD)
    b.run(lambda c: ask(c, idempotency_key="mine"))
    assert b.slept == [7., .02] and {q.headers["idempotency-key"] for q in b.seen} == {"mine"}
    b = both(httpx.ReadError("gone"))
    with pytest.raises(er.APIConnectionError, match="http://gate:1 does not answer: gone"): b.run(lambda c: ask(c.with_options(max_retries=4)))
    assert b.slept == [.5, 1., 2., 4.]

def test_a_pause_beyond_the_deadline_is_not_waited_for(both):
    b = both(httpx.Response(429, headers={"retry-after": "3600"}))
    with pytest.raises(er.RateLimitError) as e: b.run(ask)
    assert e.value.retry_after == 3600 and not b.slept and len(b.seen) == 1

def test_a_body_that_breaks_off_is_asked_for_again(both):
    class Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self): yield b'{"id"'; raise httpx.ReadError("cut")
        async def __aiter__(self):
            yield b'{"id"'
            raise httpx.ReadError("cut")
    b = both(lambda req: httpx.Response(200, stream=Broken()), GOOD)
    assert b.run(ask).text == "Hi" and len(b.seen) == 2

def test_pauses_are_jittered():
    got = [pause(20) for _ in range(200)]
    assert 6 <= min(got) < 6.5 and 7.5 < max(got) <= 8

def test_answers_of_another_kind(both):
    for r in (httpx.Response(200, text="<html>login</html>"), httpx.Response(200, json=[]), httpx.Response(200, json=dict(choices=3)), httpx.Response(204)):
        with pytest.raises(er.ResponseError, match="no ChatCompletion"): both(r).run(ask)

def test_a_redirect_is_an_error_and_the_key_stays_here(both):
    b = both(httpx.Response(307, headers={"location": "https://elsewhere.example/v1"}))
    with pytest.raises(er.APIError, match="elsewhere.example"): b.run(ask)
    assert {q.url.host for q in b.seen} == {"gate"}

def test_streams(both):
    b = both(lambda req: httpx.Response(200, content=STREAM, headers={"x-soma-model": "local/tiny", "x-request-id": "req_1", "x-soma-interaction": "int_1"}))
    s, got = b.stream()
    assert got == ["Hel", "lo", "", ""] and s.done and s.final.text == s.text == "Hello" and s.final.usage.total_tokens == 3 and s.final.choices[0].finish_reason == "stop" and s.response.is_closed
    assert (s.soma.model, s.final.soma.interaction_id) == ("local/tiny", "int_1") and json.loads(b.seen[0].content)["stream_options"] == dict(include_usage=True)
    s, got = b.stream(most=1)
    assert got == ["Hel"] and not s.done and s.response.is_closed
    texts = sse(dict(choices=[dict(index=0, text="a")]), dict(choices=[dict(index=0, text="b", finish_reason="length")]), "[DONE]")
    s, got = both(httpx.Response(200, content=texts)).stream(lambda c: c.completions.create(model="m", prompt="x", stream=True))
    assert got == ["a", "b"] and s.final.text == "ab" and s.final.choices[0].finish_reason == "length"

@pytest.mark.parametrize("tail,word", [(b"", "before the answer did"), (sse(dict(error=dict(message="provider died"))), "provider died"), (sse("{oops"), "not JSON"), (sse(dict(choices=7)), "another kind"), (sse("[1]"), "error")])
def test_streams_that_break(both, tail, word):
    b = both(lambda req: httpx.Response(200, content=sse(chunk("Hel"), chunk("lo"))+tail, headers={"x-request-id": "req_1"}))
    with pytest.raises(er.StreamError, match=word) as e: b.stream()
    assert (e.value.partial, e.value.request_id) == ("Hello", "req_1") and len(b.seen) == 1
    assert pickle.loads(pickle.dumps(e.value)).partial == "Hello"

def test_a_stream_that_is_refused_is_tried_again(both):
    b = both(httpx.Response(503), lambda req: httpx.Response(200, content=STREAM))
    assert b.stream()[1][:2] == ["Hel", "lo"] and b.slept == [.5]

def test_events_are_read_as_the_gateway_writes_them():
    from somaagent.llm.sse import Decoder, Gather, chunks, encode
    rng = random.Random(0)
    raw = b"".join(encode(t) for t in ("a", "x\ny", '{"b": "\u2028 \u00e9\U0001f600"}')) + b": note\r\nevent: e\r\ndata:tight\r\n\r\ndata\n\ndatum: no\n\ndata: z\r\r"
    want = [d for _, d in Decoder().feed(raw)]
    assert Lines().feed(raw) == want and len(want) > 4
    for _ in range(200):
        cuts = sorted(rng.sample(range(len(raw)), rng.randint(0, 12)))
        d = Lines()
        assert sum((d.feed(raw[i:j]) for i, j in zip([0, *cuts], [*cuts, len(raw)])), []) == want
    with pytest.raises(er.StreamError, match="more than 100 bytes"): Lines(100).feed(b"data: "+b"x"*200)
    calls = [dict(id="t1", type="function", function=dict(name="f", arguments='{"a": 1}')), dict(id="t2", type="function", function=dict(name="g", arguments=""))]
    for m in (dict(role="assistant", content="some longer text than one piece"), dict(role="assistant", content=None, tool_calls=calls)):
        ours, theirs = Gathered(), Gather()
        for c in chunks(dict(id="c", created=1, model="m", choices=[dict(index=0, message=m, finish_reason="stop")], usage=dict(prompt_tokens=1, completion_tokens=1, total_tokens=2))): ours.add(c); theirs.add(c)
        assert ours.whole().model_dump(exclude_none=True, exclude={"object"}) == {k: v for k, v in json.loads(json.dumps(theirs.completion(), default=str)).items() if k != "object"} | dict(choices=[dict(index=0, finish_reason="stop", message={k: v for k, v in theirs.completion()["choices"][0]["message"].items() if v is not None})])

def test_no_key_is_shown():
    b = Both("sync", httpx.Response(401, json=dict(error=dict(message="no"))))
    with pytest.raises(er.AuthenticationError, match="soma login") as e: b.run(ask)
    seen = [repr(b.c), str(b.c.__dict__), repr(b.c.credentials), str(e.value), repr(e.value), repr(e.value.response.request.headers), "".join(traceback.format_exception(e.value)), repr(b.c.chat)]
    assert not [s for s in seen if KEY in s or KEY[5:20] in s]
    for bad in ("soma_a b", "soma_x\ny", " ", "schlüssel"):
        with pytest.raises(er.CredentialsError) as e: SomaAgent(bad, "http://gate")
        assert not bad.strip() or bad not in str(e.value)

def test_options():
    b = Both("sync", httpx.Response(503))
    for kw in (dict(timeout=0), dict(timeout=float("nan")), dict(connect_timeout=-1), dict(max_retries=-1), dict(max_retries=1.5)):
        for make in (lambda: b.c.with_options(**kw), lambda: SomaAgent(KEY, **kw)):
            with pytest.raises(er.SomaAgentError, match=next(iter(kw))): make()
    with pytest.raises(er.SomaAgentError, match="timeout"): ask(b.c, timeout=0)
    with pytest.raises(er.SomaAgentError, match="x-soma-session"): ask(b.c, session="a\r\nx-evil: 1")
    for fn in (lambda: b.c.models.get(".."), lambda: b.c.feedback.create(""), lambda: b.c.feedback.create("int_1"), lambda: b.c.feedback.create("int_1", thumbs=True, kind="edit")):
        with pytest.raises(er.SomaAgentError): fn()
    assert not b.seen
    ask_ = b.c.with_options(max_retries=0, headers={"X-One": "1"}, timeout=3)
    with pytest.raises(er.InternalServerError): ask(ask_)
    assert len(b.seen) == 1 and b.seen[0].headers["x-one"] == "1" and b.seen[0].extensions["timeout"]["read"] <= 3 and b.c.max_retries == 2 and not b.c.headers
    ask_.close()
    assert not b.c._http.is_closed

def test_credentials(tmp_path, monkeypatch):
    for k in ("SOMA_API_KEY", "SOMA_BASE_URL", "SOMA_STORES_HOME"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path/"config"))
    deep = tmp_path/"a/b"; deep.mkdir(parents=True); monkeypatch.chdir(deep)
    with pytest.raises(er.CredentialsError, match="SOMA_API_KEY.*soma login.*soma serve"): SomaAgent()
    credentials.write(credentials.user_file(), credentials.Credentials("soma_of_the_user", "https://far.example"))
    assert SomaAgent().base_url == "https://far.example"
    credentials.write(tmp_path/".soma/credentials.json", credentials.Credentials("soma_of_this_folder", "http://localhost:1"))
    assert SomaAgent().base_url == "http://localhost:1" and SomaAgent(base_url="https://far.example/v1/").credentials.api_key == "soma_of_the_user"
    monkeypatch.setenv("SOMA_API_KEY", "soma_of_the_environment")
    assert SomaAgent().base_url == credentials.DEFAULT_URL     # never to the address that a file in a folder names
    monkeypatch.delenv("SOMA_API_KEY"); monkeypatch.setenv("SOMA_BASE_URL", "http://evil.example")
    with pytest.raises(er.CredentialsError, match="evil.example"): SomaAgent()
    (tmp_path/".soma/credentials.json").write_text("{"); monkeypatch.delenv("SOMA_BASE_URL")
    with pytest.raises(er.CredentialsError, match="cannot be used"): SomaAgent()
    for u in ("ftp://x", "x", "http://", "http://a:b@c", "http://x:99999"):
        with pytest.raises(er.CredentialsError): SomaAgent("k", u)

def test_it_stands_alone():
    code = "import sys; before = set(sys.modules); import somaagent.sdk; print(sorted({m.partition('.')[0] for m in set(sys.modules)-before if m.partition('.')[0] not in sys.stdlib_module_names}), sorted(m for m in sys.modules if m.startswith('somaagent.')))"
    third, house = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("] ")
    third, house = json.loads((third+"]").replace("'", '"')), json.loads(house.replace("'", '"'))
    needs = {"somaagent", "httpx", "httpcore", "h11", "h2", "hpack", "hyperframe", "anyio", "sniffio", "idna", "certifi", "socksio", "brotli", "_brotli", "brotlicffi", "zstandard", "click", "rich", "pygments", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    assert {m for m in third if not m.startswith("_")} <= needs and all(m.startswith("somaagent.sdk") for m in house)

class Slow(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def do_GET(self):
        if self.path == "/v1/models": time.sleep(12.)
        self.send_response(200); self.send_header("content-length", "1000"); self.end_headers()
        try:
            for _ in range(160): self.wfile.write(b" "); self.wfile.flush(); time.sleep(.1)
        except OSError: pass

@pytest.fixture(scope="module")
def slow():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    s.daemon_threads = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_address[1]}"
    s.shutdown(); s.server_close()

@pytest.mark.parametrize("cls", [SomaAgent, AsyncSomaAgent])
@pytest.mark.parametrize("fn", [lambda c: c.health(), lambda c: c.models.list()])
def test_deadlines_hold_for_answers_that_drip(slow, cls, fn):
    async def go():
        c = cls(KEY, slow, timeout=.4)
        try: return await _all(fn(c))
        finally: await _all(c.close())
    t = time.monotonic()
    with pytest.raises(er.APITimeoutError, match="in time"): asyncio.run(go())
    assert time.monotonic()-t < 9  # not cut off, it would take twelve or more

def test_nobody_there():
    with SomaAgent(KEY, "http://127.0.0.1:9", max_retries=0) as c, pytest.raises(er.APIConnectionError, match="127.0.0.1:9 does not answer"): c.health()

def clean(home): return {k: v for k, v in os.environ.items() if k not in ("SOMA_API_KEY", "SOMA_BASE_URL")} | dict(SOMA_STORES_HOME=str(home), XDG_CONFIG_HOME=str(home/"config"))

def soma(home, group, *args, stdin="", **env):
    "(exit code or error, stdout, stderr) of a command, in this process"
    cmd = getattr(importlib.import_module(f"somaagent.cli.{group}"), group)
    r = CliRunner().invoke(cmd, list(args), input=stdin, env={"SOMA_API_KEY": None, "SOMA_BASE_URL": None} | {k: v for k, v in clean(home).items() if k.startswith(("SOMA", "XDG"))} | env)
    return r.exception if r.exception and not isinstance(r.exception, SystemExit) else r.exit_code, r.stdout, r.stderr

@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    "`soma serve` in a process of its own; it loads its models beside the first tests"
    home = tmp_path_factory.mktemp("sdk")/"home"
    p = subprocess.Popen([sys.executable, "-c", "from somaagent.cli.serve import serve; serve()", "--port", "0", "--grace", "2"], stdout=subprocess.PIPE, stderr=open(home.parent/"err", "w"), text=True, env=clean(home) | dict(SOMA_STORES_IDLE_S="5"))
    p.home = home
    yield p
    p.terminate()
    try: p.wait(30)
    except subprocess.TimeoutExpired: p.kill(); p.wait(10)

@pytest.fixture(scope="module")
def gate(process):
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("Ready"): break
    assert said and said[-1].startswith("Ready"), (process.home.parent/"err").read_text()[-2000:]
    process.cred = credentials.read(process.home/"credentials.json")
    return process

class Noted:
    "A client that writes down which of its methods were called; a result that is to be awaited is awaited"
    def __init__(self, x, seen, at=""): self._x, self._seen, self._at = x, seen, at
    def __getattr__(self, n):
        from somaagent.sdk.calls import Resource
        v, name = getattr(self._x, n), f"{self._at}{n}"
        if isinstance(v, Resource): return Noted(v, self._seen, name+".")
        if not callable(v): return v
        async def called(*args, **kw):
            self._seen.add(name)
            return await _all(v(*args, **kw))
        return called

async def all_of(page): return [x for x in page] if hasattr(page, "__iter__") else [x async for x in page]

async def models_part(c, home, tag):
    assert (await c.health()).status == "ok" and "admin" in (await c.me()).scopes
    assert "local/tiny" in [m.id for m in await c.models.list()] and (await c.models.get("tiny")).id == "local/tiny"
    r = await c.chat.completions.create(model="tiny", messages="Hi", max_tokens=8, session="s-1")
    assert r.text and r.soma.model == "local/tiny" and r.soma.cost_usd == 0 and r.soma.request_id and r.usage.completion_tokens
    assert (await c.feedback.create(r, rating=5, comment="good")).events == 2
    s = await c.chat.completions.create(model="tiny", messages="Hi", max_tokens=8, stream=True)
    assert (await _all(s.finish())).text == r.text and s.final.usage.total_tokens == r.usage.total_tokens and s.soma.interaction_id != r.soma.interaction_id
    assert (await c.feedback.create(s.final, thumbs=True)).events == 1
    assert (await c.completions.create(model="tiny", prompt="Hi", max_tokens=8)).text == r.text
    e = await c.embeddings.create(model="minilm", input=["one", "two"])
    assert [len(v) for v in e.vectors] == [384, 384] and abs(sum(x*x for x in e.vectors[0])-1) < 1e-3
    one, two = [await c.chat.completions.create(model="tiny", messages="Hi", max_tokens=4, idempotency_key=f"k-{tag}") for _ in range(2)]
    assert two.soma.replayed and not one.soma.replayed and one.soma.interaction_id == two.soma.interaction_id

async def talk_part(c, home, tag):
    t = await c.conversations.create(title=f"Parcels {tag}", model="tiny", user="u-1", system="Be brief.", meta=dict(kind="test"))
    x = await c.conversations.messages.create(t, "Where is my parcel?", max_tokens=8, idempotency_key=f"m-{tag}")
    again = await c.conversations.messages.create(t, "Where is my parcel?", max_tokens=8, idempotency_key=f"m-{tag}")
    assert x.text and x.reply.model == "local/tiny" and x.reply.cost_usd == 0 and x.message.content == "Where is my parcel?" and again.reply.id == x.reply.id and again.soma.replayed
    s = await c.conversations.messages.create(t, "And now?", max_tokens=8, stream=True)
    assert (await _all(s.finish())).text == s.text != "" and s.final.reply.role == "assistant" and s.done
    said = await all_of(await c.conversations.messages.list(t, limit=2))
    assert [m.role for m in said] == ["system", "user", "assistant", "user", "assistant"] and [m.number for m in said] == sorted(m.number for m in said)
    assert (await c.conversations.get(t.id)).messages == 5 and t.id in [x.id for x in await all_of(await c.conversations.list(user="u-1", limit=1))]
    assert f"{t.id}" in {h.conversation for h in await all_of(await c.conversations.search("parcel"))}
    await c.conversations.delete(t)
    with pytest.raises(er.NotFoundError) as e: await c.conversations.get(t)
    assert e.value.code == "not_found" and e.value.request_id

async def agents_part(c, home, tag):
    a = await c.agents.create(f"desk-{tag}", model="local/tiny", tools=["calculator"], max_steps=2, budget_usd=.05)
    assert (await c.agents.get(a.name)).id == a.id and a.name in [x.name for x in await all_of(await c.agents.list())] and a.spec.tools == ["calculator"]
    b = await c.agents.update(a, name=a.name, model="local/tiny", tools=["calculator"], max_steps=1, max_tokens=8)
    assert b.revision == 2 and b.spec.max_steps == 1
    run = await c.agents.run(a, "What is 17 * 23?")
    assert run.agent == a.name and run.finish and len(run.steps) == 1 and run.cost_usd == 0 and run.trace_id
    s = await c.agents.run(a, "What is 17 * 23?", stream=True)
    assert (await _all(s.finish())).steps[0].model and s.done
    await c.agents.delete(a)
    with pytest.raises(er.APIError): await c.agents.run(a, "Are you there?")

def capsule(folder):
    from somaagent.runs.capsule import build
    import nbformat as nbf
    folder.mkdir(exist_ok=True)
    nb = nbf.v4.new_notebook(cells=[nbf.v4.new_markdown_cell("# Count"), nbf.v4.new_code_cell("n = 3", metadata=dict(tags=["parameters"])), nbf.v4.new_code_cell("sum(range(n))")])
    nbf.write(nb, folder/"notebook.ipynb")
    (folder/"capsule.yaml").write_text("name: count\nversion: 1.0.0\ndescription: Counts\nnotebook: notebook.ipynb\ninputs:\n  n: {type: int, default: 3}\n")
    return build(folder, folder.with_suffix(".zip"))

def dataset(home, name):
    "A registered dataset"
    import polars as pl
    from somaagent.store.state import DatasetRow, State
    d = home/"datasets"/name
    d.mkdir(parents=True)
    for f in ("train", "validation"): pl.DataFrame(dict(prompt=["Where?"]*4, answer=["There."]*4)).write_parquet(d/f"{f}.parquet")
    st = State(f"sqlite:///{home/'state.db'}")
    with st.session() as s: s.add(DatasetRow(name=name, hash=name, path=str(d)))
    st.close()
    return name

async def work_part(c, home, tag):
    w = {x.name: x for x in await all_of(await c.workflows.list())}
    assert "improve" in w and (await c.workflows.get("improve")).stages == w["improve"].stages != []
    job = await c.workflows.start("improve", dict(seed=7), again=True)
    assert (job.kind, job.over) == ("workflow", False) and (await c.workflows.status(job)).id == job.id and (await c.jobs.get(job)).name == "improve"
    await c.workflows.cancel(job)
    assert (await c.jobs.wait(job, every=.1, timeout=30)).status == "cancelled" and job.id in [j.id for j in await all_of(await c.jobs.list(kind="workflow", limit=1))]
    with pytest.raises(er.ValidationError): await c.workflows.start("improve", dict(no_such=1))
    assert (await c.jobs.cancel(job)).status == "cancelled"

async def capsules_part(c, home, tag):
    cap = await c.capsules.install(capsule(home.parent/f"count-{tag}"))
    assert (await c.capsules.get("count")).hash == cap.hash and "count" in [x.name for x in await all_of(await c.capsules.list())]
    job = await c.capsules.execute("count", dict(n=4))
    assert job.kind == "capsule"
    await c.jobs.cancel(job)
    assert (await c.jobs.wait(job, every=.1, timeout=30)).over
    await c.capsules.delete("count")
    with pytest.raises(er.NotFoundError): await c.capsules.get("count")

async def training_part(c, home, tag):
    job = await c.training.start(recipe="quick", dataset=dataset(home, f"data-{tag}"), name=f"desk-{tag}", again=True, worker=False)
    assert not job.over and (await c.training.status(job)).id == (await c.training.get(job.id)).id == job.id and job.id in [j.id for j in await all_of(await c.training.list(limit=1))]
    assert (await c.training.logs(job, tail=5)).id == job.id and await all_of(await c.training.metrics(job)) == []
    await c.training.cancel(job)
    assert (await c.training.wait(job, every=.1, timeout=20)).status == "cancelled"
    with pytest.raises(er.ValidationError): await c.training.start(trainer="sft", dataset="../../etc/passwd")

def weights(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps(dict(w=dict(dtype="U8", shape=[len(text)], data_offsets=[0, len(text)]))).encode()
    (folder/"adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little")+head+text.encode())
    return folder

async def releases_part(c, home, tag):
    from somaagent.release.registry import Registry
    from somaagent.store.artifacts import Artifacts
    from somaagent.store.state import State
    st, name = State(f"sqlite:///{home/'state.db'}"), f"desk-{tag}"
    reg = Registry(st, Artifacts(home/"artifacts"), home/"keys")
    reg.ensure_base(name, "tiny")
    reg.register(name, weights(home.parent/f"w-{tag}", tag), "tiny", "ds", {})
    st.close()
    m = await c.models.describe(name)
    assert (m.production, m.versions) == ("1.0.0", 2) and name in [x.name for x in await all_of(await c.models.registered())]
    vs = await all_of(await c.models.versions(name, limit=1))
    assert len(vs) == 2 and (await c.models.version(name, "production")).version == "1.0.0"
    assert (await c.models.compare(name, vs[0].version, "1.0.0")).facts
    assert not (await c.models.promote(name, vs[0].version)).promoted
    done = await c.models.promote(name, vs[0].version, force="a test")
    assert done.promoted and done.version.status == "production" and "Forced" in done.sentence
    assert (await c.models.rollback(name, "only a test")).version.version == "1.0.0" and len(await all_of(await c.models.history(name))) >= 4
    d = await c.deployments.create(name, alias=f"try-{tag}")
    assert d.status == "preparing" and (await c.deployments.get(d)).alias == d.alias and d.id in [x.id for x in await all_of(await c.deployments.list())]
    assert not (await c.deployments.health(d)).ok
    with pytest.raises(er.InternalServerError) as e: await c.deployments.create(name, target="kubernetes")
    assert e.value.status_code == 501
    with pytest.raises(er.ConflictError): await c.deployments.create(name, alias=f"try-{tag}")
    assert (await c.deployments.delete(d)).status == (await c.deployments.wait(d, every=.1, timeout=20)).status == "removed"

async def ab_part(c, home, tag):
    t = await c.ab_tests.create(name=f"tone-{tag}", arms=[dict(name="today", model="local/tiny"), dict(name="brief", model="local/tiny")], metrics=[dict(name="success", mde=.02)], population=dict(app="nobody"), question="Is brief better?")
    assert t.status == "draft" and "start" in t.possible and (await c.ab_tests.get(t.name)).id == t.id and t.id in [x.id for x in await all_of(await c.ab_tests.list(status="draft"))]
    t = await c.ab_tests.start(t, reason="go")
    with pytest.raises(er.ConflictError): await c.ab_tests.stop(t, revision=t.revision-1)
    assert (await c.ab_tests.pause(t)).status == "paused" and (await c.ab_tests.resume(t)).status == "running"
    assert (await c.ab_tests.results(t)).verdict and (await c.ab_tests.analyze(t, decide=False)).look is not None
    assert (await c.ab_tests.stop(t, reason="enough")).status == "stopped"
    assert (await c.ab_tests.decide(t, "no difference", "Nobody came.")).decision["verdict"] == "no difference"
    assert (await c.ab_tests.archive(t)).id == t.id and {"create", "start", "pause", "resume", "stop", "decide", "archive"} <= {h.action for h in await all_of(await c.ab_tests.history(t))}
    with pytest.raises(er.NotFoundError): await c.ab_tests.get("no such test")

async def prompts_part(c, home, tag):
    n = f"hi-{tag}"
    p = await c.prompts.save(n, text="Hi {{ who }}", variables=dict(who=dict(type="str")), note="first")
    assert p.version == 1 and (await c.prompts.get(n)).hash == p.hash and {"assistant", n} <= {x.name for x in await all_of(await c.prompts.list(limit=2))}
    l = await c.prompts.label(n, "production", 1, reason="good")
    assert (l.version, l.before) == (1, None) and (await all_of(await c.prompts.versions(n)))[0].labels == ["production"]
    r = await c.prompts.render(n, ref="production", values=dict(who="{{ 7*7 }}"))
    assert r.messages[0].content == "Hi {{ 7*7 }}" and r.prompt == f"{n}@1"
    with pytest.raises(er.APIError): await c.prompts.render(n, values=dict(whom="x"))

async def books_part(c, home, tag):
    k = await c.keys.create(f"web-{tag}", scopes=["chat"], limits=dict(rpm=100), days=1)
    assert k.key.startswith("soma_") and k.key not in repr(k) and (await c.keys.get(k)).key is None and k.id in [x.id for x in await all_of(await c.keys.list(limit=1))]
    assert (await c.keys.revoke(k, reason="a test")).revoked_at
    assert [e.target for e in await all_of(await c.audit.list(action="key.revoke"))][0] == k.id
    for _ in range(100):
        u = await c.usage.get(by=("day", "model"))
        if u.total.requests: break
        time.sleep(.1)
    assert u.total.requests >= 1 and u.total.cost_usd == 0 and {x.model for x in u} >= {"local/tiny"}

PARTS = [models_part, talk_part, agents_part, work_part, capsules_part, training_part, releases_part, ab_part, prompts_part, books_part]
SEEN = {}

@pytest.mark.parametrize("part", PARTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("cls", [SomaAgent, AsyncSomaAgent])
def test_against_the_gateway(gate, cls, part):
    async def go():
        c = cls(gate.cred.api_key, gate.cred.base_url, timeout=60)
        try: await part(Noted(c, SEEN.setdefault(cls, set())), gate.home, cls.__name__[:4].lower())
        finally: await _all(c.close())
    asyncio.run(go())

@pytest.mark.parametrize("cls", [SomaAgent, AsyncSomaAgent])
def test_every_method_was_called_against_the_gateway(gate, cls):
    if set(SEEN) != {SomaAgent, AsyncSomaAgent}: pytest.skip("only a part of this file runs")
    assert SEEN[cls] == set(CALLS), set(CALLS) ^ SEEN[cls]

def test_every_route_of_the_platform_has_a_method(gate):
    doc = httpx.get(gate.cred.base_url+"/api/v1/openapi.json").json()
    have = {(m.upper(), p.removeprefix("/api/v1")) for p, ops in doc["paths"].items() for m in ops}
    sent = []
    for _, fn in flat:
        b = Both("sync", httpx.Response(418))
        with pytest.raises(er.APIError): b.run(fn)
        sent.append((b.seen[0].method, b.seen[0].url.raw_path.decode().partition("?")[0].removeprefix("/api/v1")))
    fits = lambda r: [s for s in sent if s[0] == r[0] and re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(r[1])), s[1])]
    lack = {r for r in have if not fits(r)} - {("POST", "/models/compare"), ("POST", "/feedback")}   # said by GET, and by /v1/feedback
    assert not lack and have, f"the client has no method for {sorted(lack)}"

@pytest.mark.parametrize("cls", [SomaAgent, AsyncSomaAgent])
def test_errors_of_the_gateway(gate, cls):
    async def go():
        c = Noted(cls(gate.cred.api_key, gate.cred.base_url, timeout=60), set())
        for fn, kind in ((lambda: c.models.get("nope"), er.NotFoundError), (lambda: c.chat.completions.create(model="tiny", messages=[]), er.ValidationError), (lambda: c.feedback.create("int_x", rating=99), er.ValidationError), (lambda: c.conversations.get("nope"), er.NotFoundError), (lambda: c.conversations.create(title=7), er.ValidationError)):
            with pytest.raises(kind) as err: await fn()
            assert err.value.request_id
        await c.close()
        bad = Noted(cls("soma_wrong-key", gate.cred.base_url), set())
        for fn in (bad.models.list, bad.me):
            with pytest.raises(er.AuthenticationError): await fn()
        await bad.close()
    asyncio.run(go())

def test_the_guide_has_an_example_of_every_method():
    nb = json.loads((pathlib.Path(__file__).parents[1]/"nbs/sdk/guide.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code")
    lack = [m for m in CALLS if f".{m}(" not in text]
    assert not lack, f"nbs/sdk/guide.ipynb shows no {lack}"

def test_commands_against_the_gateway(gate, tmp_path):
    code, out, err = soma(gate.home, "chat", "--max-tokens", "8", "--json", "Where is", "my order?")
    told = json.loads(out)
    assert code == 0 and told["model"] == "local/tiny" and told["answer"] and told["interaction_id"], err
    plain = subprocess.run([sys.executable, "-c", "from somaagent.cli.chat import chat; chat()", "--max-tokens", "8"], input="Where is my order?", capture_output=True, text=True, timeout=60, env=clean(gate.home))
    assert plain.returncode == 0 and plain.stdout.strip() == told["answer"].strip(), plain.stderr
    code, out, err = soma(tmp_path, "login", "--base-url", gate.cred.base_url, "--json", stdin=gate.cred.api_key+"\n")
    file = tmp_path/"credentials.json"
    assert code == 0 and "local/tiny" in json.loads(out)["models"] and file.stat().st_mode & 0o777 == 0o600 and gate.cred.api_key not in out+err, err
    assert "does not take this key" in str(soma(tmp_path, "login", "--base-url", gate.cred.base_url, stdin="soma_wrong\n")[0]) and credentials.read(file).api_key == gate.cred.api_key
    assert f"(from {file})" in soma(tmp_path, "login", "--show")[1]
    assert "does not know this key" in str(soma(gate.home, "chat", "Hi", SOMA_API_KEY="soma_wrong", SOMA_BASE_URL=gate.cred.base_url)[0])
    assert "no such model" in str(soma(gate.home, "chat", "-m", "nope", "Hi")[0])
    assert "--port" in str(soma(tmp_path, "serve", "--port", gate.cred.base_url.rpartition(":")[2])[0])

def test_a_conversation_against_the_gateway(gate, monkeypatch, capsys):
    from somaagent.cli.chat import converse
    lines, messages = iter(["Where is my order?", "/model nope", "And now?", "/model tiny", "/good", "/good now", "/oops", "Thanks", "/new", "/quit"]), []
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    grown = []
    class Seen(list):
        def append(self, m): super().append(m); grown.append(m["role"])
    messages = Seen()
    with SomaAgent(gate.cred.api_key, gate.cred.base_url) as c: converse(c, "tiny", messages, dict(max_tokens=6))
    out, err = capsys.readouterr()
    assert grown == ["user", "assistant", "user", "user", "assistant"] and messages == [] and "no such model" in err and "good: done" in err and "/quit" in err and out.strip()

def test_commands_without_a_gateway(tmp_path):
    e, out, err = soma(tmp_path, "chat", "Hi", SOMA_API_KEY=KEY, SOMA_BASE_URL="http://127.0.0.1:9")
    assert "no gateway answers" in str(e) and "soma serve" in str(e) and KEY not in str(e)+out+err
    assert soma(tmp_path, "chat", "--json", SOMA_API_KEY=KEY)[0] == 2 and soma(tmp_path, "serve", "--json")[0] == 2
    assert "soma_" not in soma(tmp_path, "login", "--show", "--json", SOMA_API_KEY="short-key")[1] and "there is no key" in str(soma(tmp_path, "login", "--show")[0])
