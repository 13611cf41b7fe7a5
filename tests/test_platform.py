"""The platform's API as a process on loopback: asked as clients ask it, misused, fuzzed, cut off; with a gateway behind it that answers or does not."""
import asyncio, concurrent.futures, contextlib, json, os, socket, subprocess, sys, time

import aiohttp, nbformat, pytest

CODE = """
import asyncio, json, os, sys, uvicorn
from pathlib import Path
from somaagent.release.registry import Registry
from somaagent.serve.config import Config
from somaagent.serve.keys import SCOPES, Keys
from somaagent.serve.platform import app
from somaagent.store.artifacts import Artifacts
from somaagent.store.state import State
home = Path(os.environ["SOMA_STORES_HOME"])
st = State(); keys = Keys(st)
Registry(st, Artifacts(home/"artifacts"), home/"keys").ensure_base("support-desk", "tiny")
async def gateway(scope, receive, send):
    "Repeats what it hears; slow, broken and unwilling on demand"
    b = json.loads((await receive())["body"] or b"{}")
    said, h, status = (b.get("messages") or [dict(content="")])[-1]["content"], [(b"content-type", b"application/json"), (b"x-soma-model", b"fake/echo"), (b"x-soma-cost-usd", b"0.000010"), (b"x-soma-interaction", b"int_1")], 200
    base = dict(id="c", created=0, model="echo")
    out = base | dict(choices=[dict(index=0, message=dict(role="assistant", content="You said: "+said), finish_reason="stop")], usage=dict(prompt_tokens=len(b.get("messages", [])), completion_tokens=3))
    if scope["path"] == "/v1/models": out = dict(data=[dict(id="fake/echo", kind="chat")])
    if scope["path"] == "/v1/feedback": out = dict(events=1)
    if b.get("model") == "nothing": status, out = 404, dict(error=dict(message="no such model is served here", code="model_not_found"))
    await send(dict(type="http.response.start", status=status, headers=h))
    if not b.get("stream"): return await send(dict(type="http.response.body", body=json.dumps(out).encode()))
    piece = lambda t, f=None: b"data: "+json.dumps(base | dict(choices=[dict(index=0, delta=dict(content=t), finish_reason=f)])).encode()+b"\\n\\n"
    for w in said.split(): await send(dict(type="http.response.body", body=piece(w+" "), more_body=True)); await asyncio.sleep(.2 if b["model"] == "slow" else 0)
    if b["model"] != "broken": await send(dict(type="http.response.body", body=piece("", "stop")+b"data: [DONE]\\n\\n", more_body=True))
    await send(dict(type="http.response.body", body=b""))
api = app(st, keys, gateway)
class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        made = {n: keys.create(n, s)[0] for n, s in dict(admin=tuple(SCOPES), ann=("chat", "feedback", "read"), bob=("chat", "read"), writer=("read", "write")).items()}
        print(json.dumps(dict(port=self.servers[0].sockets[0].getsockname()[1], keys=made)), flush=True)
Server(uvicorn.Config(api, port=0, log_level="warning", ws="none")).run()
"""

class Platform:
    def __init__(self, home):
        self.home = home
        home.mkdir()
        self.p = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=open(home/"err", "w"), text=True, env={**os.environ, "SOMA_STORES_HOME": str(home)})
        line = self.p.stdout.readline()
        assert line, (home/"err").read_text()[-3000:]
        said = json.loads(line)
        self.port, self.keys, self.url = said["port"], said["keys"], f"http://127.0.0.1:{said['port']}"
    def ask(self, method, path, body=None, who="admin", raw=None, timeout=30, **headers):
        "(status, what was said, headers)"
        async def go():
            h = ({"authorization": f"Bearer {self.keys[who]}"} if who else {}) | ({"content-type": "application/json"} if body is not None or raw is not None else {}) | {k.replace("_", "-"): v for k, v in headers.items()}
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as s, s.request(method, aiohttp.client.URL(self.url+path, encoded=True), data=raw if raw is not None else json.dumps(body) if body is not None else None, headers=h) as r:
                text = await r.text()
                return r.status, (json.loads(text) if "json" in r.content_type else text), r.headers
        return asyncio.run(go())
    def ok(self, *args, **kw):
        s, d, _ = self.ask(*args, **kw)
        assert s < 300, d
        return d
    def until(self, path, done, seconds=60):
        end = time.monotonic()+seconds
        while time.monotonic() < end:
            if done(d := self.ok("GET", path)): return d
            time.sleep(.1)
        raise AssertionError(d)

@pytest.fixture(scope="module")
def api(tmp_path_factory):
    p = Platform(tmp_path_factory.mktemp("platform")/"home")
    yield p
    p.p.kill(); p.p.wait(30)
    assert "Traceback" not in (p.home/"err").read_text(), (p.home/"err").read_text()[-4000:]

def test_a_conversation_from_begin_to_end(api):
    c = api.ok("POST", "/conversations", dict(system="Be brief.", user_id="u1"), who="ann")
    x = api.ok("POST", f"/conversations/{c['id']}/messages", dict(content="Hello there"), who="ann")
    assert x["reply"]["content"] == "You said: Hello there" and x["reply"]["cost_usd"] == "0.000010" and x["reply"]["usage"] == dict(prompt_tokens=2, completion_tokens=3)
    text = api.ok("POST", f"/conversations/{c['id']}/messages", dict(content="word by word", stream=True), who="ann")
    names = [l[7:] for l in text.split("\n") if l.startswith("event: ")]
    assert names == ["delta"]*3+["message", "reply", "done"]
    rows = api.ok("GET", f"/conversations/{c['id']}/messages", who="ann")["data"]
    assert [(m["number"], m["role"]) for m in rows] == [(1, "system"), (2, "user"), (3, "assistant"), (4, "user"), (5, "assistant")]
    assert api.ok("GET", f"/conversations/{c['id']}", who="ann")["title"] == "Hello there"
    assert [h["text"] for h in api.ok("GET", "/search/conversations?q=said%20hello", who="ann")["data"]] == ["You said: Hello there"]

def test_nobody_sees_what_is_not_theirs(api):
    c = api.ok("POST", "/conversations", dict(title="secret plan"), who="ann")["id"]
    api.ok("POST", f"/conversations/{c}/messages", dict(content="the treasure is buried", reply=False), who="ann")
    for method, path, body in (("GET", "", None), ("GET", "/messages", None), ("POST", "/messages", dict(content="x")), ("DELETE", "", None)):
        assert api.ask(method, f"/conversations/{c}{path}", body, who="bob")[0] == 404
    assert c not in json.dumps(api.ok("GET", "/conversations?limit=100", who="bob")) and api.ok("GET", "/search/conversations?q=treasure", who="bob")["data"] == []
    assert api.ask("POST", "/agents/x/run", dict(input="?", conversation=c), who="bob")[0] == 404
    assert api.ok("GET", f"/conversations/{c}", who="admin")["title"] == "secret plan"

def test_what_fails_leaves_nothing_behind(api):
    c = api.ok("POST", "/conversations", dict(), who="ann")["id"]
    s, d, h = api.ask("POST", f"/conversations/{c}/messages", dict(content="x", model="nothing"), who="ann", x_request_id="req_mine")
    assert (s, d["code"], d["request_id"], h["x-request-id"]) == (404, "model_not_found", "req_mine", "req_mine") and h["content-type"] == "application/problem+json"
    text = api.ok("POST", f"/conversations/{c}/messages", dict(content="a b c", model="broken", stream=True), who="ann")
    assert "event: error" in text and "event: done" not in text
    rows = api.ok("GET", f"/conversations/{c}/messages", who="ann")["data"]
    assert [(m["role"], m["content"], m["finish"]) for m in rows] == [("user", "a b c", ""), ("assistant", "a b c ", "cut")]

def test_a_client_that_leaves_keeps_what_came(api):
    c = api.ok("POST", "/conversations", dict(), who="ann")["id"]
    raw = json.dumps(dict(content="one two three four five six seven eight", model="slow", stream=True)).encode()
    with socket.create_connection(("127.0.0.1", api.port)) as s:
        s.sendall(b"POST /conversations/%s/messages HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (c.encode(), api.keys["ann"].encode(), len(raw))+raw)
        got = b""
        while b"two" not in got: got += s.recv(4096)
    end = time.monotonic()+20
    while time.monotonic() < end and not (rows := api.ok("GET", f"/conversations/{c}/messages", who="ann")["data"]): time.sleep(.1)
    assert len(rows) == 2 and rows[1]["finish"] == "cut" and rows[1]["content"].startswith("one two") and "eight" not in rows[1]["content"]

def test_messages_at_once_get_different_numbers(api):
    c = api.ok("POST", "/conversations", dict(), who="ann")["id"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool: list(pool.map(lambda i: api.ok("POST", f"/conversations/{c}/messages", dict(content=f"m{i}"), who="ann"), range(12)))
    rows = api.ok("GET", f"/conversations/{c}/messages?limit=100", who="ann")["data"]
    assert [m["number"] for m in rows] == list(range(1, 25)) and sorted(m["content"] for m in rows if m["role"] == "user") == sorted(f"m{i}" for i in range(12))

def test_asking_twice_does_once(api):
    ask = lambda body: api.ask("POST", "/conversations", body, who="ann", idempotency_key="k-1")
    with concurrent.futures.ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda _: ask(dict(title="once")), range(4)))
    assert {s for s, *_ in got} <= {201, 409} and len({d["id"] for s, d, _ in got if s == 201}) == 1
    s, d, h = ask(dict(title="once"))
    assert s == 201 and h["x-soma-replayed"] == "1" and d["id"] == next(d["id"] for s, d, _ in got if s == 201)
    assert ask(dict(title="twice"))[0] == 422
    assert sum(c["title"] == "once" for c in api.ok("GET", "/conversations?limit=100", who="ann")["data"]) == 1
    assert api.ask("POST", "/keys", dict(name="x"), idempotency_key="k-2")[0] == 400     # a key is kept nowhere

def test_pages_cover_everything_once(api):
    made = {api.ok("POST", "/conversations", dict(user_id="pages"), who="bob")["id"] for _ in range(7)}
    seen, path = [], "/conversations?user_id=pages&limit=3"
    page = api.ok("GET", path, who="bob")
    api.ok("POST", "/conversations", dict(user_id="pages"), who="bob")     # what is added meanwhile shifts nothing
    while True:
        seen += [c["id"] for c in page["data"]]
        if not page["has_more"]: break
        page = api.ok("GET", f"{path}&cursor={page['next_cursor']}", who="bob")
    assert len(seen) == len(set(seen)) == 7 and set(seen) == made

def test_keys_and_scopes(api):
    assert api.ask("GET", "/me", who=None)[0] == 401
    for method, path, body, who in (("POST", "/agents", dict(name="a"), "ann"), ("POST", "/training/start", dict(trainer="sft"), "bob"), ("GET", "/keys", None, "writer"), ("GET", "/audit", None, "ann"), ("POST", "/conversations", {}, "writer"), ("POST", "/feedback", {}, "bob")):
        s, d, _ = api.ask(method, path, body, who=who)
        assert (s, d["code"]) == (403, "permission"), (path, d)
    k = api.ok("POST", "/keys", dict(name="short-lived", scopes=["read"]))
    api.keys["short"] = k["key"]
    assert api.ok("GET", "/me", who="short")["scopes"] == ["read"]
    api.ok("DELETE", f"/keys/{k['id']}?reason=test")
    assert api.ask("GET", "/me", who="short")[0] == 401
    assert k["key"] not in json.dumps(api.ok("GET", "/keys?limit=100")) and k["key"].encode() not in (api.home/"state.db").read_bytes()+(api.home/"state.db-wal").read_bytes()
    log = api.ok("GET", "/audit?limit=100")["data"]
    assert {"key.create", "key.revoke", "conversations.create"} <= {a["action"] for a in log} and any(a["action"] == "agents.create" and a["status"] == 403 for a in log)

ODD = ["'; DROP TABLE conversations; --", "..%2F..%2Fetc%2Fpasswd", "%00", "a%0d%0ax: y", "%F0%9F%92%A9", "{{7*7}}", "%25", "x"*3000, "conv_%27 OR 1=1", "-1"]
def test_odd_ids_are_refused_everywhere(api):
    doc = api.ok("GET", "/openapi.json", who=None)
    paths = [(m.upper(), p) for p, ops in doc["paths"].items() for m in ops if "{" in p and m in ("get", "delete")]
    assert len(paths) > 20
    def one(args):
        (method, p), odd = args
        for n in ("id", "name", "label", "version"): p = p.replace("{%s}" % n, odd.replace(" ", "%20").replace("{", "%7B").replace("}", "%7D").replace("'", "%27"))
        return method, p, api.ask(method, p)[0]
    with concurrent.futures.ThreadPoolExecutor(8) as pool: got = list(pool.map(one, [(p, o) for p in paths for o in ODD]))
    assert {s for *_, s in got} <= {404, 405, 422}, [g for g in got if g[2] not in (404, 405, 422)]
    assert api.ok("GET", "/conversations")["object"] == "list"

@pytest.mark.parametrize("raw, status", [(b"", 422), (b"{", 400), (b"[1]", 422), (b'{"title": NaN}', 400), (b'{"title": "\\ud800"}', 400), (b'{"title": "a\\u0000b"}', 400), (b'{"meta": '+b'{"a":'*100+b"1"+b"}"*101, 400),
    (b'{"title": 7}', 422), (b'{"titel": "x"}', 422), (b'{"title": "'+b"x"*2_000_000+b'"}', 413), (b"\xff\xfe{}", 400), (b'{"title": "ok", "title": "twice"}', 201)])
def test_odd_bodies(api, raw, status):
    s, d, _ = api.ask("POST", "/conversations", raw=raw, who="bob")
    assert s == status, d

def test_a_slow_body_is_not_waited_for_for_ever(api):
    "The others are answered meanwhile"
    with socket.create_connection(("127.0.0.1", api.port)) as s:
        s.sendall(b"POST /conversations HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{" % api.keys["bob"].encode())
        assert api.ask("GET", "/me", who="bob", timeout=5)[0] == 200

def test_training_is_asked_for_by_name_only(api):
    for bad in (dict(trainer="sft", dataset="nothing"), dict(trainer="os:system"), dict(trainer="sft", config=dict(base="/etc")), dict(trainer="sft", config=dict(base="../x")), dict(recipe="../../x"), dict(trainer="sft", config=dict(learning_rate="x")), {}):
        assert api.ask("POST", "/training/start", bad, who="writer")[0] == 422, bad
    assert api.ok("GET", "/training", who="ann")["data"] == [] and api.ask("GET", "/training/job_nothing", who="ann")[0] == 404

def test_an_experiment_over_http(api):
    x = api.ok("POST", "/ab-tests", dict(name="brief?", arms=[dict(name="today", model="fake/echo"), dict(name="brief", model="support")], metrics=[dict(name="success", mde=.02)]), who="writer")
    assert api.ask("POST", "/ab-tests", dict(name="brief?", arms=[dict(name="a"), dict(name="b")], metrics=[dict(name="success", mde=.02)]), who="writer")[0] == 409
    assert api.ok("POST", f"/ab-tests/{x['id']}/start", {}, who="writer")["status"] == "running"
    s, d, _ = api.ask("POST", f"/ab-tests/{x['id']}/start", {}, who="writer")
    assert s == 409 and "running" in d["detail"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda v: api.ask("POST", f"/ab-tests/{x['id']}/decide", dict(verdict=v, sentence=f"So it is: {v}."), who="writer")[0], ["keep", "no difference", "harm", "invalid"]))
    assert sorted(got) == [200, 409, 409, 409]
    assert api.ok("GET", "/ab-tests/brief%3F", who="ann")["status"] == "decided" and len(api.ok("GET", f"/ab-tests/{x['id']}/history", who="ann")["data"]) == 3

def test_what_cannot_be_deployed(api):
    assert api.ask("POST", "/deploy/support-desk", dict(target="kubernetes"), who="writer")[0] == 501 and api.ask("POST", "/deploy/nothing", {}, who="writer")[0] == 404
    assert api.ask("POST", "/deploy/support-desk", dict(alias="tiny"), who="writer")[0] == 409 and api.ask("POST", "/deploy/support-desk", dict(version="9.0.0"), who="writer")[0] == 404

@pytest.mark.slow
def test_a_model_is_deployed_for_real(tmp_path):
    "`soma serve` as it is: a version is made whole, served under its alias, and taken back"
    from somaagent.release.registry import Registry
    from somaagent.store.artifacts import Artifacts
    from somaagent.store.state import State
    home = tmp_path/"home"
    home.mkdir()
    Registry(st := State(f"sqlite:///{home/'state.db'}"), Artifacts(home/"artifacts"), home/"keys").ensure_base("support-desk", "tiny")
    st.close()
    with open(home/"err", "w") as err: p = subprocess.Popen([sys.executable, "-c", "from somaagent.serve.server import serve; serve(port=0, ship=False, warm=False, grace=5)"], stdout=subprocess.PIPE, stderr=err, text=True, env={**os.environ, "SOMA_STORES_HOME": str(home)})
    try:
        ready = next((l for l in p.stdout if l.startswith("Ready")), "")
        assert ready, (home/"err").read_text()[-2000:]
        g = Platform.__new__(Platform)
        g.home, g.url, g.keys = home, ready.split()[1].removesuffix("/v1"), dict(admin=json.loads((home/"credentials.json").read_text())["api_key"])
        d = g.ok("POST", "/api/v1/deploy/support-desk", dict(alias="support"), timeout=60)
        assert d["status"] == "preparing" and g.ask("POST", "/api/v1/deploy/support-desk", dict(alias="support"))[0] == 409
        got = g.until(f"/api/v1/deployments/{d['id']}", lambda x: x["status"] != "preparing" and (x["served"] or x["status"] == "failed"), 300)
        assert got["status"] == "ready" and got["served"], got
        folder = home/"deployments"/d["id"]
        assert (folder/"config.json").exists() and list(folder.glob("*.safetensors"))
        talk = dict(model="support", messages=[dict(role="user", content="Where is order 1234?")], max_tokens=8)
        s, said, h = g.ask("POST", "/v1/chat/completions", talk, timeout=120)
        assert s == 200 and said["usage"]["completion_tokens"] > 0 and h["x-soma-model"] == "deployed/support" and str(home) not in json.dumps(said)
        assert g.ok("GET", f"/api/v1/deployments/{d['id']}/health")["ok"]
        assert g.ok("DELETE", f"/api/v1/deployments/{d['id']}")["status"] == "removed" and not folder.exists()
        end = time.monotonic()+20
        while time.monotonic() < end and g.ask("POST", "/v1/chat/completions", talk)[0] != 404: time.sleep(.2)
        assert g.ask("POST", "/v1/chat/completions", talk)[0] == 404
        assert {a["action"] for a in g.ok("GET", f"/api/v1/audit?target={d['id']}")["data"]} == {"deployments.create", "deployments.delete"}
        job = g.ok("GET", "/api/v1/jobs?kind=deploy")["data"][0]
        assert (job["status"], job["outputs"]) == ("completed", dict(deployment=d["id"]))
    finally:
        p.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired): p.wait(30)
        p.kill()

def test_a_workflow_runs_in_a_worker_and_ends_on_demand(api):
    where = api.home/"workflows"
    where.mkdir(exist_ok=True)
    cells = [nbformat.v4.new_code_cell("seconds = 0", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell("import time; time.sleep(seconds)\nfrom somaagent.runs.record import current_run\ncurrent_run().output('answer', 42)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))), where/"nap.ipynb")
    (where/"nap.yaml").write_text("name: nap\nparams: {seconds: {type: int, default: 0}}\nstages: [{id: first, notebook: nap.ipynb, outputs: [answer]}, {id: nap, notebook: nap.ipynb, params: {seconds: '${seconds}'}, outputs: [answer], needs: [first]}]\n")
    j = api.ok("POST", "/workflows/nap/start", dict(params=dict(seconds=300)), who="writer")
    now = api.until(f"/workflows/{j['id']}/status", lambda x: x["stages"] and x["stages"][1]["status"] == "running", 300)
    assert now["status"] == "running" and now["run"] and now["stages"][0]["status"] == "completed", now
    api.ok("POST", f"/workflows/{j['id']}/cancel", who="writer")
    assert api.until(f"/jobs/{j['id']}", lambda x: x["status"] != "running")["status"] == "cancelled"

def test_the_document_keeps_its_word(api):
    "schemathesis: what the document allows and what it forbids, for every operation; no 500, no hang, statuses and types as written"
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import CHECKS, load_all_checks
    load_all_checks()
    left = [CHECKS.get_one(n) for n in ("ignored_auth", "positive_data_acceptance")]   # the key is ours; a valid form can name what is not there
    wrong, n = [], 0
    for r in schemathesis.openapi.from_url(api.url+"/openapi.json").get_all_operations():
        op = r.ok()
        @settings(max_examples=2, deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=op.as_strategy())
        def check(case):
            nonlocal n
            n += 1
            resp = case.call(headers={"authorization": f"Bearer {api.keys['admin']}"}, timeout=20)
            if resp.status_code == 501: return
            try: case.validate_response(resp, excluded_checks=left)
            except Exception as e: wrong.append(f"{op.label}: {e}")
        check()
    assert n > 100 and not wrong, "\n".join(wrong[:5])

def test_forgetting_a_user_takes_their_conversations(tmp_path, monkeypatch):
    from somaagent.data.forget import forget_user
    from somaagent.serve.asking import call
    from somaagent.serve.keys import Keys
    from somaagent.serve.platform import app
    from somaagent.store.cache import Cache
    from somaagent.store.state import State
    from somaagent.store.warehouse import Warehouse
    home = tmp_path/"home"
    monkeypatch.setenv("SOMA_STORES_HOME", str(home))
    with Warehouse(f"chdb://{tmp_path/'wh'}", mode="direct") as wh:
        st = State(f"sqlite:///{home/'state.db'}")
        keys = Keys(st)
        key = dict(authorization=keys.create("shop", ["chat"])[0])
        web = app(st, keys, None, wh, home=home)
        for user in ("vane", "ash"):
            made = call(web, "POST", "/conversations", json=dict(user_id=user, title=f"{user} has a question"), headers=key | {"idempotency-key": user}).json()
            call(web, "POST", f"/conversations/{made['id']}/messages", json=dict(content=f"{user}: the blue elephant", reply=False), headers=key)
        assert {f["path"]: f["what"] for f in forget_user("vane", wh, st, Cache(tmp_path/"cache"), home=home, dry_run=True).files}["state conversations"] == "1 rows"
        rep = forget_user("vane", wh, st, Cache(tmp_path/"cache"), home=home)
        assert not rep.left and {"state conversations", "state conversation_messages", "state idempotency"} <= {f["path"] for f in rep.files}
        left = call(web, "GET", "/conversations", headers=key).json()["data"]
        assert [c["user_id"] for c in left] == ["ash"] and len(call(web, "GET", "/search/conversations?q=elephant", headers=key).json()["data"]) == 1
        st.close()
        assert b"vane" not in b"".join(p.read_bytes() for p in home.glob("state.db*"))
