"""Parts of the gateway in this process, where what happens seldom can be made to happen: full disks, children that die, providers' answers of odd kinds, news that cannot be read."""
import asyncio, json, os, stat, sys, time

import pytest

def lines(root): return [json.loads(l) for f in sorted(root.glob("sp_*/*.*l*")) if f.name != "lock" for l in f.read_text().splitlines()]

def test_a_file_that_cannot_be_renamed_costs_no_row_and_doubles_none(tmp_path, monkeypatch):
    from somaagent.serve.spool import Spool
    fails, rename = [3], os.rename
    def flaky(a, b):
        if str(b).endswith(".jsonl") and fails[0] > 0: fails[0] -= 1; raise OSError(28, "No space left on device")
        return rename(a, b)
    monkeypatch.setattr(os, "rename", flaky)
    s = Spool(tmp_path, group=.01, segment=1, age=.1)
    for i in range(8): s.append(dict(id=i)); time.sleep(.04)
    asyncio.run(s.flushed(seconds=5))
    assert s.threads[0].is_alive() and fails[0] == 0
    s.close(5)
    assert [r["id"] for r in lines(tmp_path)] == list(range(8)) and not list(tmp_path.glob("*/*.open"))

def test_an_idle_spool_survives_a_rename_that_fails(tmp_path, monkeypatch):
    from somaagent.serve.spool import Spool
    fails, rename = [1], os.rename
    def flaky(a, b):
        if str(b).endswith(".jsonl") and fails[0] > 0: fails[0] -= 1; raise OSError(5, "Input/output error")
        return rename(a, b)
    monkeypatch.setattr(os, "rename", flaky)
    s = Spool(tmp_path, group=.01, age=.1)
    s.append(dict(id=1)); time.sleep(.5)          # the file grows old while nothing comes
    s.append(dict(id=2))
    asyncio.run(s.flushed(seconds=5))
    s.close(5)
    assert [r["id"] for r in lines(tmp_path)] == [1, 2]

def test_a_disk_that_never_comes_back_is_said_and_not_waited_for(tmp_path, monkeypatch):
    from somaagent.core.errors import StoreError
    from somaagent.serve.spool import Spool
    s = Spool(tmp_path, group=.01)
    def never(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", never)
    n = s.append(dict(id=1))
    with pytest.raises(StoreError, match="not on disk yet"): asyncio.run(s.flushed(n, seconds=.3))
    assert not s.loops
    monkeypatch.undo()
    asyncio.run(s.flushed(n, seconds=5)); s.close(5)
    assert [r["id"] for r in lines(tmp_path)] == [1]

def test_a_carrier_never_takes_a_spool_that_is_just_being_made(tmp_path, monkeypatch):
    import fcntl
    from somaagent.serve.spool import Carrier, Spool
    flock, c = fcntl.flock, Carrier(tmp_path, lambda rows, token: None)
    def between(fd, how):
        if how == fcntl.LOCK_EX: c.once()         # somebody ships, in the moment before the lock
        return flock(fd, how)
    monkeypatch.setattr(fcntl, "flock", between)
    s = Spool(tmp_path, group=.01)
    s.append(dict(id=1))
    asyncio.run(s.flushed(seconds=5)); s.close(5)
    assert [r["id"] for r in lines(tmp_path)] == [1]

def test_rows_that_are_put_aside_are_for_their_owner_alone_and_said(tmp_path, caplog):
    from somaagent.serve.spool import Carrier, Spool
    s = Spool(tmp_path, group=.01)
    s.append(dict(id=1, prompt="my secret")); s.close(5)
    def wrong(rows, token): raise ValueError("no such field")
    Carrier(tmp_path, wrong).once()
    bad = tmp_path/"bad"/"rows.jsonl"
    assert "my secret" in bad.read_text() and stat.S_IMODE(bad.stat().st_mode) == 0o600

def dying(tmp_path, monkeypatch):
    "A child that ends at once"
    from somaagent.serve.staff import Child
    (tmp_path/"dies.py").write_text("def main(): raise SystemExit(3)\n")
    return Child("dies", env=dict(PYTHONPATH=str(tmp_path)))

def test_a_child_that_dies_at_once_is_not_started_in_a_loop_whoever_asks(tmp_path, monkeypatch):
    c, n = dying(tmp_path, monkeypatch), [0]
    run = c._run if hasattr(c, "_run") else c.start
    def counted(): n[0] += 1; return run()
    monkeypatch.setattr(c, "_run" if hasattr(c, "_run") else "start", counted)
    async def go():
        c.start()
        keeper, end = asyncio.ensure_future(c.watch(.02)), time.monotonic()+1.5
        while time.monotonic() < end: c.start(); await asyncio.sleep(.01)      # as with every request for a local model
        c.closing = True
        await asyncio.wait([keeper], timeout=12)
    asyncio.run(go()); c.close(2)
    assert 2 <= n[0] <= 5, n

def test_whoever_looks_after_a_child_never_gives_up(tmp_path, monkeypatch):
    c = dying(tmp_path, monkeypatch)
    c.start(); c.p.wait()
    c.quick, slept, started = 5000, [], []
    async def go():
        sleep = asyncio.sleep
        async def fast(s): slept.append(s); await sleep(0)
        monkeypatch.setattr(asyncio, "sleep", fast)
        def run():
            started.append(1)
            if len(started) == 1: raise OSError(11, "Resource temporarily unavailable")
            c.closing = True
        monkeypatch.setattr(c, "_run", run)
        await c.watch(0)
    asyncio.run(go()); c.close(2)
    assert len(started) == 2 and max(slept) == 10

def test_each_request_to_a_provider_has_its_own_trace(tmp_path):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from types import SimpleNamespace
    from somaagent.serve.config import Provider, Trace
    from somaagent.serve.trace import Tracing
    from somaagent.serve.upstream import Upstream
    t, up = Tracing(Trace("http://127.0.0.1:9/v1/traces"), InMemorySpanExporter()), Upstream(Provider("p", base_url="http://127.0.0.1:9/v1"))
    async def nothing(*a): pass
    t.attach(SimpleNamespace(ups=dict(p=up), tests=SimpleNamespace(route=None), router=SimpleNamespace(route=None), spool=SimpleNamespace(append=None), _log=None, close=nothing))
    heads = []
    for name in ("one", "two"):
        span = t.begin(name)
        with t.within(span): heads.append((f"{span.get_span_context().span_id:016x}", up.head("/chat/completions").decode()))
        span.end()
    t.close(.1)
    assert all(f"-{i}-0" in h.partition("traceparent: ")[2] for i, h in heads), heads

class Odd:
    "A provider whose answer is what the test says"
    def __init__(self, raw, stream=False):
        from somaagent.serve.config import Provider
        from somaagent.serve.upstream import Upstream
        self.raw, self.stream = raw, stream
        self.server = self.up = None
        self.make = lambda port: Upstream(Provider("odd", base_url=f"http://127.0.0.1:{port}/v1", tries=1))
    async def __aenter__(self):
        async def serve(r, w):
            await r.readuntil(b"\r\n\r\n")
            raw = self.raw if isinstance(self.raw, bytes) else json.dumps(self.raw).encode()
            w.write(b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (b"text/event-stream" if self.stream else b"application/json", len(raw))+raw)
            await w.drain(); w.close()
        self.server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.up = self.make(self.server.sockets[0].getsockname()[1])
        return self.up
    async def __aexit__(self, *_): await self.up.close(); self.server.close()

def gateway(tmp_path, up, limits, models={"odd/x": dict(price=dict(input=1, output=1)), "odd/v": dict(kind="embed", price=dict(input=1))}, **kw):
    from somaagent.serve.access import SCOPES, Access, hashed
    from somaagent.serve.config import check
    from somaagent.serve.gateway import Gateway
    from somaagent.serve.spool import Spool
    keys = Access()
    keys.take([dict(id="k", hash=hashed("soma_key"), name="k", scopes=list(SCOPES), app="a", limits=limits, expires=None, spent="0")])
    cfg = check(dict(providers=dict(odd=dict(base_url=up.p.base_url if up else "http://127.0.0.1:9/v1", tries=1)), models=models))
    return Gateway(cfg, keys, Spool(tmp_path/"spool", group=.01), ups=dict(odd=up) if up else None, **kw)

async def ask(g, body, path="/v1/chat/completions", method="POST", client=("127.0.0.1", 1), headers={}):
    "(status, headers, body) of a request to a gateway of this process"
    out = []
    sent = [dict(type="http.request", body=json.dumps(body).encode(), more_body=False)]
    async def receive(): return sent.pop() if sent else await asyncio.sleep(60)
    async def send(m): out.append(m)
    h = {"authorization": "Bearer soma_key", **headers}
    await g(dict(type="http", path=path, method=method, client=client, headers=[(k.encode(), v.encode()) for k, v in h.items() if v]), receive, send)
    return out[0]["status"], {k.decode(): v.decode() for k, v in out[0]["headers"]}, b"".join(m.get("body", b"") for m in out[1:])

talk = lambda model="odd/x", **kw: dict(model=model, messages=[dict(role="user", content="Hi")], **kw)
choice = lambda **m: dict(id="c", choices=[dict(index=0, message=dict(dict(role="assistant", content="ok"), **m), finish_reason="stop")])
event = lambda **d: b"data: "+json.dumps(dict(id="c", choices=[dict(index=0, delta=d, finish_reason=None)])).encode()+b"\n\n"

@pytest.mark.parametrize("raw,path,stream", [(choice(content=7), "", False), (choice(content=["a"]), "", False), (choice(content=None, tool_calls=[7]), "", False), (choice(content=None, tool_calls=[dict(id="x", type="function", function=dict(name="f"))]), "", False), (choice(tool_calls="x"), "", False),
    (dict(data=[dict(embedding=[1.])], usage=[3]), "/v1/embeddings", False), (dict(data=[dict(embedding=[1.])], usage=dict(prompt_tokens="many")), "/v1/embeddings", False), (dict(data=[dict(embedding=7)]), "/v1/embeddings", False),
    (event(content=["a"])+event(content="b"), "", True), (event(content=7), "", True), (event(tool_calls=[7]), "", True), (event(tool_calls=[dict(index="a", id="x")])+event(tool_calls=[dict(index=0, id="y")]), "", True), (event(tool_calls=[dict(index=0, function=dict(arguments=[1]))]), "", True)])
def test_odd_answers_are_logged_and_hold_nothing(tmp_path, raw, path, stream):
    async def go():
        async with Odd(raw, stream) as up:
            g = gateway(tmp_path, up, dict(concurrent=1, dollars="1"))
            await g.books.learn(list(g.config.models.values()))
            got = await ask(g, dict(model="odd/v", input="x") if path else talk(stream=stream), path or "/v1/chat/completions")
            l = g.keys.check("soma_key").limits
            await g.spool.flushed(seconds=5)
            held = l.running, l.budget.held, g.running, g.streams
            g.spool.close(5)
            return got, held
    (status, h, body), held = asyncio.run(go())
    assert held == (0, 0, 0, 0) and len(rows := lines(tmp_path/"spool")) == 1, (held, rows)
    assert status == 502 or status == 200 and (b'"error"' in body) == stream, (status, body)
    assert rows[0]["status"] == ("ok" if status == 200 and not stream else "error")

def test_a_key_that_was_revoked_is_gone_whatever_is_wrong_with_the_rest(tmp_path):
    from somaagent.serve.access import AuthError
    news = [dict(deployed=dict(models=7, aliases={}), experiments=[], keys=[])]
    async def heard(): return news[0]
    g = gateway(tmp_path, None, {}, news=heard)
    g.digest = "old"
    with pytest.raises(Exception): asyncio.run(g.refresh())
    with pytest.raises(AuthError): g.keys.check("soma_key")
    assert g.digest == ""            # and it is asked for again, not taken for known
    g.spool.close(5)

def test_a_budget_is_not_spent_on_what_nobody_can_price(tmp_path):
    async def go():
        async with Odd(choice()) as up:
            g = gateway(tmp_path, up, dict(dollars="1"), {"odd/x": None, "odd/priced": dict(price=dict(input=0, output=0)), "odd/falls": dict(price=dict(input=1), fallbacks=["odd/x"])})
            got = [(await ask(g, talk(m)))[0] for m in ("odd/x", "odd/falls", "odd/any", "odd/priced")]
            async def away(items): raise __import__("somaagent.core.errors", fromlist=["x"]).StoreError("no office")
            g.books.prices.clear(); g.books.ask = away
            got += [(await ask(g, talk(m)))[0] for m in ("odd/x", "odd/priced")]
            g.spool.close(5)
            return got
    assert asyncio.run(go()) == [403, 403, 403, 200, 503, 200]

def test_slow_bodies_do_not_hold_the_way_to_the_office(tmp_path):
    from aiohttp import ClientSession, UnixConnector, web
    from somaagent.serve.staff import Onward
    async def go():
        async def echo(r): return web.Response(body=await r.read())
        app = web.Application(); app.router.add_post("/x", echo)
        runner = web.AppRunner(app); await runner.setup()
        await web.UnixSite(runner, str(tmp_path/"s")).start()
        class Child:
            def link(self): return session
        async with ClientSession(connector=UnixConnector(str(tmp_path/"s"))) as session:
            o, out = Onward(Child(), patience=.2), []
            async def send(m): out.append(m)
            def scope(n): return dict(type="http", method="POST", path="/x", headers=[(b"content-length", b"%d" % n)])
            sent, t = [dict(type="http.request", body=b"a", more_body=True)], time.monotonic()
            async def never(): return sent.pop() if sent else await asyncio.sleep(60)
            await asyncio.wait_for(o(scope(10), never, send), 5)
            async def drips(): await asyncio.sleep(.05); return dict(type="http.request", body=b"a", more_body=True)
            await asyncio.wait_for(o(scope(1000), drips, send), 5)
            took = time.monotonic()-t
            parts = [dict(type="http.request", body=b"ab", more_body=i < 4) for i in range(5)]
            async def fine(): await asyncio.sleep(.01); return parts.pop(0)
            await o(scope(10), fine, send)
        await runner.cleanup()
        return [m["status"] for m in out if "status" in m], out[-2].get("body") or out[-1].get("body"), took
    statuses, body, took = asyncio.run(go())
    assert statuses == [408, 408, 200] and body == b"ab"*5 and took < 3

def test_what_it_says_of_itself_is_for_this_machine_or_a_key(tmp_path):
    async def go():
        async with Odd(choice()) as up:
            g = gateway(tmp_path, up, {})
            await ask(g, talk())
            here, there, keyed = dict(headers=dict(authorization="")), dict(client=("10.0.0.7", 9), headers=dict(authorization="")), dict(client=("10.0.0.7", 9))
            proxied = dict(headers={"authorization": "", "x-forwarded-for": "10.0.0.7"})
            get = lambda path, **kw: ask(g, {}, path, "GET", **kw)
            out = [(p, [await get(p, **kw) for kw in (here, dict(client=("::ffff:127.0.0.1", 1), headers=dict(authorization="")), keyed, there, proxied)]) for p in ("/metrics", "/readyz", "/healthz")]
            g.spool.close(5)
            return dict(out)
    got = asyncio.run(go())
    assert [s for s, *_ in got["/metrics"]] == [200, 200, 200, 401, 401] and all(b"odd" in b for _, _, b in got["/metrics"][:3]) and not any(b"odd" in b for _, _, b in got["/metrics"][3:])
    assert [s for s, *_ in got["/readyz"]] == [200]*5 and [json.loads(b) == dict(status="ready") for _, _, b in got["/readyz"]] == [False, False, False, True, True]
    assert [json.loads(b) for _, _, b in got["/healthz"]] == [dict(status="ok")]*5

def test_a_request_whose_client_left_keeps_its_place_while_it_goes_on(tmp_path):
    async def go():
        async with Odd(choice()) as up:
            g, free = gateway(tmp_path, up, {}), asyncio.Event()
            async def slow(body, left): await free.wait(); return choice()
            up.chat = slow
            tasks = [asyncio.ensure_future(ask(g, talk(user=str(i)), headers={"idempotency-key": f"k{i}"})) for i in range(3)]
            await asyncio.sleep(.05)
            before = g.running
            for t in tasks[:2]: t.cancel()
            await asyncio.gather(*tasks[:2], return_exceptions=True)
            during, held = g.running, len(g.background)
            free.set()
            await tasks[2]; await asyncio.sleep(.02)
            await g.spool.flushed(seconds=5); g.spool.close(5)
            return before, during, held, g.running, len(g.background)
    assert asyncio.run(go()) == (3, 3, 2, 0, 0) and [r["status"] for r in lines(tmp_path/"spool")] == ["ok"]*3

def test_names_with_line_breaks_break_no_header():
    from somaagent.serve.http import _raw
    assert _raw({"x-soma-route": "experiment a\r\nx-evil: 1/b\x00", "content-length": 7, "x-a": "é🎈"}) == [(b"x-soma-route", b"experiment a  x-evil: 1/b "), (b"content-length", b"7"), (b"x-a", b"\xe9?")]

@pytest.mark.parametrize("base", ["http://h:99999/v1", "http://h:x/v1", "http://h/v1?api-version=1", "http://h/v1#x", "http://h/a b/v1", "http://h/v1\r\nx: y", "http://hö/v1", "http://h:0/v1"])
def test_addresses_of_providers_are_checked_at_the_start(base):
    from somaagent.core.errors import SettingsError
    from somaagent.serve.config import check
    with pytest.raises(SettingsError, match="base_url"): check(dict(providers=dict(p=dict(base_url=base))))

def test_a_proxy_that_is_not_used_is_named(monkeypatch):
    from somaagent.serve.config import Provider
    from somaagent.serve.upstream import Upstream, UpstreamError
    for k in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"): monkeypatch.delenv(k, raising=False); monkeypatch.delenv(k.lower(), raising=False)
    p = Provider("far", base_url="https://provider.invalid/v1", connect_s=2)
    async def go():
        with pytest.raises(UpstreamError) as e: await Upstream(p).post("/x", {})
        return str(e.value)
    assert "proxy" not in asyncio.run(go()).lower()
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@10.0.0.1:3128")
    said = asyncio.run(go())
    assert "does not use HTTPS_PROXY" in said and "secret" not in said
    monkeypatch.setenv("NO_PROXY", ".invalid")
    assert Upstream(p).proxy() == "" and Upstream(Provider("near", base_url="https://127.0.0.1/v1")).proxy() == ""
