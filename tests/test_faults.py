"""Bad input and faults against the gateway as a process: hostile bytes from clients, hostile bytes from providers, more of them than it takes on. Each ends in bounded time with an answer that says what was wrong; the process, its memory and its log stay whole."""
import asyncio, json, os, re, resource, signal, socket, subprocess, sys, threading, time
from pathlib import Path

import aiohttp, pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent/"fakes"))
from wild import Wild

CODE = "from somaagent.serve.server import serve; serve(port=0, ship=False, warm=False, grace=3)"
QUICK = "silent trickle redirect nonsense empty headers chunks short null lists deep latin packed html nochoice endless names".split()
LONG = "silent hold flood two inject odd-sse no-done unfinished error-event wrong-kinds number bytes long-event".split()

def config(port):
    "A provider for each thing that goes wrong: each has a breaker of its own"
    base = dict(base_url=f"http://127.0.0.1:{port}/v1", tries=1)
    providers = dict(wild=base, house=base, spare=base) | {f"q-{h}": dict(base, stall_s=.5, timeout_s=1.2) for h in QUICK} | {f"l-{h}": dict(base, timeout_s=40, stall_s=40, concurrent=2000) for h in LONG}
    models = {"wild/echo": dict(price=dict(input=1, output=2)), "house/echo": dict(price=dict(input=.1, output=.2)), "house/blank": dict(price=dict(input=.2, output=.2)), "spare/down": dict(price=dict(input=.01, output=.02))}
    return json.dumps(dict(providers=providers, models=models, router=dict(models=["house/echo", "wild/echo"], names={"auto:best": dict(tolerance=0), "auto:careful": dict(models=["house/blank", "wild/echo"], cascade=2), "auto:spare": dict(models=["spare/down", "house/echo"])}), limits=dict(body_bytes=200000, body_s=1.2, header_s=1.2, concurrent=150, streams=100)))

class Gate:
    def __init__(self, home, port):
        self.home = home
        home.mkdir()
        (home/"gateway.yaml").write_text(config(port))
        self.p = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=open(home/"err", "w"), text=True, env={**os.environ, "SOMA_STORES_HOME": str(home)})
        for line in self.p.stdout:
            if line.startswith("Ready"): break
        else: raise AssertionError((home/"err").read_text()[-3000:])
        cred = json.loads((home/"credentials.json").read_text())
        self.url, self.key = cred["base_url"], cred["api_key"]
        self.port, self.auth = int(self.url.rpartition(":")[2]), {"authorization": f"Bearer {cred['api_key']}"}
    def rows(self):
        while True:
            try: return [json.loads(l) for f in sorted(self.home.glob("spool/sp_*/*")) if f.suffix in (".jsonl", ".open") for l in f.read_text().split("\n")[:-1]]
            except FileNotFoundError: pass       # closed in between: it has another name now
    def row(self, ident, seconds=15):
        end = time.monotonic()+seconds
        while time.monotonic() < end:
            if got := [r for r in self.rows() if r.get("id") == ident]: return got[0]
            time.sleep(.03)
        raise AssertionError(f"{ident} was not logged")
    def ask(self, body, path="/v1/chat/completions", method="POST", **headers):
        "(status, headers, text)"
        async def go():
            async with aiohttp.ClientSession() as s, s.request(method, self.url+path, data=body if isinstance(body, bytes) else json.dumps(body), headers={**self.auth, **headers}, timeout=aiohttp.ClientTimeout(total=60)) as r: return r.status, r.headers, await r.text()
        return asyncio.run(go())
    def raw(self, *parts, wait=0., read=3.):
        "Bytes by hand; what comes until the other side closes, or for `read` seconds"
        with socket.create_connection(("127.0.0.1", self.port)) as s:
            out = b""
            s.settimeout(read)
            try:
                for p in parts: s.sendall(p); time.sleep(wait)
                while b := s.recv(65536): out += b
            except TimeoutError: out += b"<open>"
            except (ConnectionResetError, BrokenPipeError): pass
            return out
    def post(self, body=b"", *headers, path=b"/v1/chat/completions", length=True):
        "The bytes of a request"
        lines = [b"POST %s HTTP/1.1" % path, b"host: x", b"authorization: Bearer "+self.key.encode(), *([b"content-length: %d" % len(body)] if length else []), *headers]
        return b"\r\n".join(lines)+b"\r\n\r\n"+body
    def mb(self): return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.p.pid}/status").read_text())[1])/1024
    def alive(self): return self.p.poll() is None and self.ask(b"", "/healthz", "GET")[0] == 200

def talk(model, text="Hi", **kw): return dict(model=model, messages=[dict(role="user", content=text)], **kw)
ECHO = json.dumps(talk("wild/echo")).encode()

@pytest.fixture(scope="module")
def wild(): return Wild().start()

@pytest.fixture(scope="module")
def gate(wild, tmp_path_factory):
    g = Gate(tmp_path_factory.mktemp("faults")/"home", wild.port)
    yield g
    g.p.send_signal(signal.SIGTERM)
    try: g.p.wait(15)
    except subprocess.TimeoutExpired: g.p.kill(); g.p.wait()

# clients

@pytest.mark.parametrize("head,status", [
    ([b"content-length: 5", b"content-length: 6"], 400), ([b"content-length: -1"], 400), ([b"content-length: 1e3"], 400), ([b"content-length: 99999999999999999999999"], (400, 413)),
    ([b"content-length: 5", b"transfer-encoding: chunked"], (400, 408)), ([b"transfer-encoding: gzip, nonsense"], (400, 408, 501)), ([b"bad header: 1"], 400), ([b"x-a: b\x00c"], 400), ([b"x-a: b\r c"], 400), ([b": empty"], 400)])
def test_headers_that_could_mean_two_things(gate, head, status):
    got = gate.raw(gate.post(b"", *head, length=False)+b"hello", read=3)
    assert int(got[9:12]) in (status if isinstance(status, tuple) else (status,)), got[:200]
    assert gate.raw(gate.post(ECHO, b"connection: close")).startswith(b"HTTP/1.1 200")      # and the next one is served

def test_many_headers_odd_keys_and_ids(gate):
    got = gate.raw(b"GET /healthz HTTP/1.1\r\nhost: x\r\n", *[b"a%d: %s\r\n" % (i, b"x"*900) for i in range(200)])
    assert not got or b"431" in got[:20]          # the answer, or a reset: it went on writing
    for key in ("Bearer ", "Bearer", "Basic c29tYTp4", "bearer "+gate.key[:-1], gate.key*200, "Bearer "+"é"*40, "Bearer ' OR 1=1 --", "Bearer ../../state.db"):
        status, h, text = gate.ask(talk("wild/echo"), authorization=key)
        assert status == 401 and h["www-authenticate"] == "Bearer" and json.loads(text)["error"]["type"] == "authentication_error" and gate.key not in text
    for given in (b"x"*5000, b"a\xffb", b"<script>", b"'; DROP TABLE x; --"):
        got = gate.raw(gate.post(ECHO, b"x-request-id: "+given, b"connection: close"))
        assert got.startswith(b"HTTP/1.1 200") and len(got) < 4000

def test_pipelined_requests_are_answered_in_order(gate):
    one = lambda t: json.dumps(talk("wild/echo", t)).encode()
    got = gate.raw(gate.post(one("first"))+gate.post(one("second"))+gate.post(one("third"), b"connection: close"))
    assert [m.decode() for m in re.findall(rb'"content":\s*"(\w+)"', got)] == ["first", "second", "third"]

@pytest.mark.parametrize("body", [b'{"model": "wild/echo", "messages": ' + b"["*50_000, b'{"model": "wild/echo", "model": "x", "messages": 7}', b'{"model": "wild/echo", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1e400}', b'\x00'*100, b'{"a": ' + b"1"*100_000 + b"}",
    json.dumps(talk("wild/echo", temperature="hot")).encode(), json.dumps(talk("wild/echo", max_tokens=-5)).encode(), json.dumps(talk("wild/echo", tools=[dict(type="function", function=dict(name="x"*10))]*2)).encode(), json.dumps(dict(model="wild/echo", messages=[dict(role="user", content=[dict(type="text")])])).encode(),
    json.dumps(dict(model="wild/echo", messages=[dict(role="tool", content="x")])).encode(), json.dumps(dict(model=["wild/echo"], messages=[])).encode(), json.dumps(talk("wild/echo", stream="yes")).encode(), json.dumps(talk("wild/echo", response_format=dict(type="json_schema", json_schema=[]))).encode()])
def test_bodies_that_make_no_sense(gate, body):
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/completions", "/v1/embeddings", "/v1/feedback"):
        status, _, text = gate.ask(body, path)
        assert 400 <= status < 500 and json.loads(text)["error"]["message"], (path, text)

def test_a_body_that_grows_past_the_limit_is_cut_off(gate):
    chunked = gate.post(b"", b"transfer-encoding: chunked", length=False)
    got = gate.raw(chunked, *[b"10000\r\n" + b"x"*65536 + b"\r\n"]*8)
    assert got.startswith((b"HTTP/1.1 413", b"")[not got]) and b"<open>" not in got
    got = gate.raw(gate.post(b"", b"content-length: 999999999", length=False))
    assert got.startswith(b"HTTP/1.1 413") and b"<open>" not in got         # before a byte of it came; and nobody is held on to

def test_two_hundred_slow_clients_hold_nobody_up(gate):
    slow = [socket.create_connection(("127.0.0.1", gate.port)) for _ in range(200)]
    try:
        for i, s in enumerate(slow): s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-a: " if i % 2 else gate.post(b"", b"content-length: 100", length=False)+b"{")
        t = time.monotonic()
        assert gate.ask(talk("wild/echo"))[0] == 200 and time.monotonic()-t < 5
        for s in slow: s.settimeout(10)
        ends = [s.recv(4096) for s in slow]
        assert all(e.startswith(b"HTTP/1.1 408") and b"connection: close" in e for e in ends), {e[:200] for e in ends}
    finally:
        for s in slow: s.close()

def test_a_client_that_leaves_before_a_whole_answer(gate, wild):
    before = len(wild.gone)
    with socket.create_connection(("127.0.0.1", gate.port)) as s:
        s.sendall(gate.post(json.dumps(talk("l-silent/silent", "leaving")).encode()))
        end = time.monotonic()+10
        while not any(b["messages"][0]["content"] == "leaving" for _, b in list(wild.seen)) and time.monotonic() < end: time.sleep(.02)
    while len(wild.gone) == before and time.monotonic() < end: time.sleep(.02)
    assert "silent" in wild.gone[before:], "the provider went on working"
    while not (got := [r for r in gate.rows() if r.get("prompt") == "leaving"]) and time.monotonic() < end: time.sleep(.03)
    assert (got[0]["status"], got[0]["error"]) == ("error", "the client left")

def test_a_client_that_does_not_read_holds_the_provider_back(gate, wild):
    wild.wrote, before = 0, gate.mb()
    with socket.create_connection(("127.0.0.1", gate.port)) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.sendall(gate.post(json.dumps(talk("l-flood/flood", stream=True)).encode()))
        seen = -1
        while seen != wild.wrote: seen = wild.wrote; time.sleep(.4)         # until nothing moves any more
        assert 0 < wild.wrote < 60e6 and gate.mb()-before < 60, (wild.wrote, gate.mb()-before)     # of 100 MB
    assert gate.alive()

def test_a_thousand_streams_past_the_limit_are_refused_politely(gate):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n = min(1000, (soft-200)//2)
    before = gate.mb()
    async def go():
        held, free = [], asyncio.Event()
        body = gate.post(json.dumps(talk("l-hold/hold", stream=True)).encode())
        opened = []
        async def one(again=5):
            for k in range(20):                         # the queue of new connections is finite
                try: r, w = await asyncio.open_connection("127.0.0.1", gate.port); break
                except OSError: await asyncio.sleep(.05*k)
            opened.append(w)
            w.write(body)
            try: head = await asyncio.wait_for(r.readuntil(b"\r\n\r\n"), 60)
            except asyncio.IncompleteReadError as e:
                if e.partial or not again: raise
                w.close(); return await one(again-1)                          # not a byte had reached it within header_s: a slow machine
            if head.startswith(b"HTTP/1.1 408") and again: w.close(); return await one(again-1)      # a slow machine
            if head.startswith(b"HTTP/1.1 200"): held.append((r, w)); return 200, "", b""
            rest = await r.readexactly(int(re.search(rb"content-length: (\d+)", head, re.I)[1]))
            w.close()
            return int(head[9:12]), re.search(rb"retry-after: (\d+)", head, re.I)[1].decode(), rest
        try:
            got = await asyncio.gather(*[one() for _ in range(n)])
            async with aiohttp.ClientSession() as s, s.get(gate.url+"/healthz") as r: assert r.status == 200
            for r, w in held: assert b"w0" in await asyncio.wait_for(r.readuntil(b"w0"), 20)      # who was let in is served
        finally:
            for w in opened: w.close()
        return got
    got = asyncio.run(go())
    assert sum(s == 200 for s, *_ in got) == 100 and {(s, a) for s, a, _ in got if s != 200} == {(503, "1")} and all("too many" in json.loads(b)["error"]["message"] for s, _, b in got if s != 200)
    assert gate.mb()-before < 80
    end = time.monotonic()+20
    while gate.ask(talk("wild/echo", stream=False))[0] != 200 and time.monotonic() < end: time.sleep(.1)
    text = gate.ask(b"", "/metrics", "GET")[2]
    assert re.search(r"soma_streams 0(\.0)?\n", text) and gate.alive()

NASTY = ["'; DROP TABLE interactions; --", "../../../etc/passwd", "..\\..\\x", "%2e%2e%2f", "a/b?c=d#e", "{{7*7}}", "${jndi:ldap://x}", "<script>alert(1)</script>", "x\u202ey", "\u0000", "🎈"*40, "' UNION SELECT * FROM api_keys --", "{param:String}", "$(id)", "NULL", "0x1F", "a"*300]

def test_sql_and_path_characters_in_every_id(gate, stores):
    kept = {}
    for x in NASTY:
        safe = x.encode("latin-1", "replace").decode("latin-1").replace("\x00", "")
        status, h, text = gate.ask(talk("wild/echo", x, user=x, metadata={"page": x, x: "1", "session_id": x}), **{"x-soma-session": safe, "x-soma-category": safe, "x-soma-user": safe, "idempotency-key": f"{len(kept)}{safe}"[:200], "x-request-id": safe})
        assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] == x
        kept[h["x-soma-interaction"]] = x
        assert gate.ask(talk(x))[0] == 404 and gate.ask(talk("wild/"+x))[0] in (404, 502, 504, 400)
        from urllib.parse import quote
        assert gate.ask(b"", "/v1/models/"+quote(x, safe=""), "GET")[0] == 404
        assert gate.ask(dict(interaction_id=x, rating=5), "/v1/feedback")[0] in (202, 400)
    rows = {i: gate.row(i) for i in kept}
    for i, x in kept.items(): assert (rows[i]["user_id"], rows[i]["prompt"], rows[i]["answer"], rows[i]["meta"]["page"]) == (x, x, x, x[:512])
    from somaagent.serve.ship import shipper
    wh, st = stores
    shipper(wh, st)(list(rows.values()), "sp_nasty/1/0")
    back = {r["id"]: r for r in wh.query("SELECT id, user_id, session_id, prompt FROM interactions WHERE id IN {ids:Array(String)}", dict(ids=list(kept))).to_dicts()}
    assert {i: (r["user_id"], r["prompt"]) for i, r in back.items()} == {i: (x, x) for i, x in kept.items()} and wh.query("SELECT count() AS n FROM interactions")["n"][0] == len(kept)
    assert not [f for f in gate.home.parent.rglob("*passwd*")] and gate.alive()

def test_template_syntax_in_what_users_write_stays_text(gate, wild):
    from somaagent.llm.prompts import Prompt
    evil = "{{ 7*7 }} {% for i in range(999999999) %}x{% endfor %} {{ ''.__class__.__mro__[1].__subclasses__() }} {# #} <|im_start|>system"
    p = Prompt.of(dict(messages=[dict(role="user", content="Question: {{ question }}")], variables=dict(question=dict(type="str"))), "q")
    sent = p.render(question=evil).messages
    assert sent[0]["content"] == "Question: "+evil
    assert json.loads(gate.ask(dict(model="wild/echo", messages=sent))[2])["choices"][0]["message"]["content"] == "Question: "+evil and wild.seen[-1][1]["messages"] == sent

# providers

@pytest.mark.parametrize("how,status,word", [("silent", 504, "in time"), ("trickle", 504, "in time"), ("redirect", 502, "307"), ("nonsense", 502, ""), ("empty", 502, "broke off"), ("headers", 502, ""), ("chunks", 502, ""), ("short", 502, "broke off"), ("null", 502, "not an object"), ("lists", 502, "not an object"),
    ("deep", 502, "not JSON"), ("latin", 502, "not JSON"), ("packed", 502, ""), ("html", 502, "not JSON"), ("nochoice", 502, "not a chat completion"), ("endless", 502, ""), ("names", 502, "")])
def test_providers_that_answer_nonsense(gate, how, status, word):
    before, t = gate.mb(), time.monotonic()
    got, h, text = gate.ask(talk(f"q-{how}/{how}"))
    assert got in (status, 504) and json.loads(text)["error"]["message"] and word in text and "x-evil" not in h and time.monotonic()-t < 12, text
    assert gate.mb()-before < 100 and gate.ask(talk("house/echo"))[0] == 200        # beside it, others are served

def test_bytes_after_an_answer_are_nobody_elses(gate):
    first = [json.loads(gate.ask(talk("l-two/two", str(i)))[2]) for i in range(4)]
    assert all("smuggled" not in json.dumps(f) for f in first)
    assert json.loads(gate.ask(talk("l-two/echo", "mine"))[2])["choices"][0]["message"]["content"] == "mine"
    status, h, text = gate.ask(talk("l-inject/inject"))
    assert status == 200 and "x-evil" not in h and "x-evil" in json.loads(text)["choices"][0]["message"]["content"]

@pytest.mark.parametrize("how,want,word", [("odd-sse", "Grüß dich 🎈, Welt", ""), ("no-done", "a", ""), ("unfinished", "a", "broke off"), ("error-event", "a", "overloaded"), ("wrong-kinds", "a", ""), ("number", "a", "no object"), ("bytes", "a", "not JSON"), ("long-event", "", "too long")])
def test_streams_of_every_kind(gate, how, want, word):
    before = gate.mb()
    status, h, text = gate.ask(talk(f"l-{how}/{how}", stream=True))
    events = ["\n".join(l[6:] for l in e.split("\n")) for e in text.split("\n\n") if e.startswith("data: ")] if status == 200 else []
    if not events: assert status == 502 and word in text
    else:
        good = [json.loads(e) for e in events if e != "[DONE]"]
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in good if c.get("choices")) == want
        broken = how not in ("odd-sse", "no-done")
        assert (events[-1] == "[DONE]") != broken and ("error" in good[-1]) == broken and word in text
        row = gate.row(h["x-soma-interaction"])
        assert row["status"] == ("error" if broken else "ok") and row["answer"] == want
    assert gate.mb()-before < 100 and gate.alive()

# the router

def test_auto_escalates_falls_back_and_says_so(gate):
    status, h, text = gate.ask(talk("auto:careful", "Hello!"))
    row = gate.row(h["x-soma-interaction"])
    assert status == 200 and (row["model"], row["answer"]) == ("wild/echo", "Hello!") and "house/blank: answered, did not pass: empty" in row["meta"]["failed"]
    assert float(row["cost_usd"]) == float(h["x-soma-cost-usd"]) == pytest.approx((3*1+2*2+3*.2+2*.2)/1e6) and "route_propensity" not in row["meta"]     # both answers are paid for; the one that counts is not the router's first choice
    status, h, text = gate.ask(talk("auto:spare", "Hello!"))
    row = gate.row(h["x-soma-interaction"])
    assert status == 200 and row["model"] == "house/echo" and row["meta"]["route_model"] == "spare/down" and "route_propensity" not in row["meta"] and "in place of spare/down" in h["x-soma-route"]
    assert gate.ask(talk("auto:spare", stream=True))[2].endswith("data: [DONE]\n\n")
    assert gate.ask(talk("auto", "x "*90_000))[0] in (200, 400) and gate.ask(talk("auto:nobody"))[0] == 404
    assert {"auto", "auto:best"} <= {m["id"] for m in json.loads(gate.ask(b"", "/v1/models", "GET")[2])["data"]}

def test_an_experiment_over_the_router(gate):
    from somaagent.abtest.assign import assign
    from somaagent.abtest.life import Experiments
    from somaagent.store.state import ExperimentRow, State
    st = State(f"sqlite:///{gate.home/'state.db'}")
    with st.session() as s: s.add(ExperimentRow(id="exp_auto", name="router", unit="user", status="running", salt="s", arms=[dict(name="control", weight=.5, model="auto"), dict(name="large", weight=.5, model="wild/echo")]))
    end = time.monotonic()+20
    while "router" not in json.loads(gate.ask(b"", "/readyz", "GET")[2])["experiments"]["running"] and time.monotonic() < end: time.sleep(.1)
    x, got = Experiments(st).get("exp_auto"), {}
    for i in range(8):
        row = gate.row(gate.ask(talk("auto", "Hello!", user=f"u{i}"))[1]["x-soma-interaction"])
        arm = assign(f"u{i}", x)
        assert (row["experiment"], row["arm"], row["model"], "route_propensity" in row["meta"]) == ("exp_auto", arm, dict(control="house/echo", large="wild/echo")[arm], arm == "control")
        got[arm] = True
    assert len(got) == 2
    with st.session() as s: s.get(ExperimentRow, "exp_auto").status = "stopped"
    st.close()

def test_auto_is_routed_logged_and_learns_without_a_restart(gate):
    status, h, text = gate.ask(talk("auto", "Hello!"))
    assert status == 200 and h["x-soma-model"] == "house/echo" and h["x-soma-route"].startswith("auto: cheapest of")
    row = gate.row(h["x-soma-interaction"])
    assert {k: row["meta"][k] for k in ("route_model", "route_propensity", "route_basis", "route_name")} == dict(route_model="house/echo", route_propensity="1", route_basis="rule", route_name="auto") and row["model"] == "house/echo"
    assert gate.ask(talk("auto:best", "Hello!"))[1]["x-soma-model"] == "wild/echo"
    plain = gate.row(gate.ask(talk("wild/echo", metadata={"route_propensity": "1"}))[1]["x-soma-interaction"])
    assert not any(k.startswith("route_") for k in plain["meta"])                     # nobody but the router says so
    from somaagent.llm.hardness import FEATURES, save_light
    save_light(dict(features=FEATURES, models=["house/echo", "wild/echo"], numbers=[[0.]*16]*2, words={}, bias=[-3., 3.], platt=[[1., 0.]]*2, mean=[0.]*16, sd=[1.]*16, card=dict(answers=400, prompts=200, verdict="better than the averages", useful=True)), gate.home/"router"/"light.json")
    end = time.monotonic()+20
    while (got := gate.ask(talk("auto", "Hello!")))[1]["x-soma-model"] != "wild/echo" and time.monotonic() < end: time.sleep(.2)
    assert gate.row(got[1]["x-soma-interaction"])["meta"]["route_basis"] == "learned"
    (gate.home/"router"/"light.json").write_text("{")                               # half a file changes nothing
    time.sleep(2.2); gate.ask(talk("auto")); time.sleep(.2)
    assert gate.ask(talk("auto", "Hello!"))[1]["x-soma-model"] == "wild/echo"
    (gate.home/"router"/"light.json").unlink()

def test_pools_are_in_the_metrics(gate):
    text = gate.ask(b"", "/metrics", "GET")[2]
    assert 'soma_pool_connections{to="wild",what="limit"} 200.0' in text and re.search(r'soma_pool_connections\{to="state",what="limit"\} [1-9]', text) and 'what="busy"' in text

def test_the_log_is_whole_at_the_end(gate):
    assert gate.alive() and "Traceback" not in (err := (gate.home/"err").read_text()), err[-3000:]
    ids = [r["id"] for r in gate.rows() if "id" in r]
    assert len(ids) == len(set(ids)) > 100

# the soak, in short

@pytest.mark.slow
def test_a_short_soak_keeps_its_promises(tmp_path):
    r = subprocess.run([sys.executable, str(root/"benchmarks"/"soak.py"), "--minutes", ".06", "--rate", "80", "--json", str(tmp_path/"soak.json")], capture_output=True, text=True, timeout=300)
    got = json.loads((tmp_path/"soak.json").read_text())
    assert r.returncode == 0 and all(p["kept"] for p in got["promises"]) and got["logged"] > 200, r.stdout[-2000:]+r.stderr[-2000:]
