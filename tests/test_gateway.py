"""The gateway as a process on loopback, asked by the official clients and by hand; behind it a provider that misbehaves on demand."""
import asyncio, contextlib, json, os, signal, socket, stat, subprocess, sys, threading, time
from pathlib import Path

import aiohttp, pytest

sys.path.insert(0, str(Path(__file__).parent/"fakes"))
from upstream import Fake

CODE = "from somaagent.serve.server import serve; serve(port=0, ship=False, warm=False, grace=5)"
CONFIG = """
providers:
  fake: {{base_url: 'http://127.0.0.1:{port}/v1', key_env: FAKE_KEY, stall_s: 0.4, timeout_s: 1.5, tries: 2}}
  once: {{base_url: 'http://127.0.0.1:{port}/v1', stall_s: 0.4, timeout_s: 0.5, tries: 1}}
  slow: {{base_url: 'http://127.0.0.1:{port}/v1', timeout_s: 20}}
  claude: {{kind: anthropic, base_url: 'http://127.0.0.1:{port}', key_env: FAKE_KEY}}
  gone: {{base_url: 'http://127.0.0.1:9/v1', tries: 1, connect_s: 0.3}}
  refusing: {{base_url: 'http://127.0.0.1:{port}/v1'}}
models:
  fake/echo: {{price: {{input: 1, output: 2}}}}
  fake/other: {{price: {{input: 10, output: 20}}}}
  gone/echo: {{fallbacks: [refusing/status-500, fake/echo]}}
  refusing/status-401: {{fallbacks: [fake/echo]}}
  claude/sonnet: {{}}
  fake/vectors: {{kind: embed}}
aliases: {{small: fake/echo}}
limits: {{body_bytes: 100000, body_s: 0.7, header_s: 0.7, concurrent: 40, streams: 12}}
"""

class Gate:
    def __init__(self, home, port):
        self.home = home
        home.mkdir(exist_ok=True)
        (home/"gateway.yaml").write_text(CONFIG.format(port=port))
        self.p = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=open(home/"err", "w"), text=True, env={**os.environ, "SOMA_STORES_HOME": str(home), "FAKE_KEY": "sk-fake"})
        self.said = []
        for line in self.p.stdout:
            self.said.append(line)
            if line.startswith("Ready"): break
        assert self.said and self.said[-1].startswith("Ready"), (home/"err").read_text()[-3000:]
        self.url = self.said[-1].split()[1].removesuffix("/v1")
        self.cred = json.loads((home/"credentials.json").read_text())
        self.key, self.port = self.cred["api_key"], int(self.url.rpartition(":")[2])
        self.auth = {"authorization": f"Bearer {self.key}"}
    def rows(self):
        out = []
        for f in sorted(self.home.glob("spool/sp_*/*.jsonl"))+sorted(self.home.glob("spool/sp_*/*.open")): out += [json.loads(l) for l in f.read_text().split("\n")[:-1]]
        return out
    def row(self, ident, seconds=20):
        end = time.monotonic()+seconds
        while time.monotonic() < end:
            if got := [r for r in self.rows() if r.get("id") == ident]: return got[0]
            time.sleep(.03)
        raise AssertionError(f"{ident} was not logged")
    def ask(self, body, path="/v1/chat/completions", method="POST", **headers):
        "(status, headers, text)"
        async def go():
            async with aiohttp.ClientSession() as s, s.request(method, self.url+path, data=body if isinstance(body, bytes) else json.dumps(body), headers={**self.auth, **headers}) as r: return r.status, r.headers, await r.text()
        return asyncio.run(go())

def talk(model, text="Hi", **kw): return dict(model=model, messages=[dict(role="user", content=text)], **kw)
TOOLS = [dict(type="function", function=dict(name="order", parameters=dict(type="object", properties=dict(id=dict(type="integer")))))]

@pytest.fixture(scope="module")
def fake(): return Fake().start()

@pytest.fixture(scope="module")
def gate(fake, tmp_path_factory):
    g = Gate(tmp_path_factory.mktemp("gate")/"home", fake.port)
    def load():      # loads the model beside the other tests
        with contextlib.suppress(aiohttp.ClientError): g.ask(talk("tiny", max_tokens=1))
    threading.Thread(target=load, daemon=True).start()
    yield g
    if g.p.poll() is None: g.p.kill()
    g.p.wait(30)

def test_the_first_start_makes_a_key_and_shows_it_once(gate):
    assert gate.key in gate.said[1] and gate.cred["base_url"] == gate.url
    assert stat.S_IMODE((gate.home/"credentials.json").stat().st_mode) == 0o600
    assert gate.key not in (gate.home/"state.db").read_bytes().decode("latin-1")

def test_openai_client(gate):
    from openai import OpenAI
    c = OpenAI(base_url=gate.url+"/v1", api_key=gate.key, max_retries=0)
    raw = c.chat.completions.with_raw_response.create(**talk("small"), user="ann", metadata={"page": "7"})
    got = raw.parse()
    assert got.choices[0].message.content == "You said: Hi" and got.usage.prompt_tokens == 11
    assert (raw.headers["x-soma-model"], raw.headers["x-soma-route"]) == ("fake/echo", "alias") and float(raw.headers["x-soma-cost-usd"]) == (11*1+7*2)/1e6
    row = gate.row(raw.headers["x-soma-interaction"])
    assert (row["prompt"], row["answer"], row["user_id"], row["status"], row["prompt_tokens"], row["meta"]["page"], row["cost_usd"]) == ("Hi", "You said: Hi", "ann", "ok", 11, "7", "0.000025000")
    chunks = list(c.chat.completions.create(**talk("fake/echo"), stream=True))
    assert "".join(x.choices[0].delta.content or "" for x in chunks) == "w0 w1 w2 " and chunks[-1].choices[0].finish_reason == "stop"
    assert list(c.chat.completions.create(**talk("fake/echo"), stream=True, stream_options=dict(include_usage=True)))[-1].usage.completion_tokens == 7
    assert c.chat.completions.create(**talk("fake/echo"), tools=TOOLS).choices[0].message.tool_calls[0].function.name == "order"
    parts = [x.choices[0].delta.tool_calls for x in c.chat.completions.create(**talk("fake/echo"), tools=TOOLS, stream=True) if x.choices[0].delta.tool_calls]
    assert "".join(p[0].function.arguments or "" for p in parts) == '{"id": 7}'
    assert c.completions.create(model="fake/echo", prompt="Hi").choices[0].text == "You said: Hi"
    assert "".join(x.choices[0].text for x in c.completions.create(model="fake/echo", prompt="Hi", stream=True)) == "w0 w1 w2 "
    assert c.embeddings.create(model="fake/vectors", input=["a", "b"]).data[1].embedding == [.5, -.25]
    assert "fake/echo" in [m.id for m in c.models.list()] and c.models.retrieve("small").id == "fake/echo"
    assert c.chat.completions.create(**talk("claude/sonnet")).choices[0].message.content == "Bonjour"
    assert "".join(x.choices[0].delta.content or "" for x in c.chat.completions.create(**talk("claude/sonnet"), stream=True) if x.choices) == "Bonjour"

def test_openai_clients_errors(gate):
    import openai
    c = openai.OpenAI(base_url=gate.url+"/v1", api_key=gate.key, max_retries=0)
    for kind, kw in ((openai.NotFoundError, talk("no-such-model")), (openai.BadRequestError, dict(model="small", messages=[])), (openai.BadRequestError, talk("fake/status-400")), (openai.RateLimitError, talk("fake/status-429")), (openai.InternalServerError, talk("fake/status-500"))):
        with pytest.raises(kind): c.chat.completions.create(**kw)
    with pytest.raises(openai.AuthenticationError): openai.OpenAI(base_url=gate.url+"/v1", api_key="soma_wrong", max_retries=0).models.list()
    with pytest.raises(openai.APIError, match="broke off"): list(c.chat.completions.create(**talk("fake/polite-cut"), stream=True))

def test_anthropic_client(gate):
    import anthropic
    c = anthropic.Anthropic(base_url=gate.url, api_key=gate.key, max_retries=0)
    ask = dict(model="small", max_tokens=50, messages=[dict(role="user", content="Hi")])
    m = c.messages.create(**ask, system="Be kind.")
    assert (m.content[0].text, m.stop_reason, m.usage.input_tokens) == ("You said: Hi", "end_turn", 11)
    with c.messages.stream(**ask) as s: assert "".join(s.text_stream) == "w0 w1 w2 " and s.get_final_message().usage.output_tokens == 7
    tools = [dict(name="order", input_schema=dict(type="object", properties=dict(id=dict(type="integer"))))]
    with c.messages.stream(**ask, tools=tools) as s: b = s.get_final_message().content[0]
    assert (b.type, b.name, b.input) == ("tool_use", "order", {"id": 7})
    with pytest.raises(anthropic.NotFoundError): c.messages.create(**dict(ask, model="nobody"))
    with pytest.raises(anthropic.AuthenticationError): anthropic.Anthropic(base_url=gate.url, api_key="x", max_retries=0).messages.create(**ask)

@pytest.mark.parametrize("body,status", [(b"", 400), (b"{", 400), (b"[]", 400), (b"\xff\xfe", 400), (b'{"model": NaN}', 400), (b"["*60000, 400), (b'{"model": "small"}', 400), (b"x"*100001, 413), (json.dumps(talk("small", temperature=9)).encode(), 400), (json.dumps(talk("a\r\nx-evil: 1/b")).encode(), 404), (json.dumps(talk("fake/\r\nx-evil: 1")).encode(), 404)])
def test_malformed_bodies(gate, body, status):
    got, headers, text = gate.ask(body)
    assert got == status and json.loads(text)["error"]["message"] and "x-evil" not in headers
    if status == 400: assert json.loads(text)["error"]["type"] == "invalid_request_error"

def test_paths_methods_and_forms(gate):
    assert gate.ask(b"", "/nowhere")[0] == 404 and gate.ask(b"", "/v1/chat/completions", "GET")[0] == 405
    assert gate.ask(b"", "/healthz", "GET", authorization="")[0] == 200 and json.loads(gate.ask(b"", "/readyz", "GET")[2])["status"] == "ready"
    assert gate.ask(b"", "/v1/models", "GET", authorization="")[0] == 401
    status, headers, text = gate.ask(talk("small"), **{"x-request-id": "mine-7"})
    assert headers["x-request-id"] == "mine-7" and gate.row(headers["x-soma-interaction"])["meta"]["request_id"] == "mine-7"
    assert json.loads(gate.ask(dict(model="small"), "/v1/messages")[2])["type"] == "error"
    text = gate.ask(b"", "/metrics", "GET")[2]
    assert 'soma_requests_total{path="/v1/chat/completions",status="200"}' in text and 'soma_tokens_total{direction="out",model="fake/echo"}' in text and "nowhere" not in text

@pytest.mark.parametrize("model,status,word", [("once/stall", 504, "in time"), ("fake/liar", 502, "broke off"), ("fake/garbage", 502, "not JSON"), ("fake/nothing", 502, "not a chat completion"), ("gone/x", 502, "cannot be reached"), ("refusing/status-401", 200, "You said"), ("fake/status-401", 502, "key"), ("fake/flaky", 200, "You said")])
def test_providers_that_fail(gate, model, status, word):
    got, headers, text = gate.ask(talk(model))
    assert got == status and word in text, text

@pytest.mark.parametrize("model,word", [("fake/cut", "broke off"), ("fake/polite-cut", "broke off"), ("fake/broken", "not JSON"), ("once/stall-mid", "in time")])
def test_streams_that_break(gate, model, word):
    status, headers, text = gate.ask(talk(model, stream=True))
    last = json.loads(text.strip().splitlines()[-1][6:])
    assert status == 200 and "w1" in text and word in last["error"]["message"] and "[DONE]" not in text
    row = gate.row(headers["x-soma-interaction"])
    assert row["status"] == "error" and row["answer"].startswith("w0 w1") and row["meta"]["usage"] == "estimated"

def test_a_stream_that_is_none_is_an_error_with_a_status(gate):
    assert gate.ask(talk("fake/garbage", stream=True))[0] == 502 and gate.ask(talk("once/stall", stream=True))[0] == 504

def test_fallback(gate):
    for stream in (False, True):
        status, headers, text = gate.ask(talk("gone/echo", stream=stream))
        assert status == 200 and headers["x-soma-model"] == "fake/echo" and "in place of gone/echo, refusing/status-500" in headers["x-soma-route"]
    row = gate.row(headers["x-soma-interaction"])
    assert row["model"] == "fake/echo" and "gone/echo" in row["meta"]["failed"]

def test_disconnect_in_mid_stream(gate, fake):
    before = fake.left
    async def go():
        async with aiohttp.ClientSession() as s:
            r = await s.post(gate.url+"/v1/chat/completions", json=talk("slow/slow", stream=True), headers=gate.auth)
            await r.content.readuntil(b"w3")
            r.close()
            return r.headers["x-soma-interaction"]
    row = gate.row(asyncio.run(go()))
    assert (row["status"], row["error"]) == ("error", "the client left") and "w2" in row["answer"] and row["completion_tokens"] > 0
    end = time.monotonic()+20
    while fake.left == before and time.monotonic() < end: time.sleep(.05)
    assert fake.left == before+1, "the provider went on writing"

def test_idempotency(gate, fake):
    n = len(fake.seen)
    one, two = (gate.ask(talk("small", "once"), **{"idempotency-key": "k1"}) for _ in range(2))
    assert one[2] == two[2] and two[1]["x-soma-replayed"] == "1" and one[1]["x-soma-interaction"] == two[1]["x-soma-interaction"] and len(fake.seen) == n+1
    assert gate.ask(talk("small", "other"), **{"idempotency-key": "k1"})[0] == 422

def test_a_stream_asked_for_twice(gate, fake):
    body, n = talk("fake/brief", "once more", stream=True), len(fake.seen)
    async def go():
        async with aiohttp.ClientSession() as s:
            ask = lambda: s.post(gate.url+"/v1/chat/completions", json=body, headers={**gate.auth, "idempotency-key": "s1"})
            async with ask() as one:
                await one.content.readuntil(b"w3")
                async with ask() as two: busy = two.status, two.headers["retry-after"], (await two.json())["error"]["code"]
                await one.read()
            async with ask() as three: return busy, three.headers.get("x-soma-replayed"), await three.text()
    busy, again, text = asyncio.run(go())
    assert busy == (409, "1", "idempotency_key") and again == "1" and "w19" in "".join(json.loads(l[6:])["choices"][0]["delta"].get("content", "") for l in text.splitlines() if l.startswith("data: {") and json.loads(l[6:])["choices"]) and text.endswith("data: [DONE]\n\n")
    assert len(fake.seen) == n+1

def test_what_anthropic_s_form_says_reaches_an_anthropic_provider(gate, fake):
    body = dict(model="claude/sonnet", max_tokens=50, system=[dict(type="text", text="Be kind.", cache_control=dict(type="ephemeral"))], thinking=dict(type="enabled", budget_tokens=1024), messages=[dict(role="user", content="Hi")])
    for stream in (False, True):
        status, headers, text = gate.ask(dict(body, stream=stream), "/v1/messages")
        seen = fake.seen[-1]
        assert status == 200 and (seen["system"], seen["thinking"], seen["model"]) == (body["system"], body["thinking"], "sonnet")
        assert "Bon" in text and ("event: content_block_delta" in text) == stream
        assert (row := gate.row(headers["x-soma-interaction"]))["answer"] == "Bonjour" and row["prompt_tokens"] == 11

def children(pid): return {int(c): Path(f"/proc/{c}/cmdline").read_text() for t in Path(f"/proc/{pid}/task").iterdir() for c in (t/"children").read_text().split()}

def child(gate, name, seconds=30):
    "The process id of a child, once it is there"
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        for pid, cmd in children(gate.p.pid).items():
            if f"serve.{name}" in cmd: return pid
        time.sleep(.05)
    raise AssertionError(f"no {name}")

def test_the_office_and_the_engine_may_be_killed(gate):
    gate.ask(talk("tiny", max_tokens=1))
    old = {n: child(gate, n) for n in ("office", "engine")}
    for pid in old.values(): os.kill(pid, signal.SIGKILL)
    assert gate.row(gate.ask(talk("small"))[1]["x-soma-interaction"])["status"] == "ok"       # who answers does not need them
    new, _ = keys(gate).create("after")
    end = time.monotonic()+40
    while (status := gate.ask(talk("small"), authorization=f"Bearer {new}")[0]) == 401 and time.monotonic() < end: time.sleep(.1)
    assert status == 200 and gate.ask(talk("tiny", "Where is my order?", max_tokens=4))[0] == 200
    assert {child(gate, n) for n in old}.isdisjoint(old.values())

def test_the_process_that_answers_is_small(gate):
    maps = Path(f"/proc/{gate.p.pid}/maps").read_text()
    assert not [n for n in ("polars", "pyarrow", "sqlalchemy", "chdb", "numpy", "torch") if f"/{n}/" in maps]
    rss = int(next(l.split()[1] for l in Path(f"/proc/{gate.p.pid}/status").read_text().splitlines() if l.startswith("VmRSS")))/1024
    assert rss < 90, rss

def keys(gate):
    from somaagent.serve.keys import Keys
    from somaagent.store.state import State
    return Keys(State(f"sqlite:///{gate.home/'state.db'}"))

def test_keys_limits_and_budgets(gate):
    k = keys(gate)
    (poor, ident), (slow, _), (narrow, _) = k.create("poor", limits=dict(dollars="0.00005", period="total")), k.create("slow", limits=dict(rpm=1)), k.create("narrow", scopes=("embed",))
    ask = lambda key, **kw: gate.ask(talk("small", **kw), authorization=f"Bearer {key}")
    end = time.monotonic()+20
    while ask(slow)[0] == 401 and time.monotonic() < end: time.sleep(.1)
    status, headers, text = ask(slow)
    assert status == 429 and 1 <= int(headers["retry-after"]) <= 60 and json.loads(text)["error"]["type"] == "rate_limit_error"
    while (status := ask(poor, max_tokens=5)[0]) == 503 and time.monotonic() < end: time.sleep(.1)     # what it has spent is being looked up
    assert status == 200
    status, _, text = ask(poor, max_tokens=5)
    assert status == 429 and "budget" in text
    assert ask(narrow)[0] == 403
    k.revoke(ident)
    end = time.monotonic()+20
    while ask(poor)[0] != 401 and time.monotonic() < end: time.sleep(.1)
    assert ask(poor)[0] == 401

def test_an_experiment_decides_the_model(gate):
    from somaagent.store.state import ExperimentRow
    k = keys(gate)
    with k.st.session() as s: s.add(ExperimentRow(id="exp_gate", name="other", unit="user", status="running", salt="s", arms=[dict(name="control", weight=.5, model="small"), dict(name="other", weight=.5, model="fake/other")]))
    end = time.monotonic()+20
    while "other" not in json.loads(gate.ask(b"", "/readyz", "GET")[2])["experiments"]["running"] and time.monotonic() < end: time.sleep(.1)
    from somaagent.abtest.assign import assign
    from somaagent.abtest.life import Experiments
    x = Experiments(k.st).get("exp_gate")
    got = {}
    for i in range(8):
        _, headers, _ = gate.ask(talk("small", user=f"u{i}"))
        row = gate.row(headers["x-soma-interaction"])
        arm = assign(f"u{i}", x)
        got[arm] = got.get(arm, 0)+1
        assert (row["experiment"], row["arm"], row["model"], row["meta"]["propensity"]) == ("exp_gate", arm, dict(control="fake/echo", other="fake/other")[arm], "0.5")
    assert len(got) == 2
    assert gate.row(gate.ask(talk("small"))[1]["x-soma-interaction"])["experiment"] == ""    # nobody: no unit, no arm
    with k.st.session() as s: s.get(ExperimentRow, "exp_gate").status = "stopped"

def test_feedback(gate):
    _, headers, _ = gate.ask(talk("small"))
    status, h, text = gate.ask(dict(interaction_id=headers["x-soma-interaction"], rating=5, comment="good"), "/v1/feedback")
    assert status == 202 and json.loads(text)["events"] == 2 and any(r.get("feedback_event", {}).get("comment") == "good" for r in gate.rows())
    for bad in (dict(rating=5), dict(interaction_id="int_1"), dict(interaction_id="int_1", rating=99)): assert gate.ask(bad, "/v1/feedback")[0] == 400

def test_streams_past_the_limit_are_refused_politely(gate):
    async def go():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as s:
            async def one():
                async with s.post(gate.url+"/v1/chat/completions", json=talk("slow/slow", stream=True), headers=gate.auth) as r:
                    if r.status == 200: await r.content.readany()
                    return r.status, r.headers.get("retry-after")
            return await asyncio.gather(*[one() for _ in range(60)])
    got = asyncio.run(go())
    assert sum(s == 200 for s, _ in got) >= 12 and {(s, r) for s, r in got if s != 200} == {(503, "1")}
    assert gate.ask(b"", "/healthz", "GET")[0] == 200

def raw(gate, *parts, wait=0., read=2.):
    "Bytes by hand; what comes back until the other side closes or `read` seconds"
    with socket.create_connection(("127.0.0.1", gate.port)) as s:
        for p in parts: s.sendall(p); time.sleep(wait)
        s.settimeout(read)
        out = b""
        try:
            while b := s.recv(65536): out += b
        except TimeoutError: out += b"<open>"
        except ConnectionResetError: pass
        return out

def test_slow_and_endless_clients(gate):
    post = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\n" % gate.key.encode()
    assert raw(gate, b"GET /healthz HTTP/1.1\r\nhost: x\r\n").startswith(b"HTTP/1.1 408")
    assert raw(gate, post+b"content-length: 50\r\nconnection: close\r\n\r\n{").startswith(b"HTTP/1.1 408")
    assert b"431" in raw(gate, b"GET / HTTP/1.1\r\n", *[b"a: "+b"x"*30000+b"\r\n"]*3)[:20]
    assert raw(gate, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    body = json.dumps(talk("small")).encode()
    got = raw(gate, post+b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n", *[b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:9], body[9:])], b"0\r\n\r\n", wait=.02)
    assert got.startswith(b"HTTP/1.1 200") and b"You said" in got

def test_a_local_model_without_a_provider(gate):
    status, headers, text = gate.ask(talk("tiny", "Where is my order?", max_tokens=8))
    assert status == 200 and headers["x-soma-model"] == "local/tiny" and headers["x-soma-cost-usd"] == "0"
    assert gate.ask(talk("tiny", "Where is my order?", max_tokens=8, stream=True))[2].endswith("data: [DONE]\n\n")

def test_killed_and_nothing_acknowledged_is_lost(gate):
    acked = []
    async def go():
        async with aiohttp.ClientSession() as s:
            async def client(i):
                while True:
                    try:
                        async with s.post(gate.url+"/v1/chat/completions", json=talk("small", f"{i}", stream=i % 2 == 0), headers={**gate.auth, "x-soma-durable": "1"}) as r:
                            if r.status == 200 and (t := await r.text()) and (i % 2 or "[DONE]" in t): acked.append(r.headers["x-soma-interaction"])
                    except aiohttp.ClientError: return
            async def kill(): await asyncio.sleep(1.2); gate.p.send_signal(signal.SIGKILL)
            await asyncio.gather(kill(), *[client(i) for i in range(8)])
    asyncio.run(go())
    gate.p.wait(30)
    there = [r["id"] for r in gate.rows() if "id" in r]
    assert len(acked) > 8 and not set(acked)-set(there) and len(set(there)) == len(there)
    from somaagent.serve.spool import Spool
    shipped = []
    s = Spool(gate.home/"spool", lambda rows, token: shipped.extend(r.get("id") for r in rows))
    assert s.close() and set(acked) <= set(shipped) and not gate.rows()

def test_told_to_stop_it_finishes_streams_and_a_second_start_makes_no_key(gate, fake):
    key = gate.key                        # its first process is dead by now
    g = Gate(gate.home, fake.port)
    assert g.key == key and len(g.said) == 1
    async def go():
        async with aiohttp.ClientSession() as s, s.post(g.url+"/v1/chat/completions", json=talk("slow/brief", stream=True), headers=g.auth) as r:
            await r.content.readuntil(b"w3")
            g.p.send_signal(signal.SIGTERM)
            return r.headers["x-soma-interaction"], await r.text()
    ident, text = asyncio.run(go())
    assert "w19" in text and text.endswith("data: [DONE]\n\n")
    g.p.wait(30)
    closed = [json.loads(l) for f in gate.home.glob("spool/sp_*/*.jsonl") for l in f.read_text().splitlines()]
    assert [r["status"] for r in closed if r["id"] == ident] == ["ok"] and not list(gate.home.glob("spool/sp_*/*.open"))

def test_rows_become_interactions_exposures_feedback_and_spending(stores):
    from decimal import Decimal
    from somaagent.core.records import utcnow
    from somaagent.serve.ship import shipper, spent
    from somaagent.store.state import ExperimentRow
    wh, st = stores
    with st.session() as s: s.add(ExperimentRow(id="exp_ship", name="ship", unit="user", status="running", salt="s", arms=[dict(name="a", weight=.5, model="x"), dict(name="b", weight=.5, model="y")]))
    made = lambda i, **kw: json.loads(json.dumps(dict(id=f"int_{i}", ts=utcnow().isoformat(), app="shop", user_id=f"u{i}", session_id="", category="", prompt="Hi", answer="Ho", messages=None, model="x", provider="p", prompt_tokens=1, completion_tokens=1, cost_usd="0.250000000",
        latency_ms=1.5, status="ok", error="", experiment="exp_ship", arm="a", meta=dict(key="k1", propensity="0.5", exposure="hash", revision="0"))|kw))
    rows = [made(1), made(2, arm="b"), made(3, experiment="", arm=""), dict(feedback_event=dict(interaction_id="int_1", rating=5, ts=utcnow().isoformat()))]
    for ship in (shipper(wh, st), shipper(wh, st)): ship(rows, "sp_1/1/0")   # the second as after a crash: the same batch again
    count = lambda t: wh.query(f"SELECT count() AS n FROM {t}")["n"][0]
    assert count("interactions") == 3 and count("model_usage") == 3
    assert wh.query("SELECT DISTINCT unit, arm, propensity FROM ab_exposures ORDER BY unit").rows() == [("u1", "a", .5), ("u2", "b", .5)]
    assert count("feedback FINAL") == 1
    assert [spent(lambda: wh)("k1", p) for p in ("day", "month", "total")] == [Decimal("0.75")]*3 and spent(lambda: wh)("k2", "total") == 0
