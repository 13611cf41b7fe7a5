"""What the gateway costs per request: requests a second per core, added latency, streams, memory.

    python benchmarks/gateway.py                  ours and the limit, a few minutes
    python benchmarks/gateway.py --requests 2000  shorter
    python benchmarks/gateway.py --memory 50000   memory after so many more requests
    python benchmarks/gateway.py --peer 'SCRATCH/bin/litellm'   LiteLLM's proxy beside them, in turn, from an environment of its own

A mock provider in raw asyncio answers at once (one process); the loader (another process) keeps `c` connections busy; the gateway is a third, with everything on: keys, limits and a budget, retries, fallback, prices,
metrics, and the durable log. The limit is a bare pass-through without any of that: raw ASGI on the same server, aiohttp towards the provider. `CPU µs` is the gateway process's own user+system time per request, read
from /proc before and after, the median of the rounds, so a busy machine disturbs it less than the clock (it still makes it larger); requests/s per core is its inverse. Our office process (stores, shipping) is shown apart.
Added latency is the median (99th percentile) through the gateway minus that of asking the mock directly, one connection, in alternating rounds; both are measured by the same loader.
"""
import argparse, asyncio, json, os, platform, re, signal, statistics as st, subprocess, sys, tempfile, time
from pathlib import Path

ANSWER = json.dumps(dict(id="chatcmpl-1", object="chat.completion", created=1, model="echo", choices=[dict(index=0, message=dict(role="assistant", content="Your order is on its way. "*4), finish_reason="stop")], usage=dict(prompt_tokens=40, completion_tokens=28, total_tokens=68))).encode()
def _piece(delta, finish=None): return b"data: " + json.dumps(dict(id="chatcmpl-1", object="chat.completion.chunk", created=1, model="echo", choices=[dict(index=0, delta=delta, finish_reason=finish)])).encode() + b"\n\n"
PIECES = [_piece(dict(role="assistant", content="")), *[_piece(dict(content="word ")) for _ in range(40)], _piece({}, "stop"), b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"echo","choices":[],"usage":{"prompt_tokens":40,"completion_tokens":40,"total_tokens":80}}\n\ndata: [DONE]\n\n']
BODY = dict(model="mock/echo", messages=[dict(role="system", content="You answer questions about orders."), dict(role="user", content="Where is my order 4711? It should have been here on Monday.")], max_tokens=64)

class Mock(asyncio.Protocol):
    "A provider: HTTP/1.1 with content-length, keep-alive"
    def connection_made(self, t): self.t, self.buf = t, b""
    def data_received(self, data):
        self.buf += data
        while (i := self.buf.find(b"\r\n\r\n")) >= 0:
            m = re.search(rb"content-length: *(\d+)", self.buf[:i], re.I)
            n = i+4+int(m[1] if m else 0)
            if len(self.buf) < n: return
            body, self.buf = self.buf[i+4:n], self.buf[n:]
            if b'"stream":true' in body.replace(b" ", b""): asyncio.ensure_future(self.stream())
            else: self.t.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER)
    async def stream(self):
        self.t.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for p in PIECES: self.t.write(b"%x\r\n%s\r\n" % (len(p), p)); await asyncio.sleep(0)
        self.t.write(b"0\r\n\r\n")

async def mock():
    s = await asyncio.get_running_loop().create_server(Mock, "127.0.0.1", 0)
    print(s.sockets[0].getsockname()[1], flush=True)
    await s.serve_forever()

async def read_answer(r):
    "Status, first byte of the body (time), bytes; understands content-length and chunked"
    head = await r.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    if m := re.search(rb"content-length: *(\d+)", head, re.I): return status, None, len(await r.readexactly(int(m[1])))
    n, first = 0, None
    while size := int((await r.readline()).strip(), 16):
        await r.readexactly(size+2)
        first, n = first or time.perf_counter(), n+size
    await r.readexactly(2)
    return status, first, n

async def load(port, key, n, c, stream=False):
    "n requests over c connections: dict(ms, first_ms, wall, bad)"
    body = json.dumps(dict(BODY, stream=True) if stream else BODY).encode()
    req = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: Bearer %s\r\ncontent-length: %d\r\n\r\n" % (key.encode(), len(body)) + body
    ms, first, bad, left, seen = [], [], 0, n, set()
    async def one():
        nonlocal left, bad
        r, w = await asyncio.open_connection("127.0.0.1", port)
        while left > 0:
            left -= 1
            t = time.perf_counter(); w.write(req)
            status, f, _ = await read_answer(r)
            ms.append((time.perf_counter()-t)*1000); bad += status != 200; seen.add(status)
            if f: first.append((f-t)*1000)
        w.close()
    t = time.perf_counter()
    await asyncio.gather(*[one() for _ in range(c)])
    return dict(ms=ms, first=first, wall=time.perf_counter()-t, bad=bad, status=seen)

def cpu(pid):
    f = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(f[11])+int(f[12]))/os.sysconf("SC_CLK_TCK")
def rss(pid): return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])/1024
def pct(v, p): return sorted(v)[min(len(v)-1, int(len(v)*p))]

def start(args, env=None, until=None, cwd=None):
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **(env or {})}, cwd=cwd)
    for line in p.stdout:
        if until is None or (m := re.search(until, line)): return p, line if until is None else m
    raise SystemExit(f"{args[0]} did not start")

def ours(home, mock_port):
    (home/"gateway.yaml").write_text(f"providers:\n  mock: {{base_url: 'http://127.0.0.1:{mock_port}/v1'}}\nmodels:\n  mock/echo: {{price: {{input: 0.15, output: 0.60}}, fallbacks: [tiny]}}\n")
    t = time.perf_counter()
    p, m = start([sys.executable, "-c", "from somaagent.serve.server import serve; serve(port=0, ship=False, warm=False)"], dict(SOMA_STORES_HOME=str(home)), r"Ready: http://127.0.0.1:(\d+)")
    took = time.perf_counter()-t
    code = "from somaagent.serve.keys import Keys; print(Keys().create('bench', limits=dict(rpm=1e9, tpm=1e12, dollars=1e6, concurrent=1000))[0])"
    key = subprocess.run([sys.executable, "-c", code], env={**os.environ, "SOMA_STORES_HOME": str(home)}, capture_output=True, text=True, check=True).stdout.strip()
    for _ in range(100):     # keys are read again every second
        if not asyncio.run(load(int(m[1]), key, 1, 1))["bad"]: return p, int(m[1]), key, took
        time.sleep(.2)
    raise SystemExit("the new key was not taken")

def start_again(home):
    t = time.perf_counter()
    p, m = start([sys.executable, "-c", "from somaagent.serve.server import serve; serve(port=0, ship=False, warm=False)"], dict(SOMA_STORES_HOME=str(home)), r"Ready: http://127.0.0.1:(\d+)")
    took = time.perf_counter()-t
    p.send_signal(signal.SIGTERM); p.wait(60)
    return took, p

def children(pid): return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t/"children").read_text().split()]

def peer(exe, home, mock_port):
    (home/"litellm.yaml").write_text(json.dumps(dict(model_list=[dict(model_name="mock/echo", litellm_params=dict(model="openai/echo", api_base=f"http://127.0.0.1:{mock_port}/v1", api_key="x"))], general_settings=dict(master_key="sk-bench"))))
    port, t = 18345, time.perf_counter()
    p = subprocess.Popen([exe, "--config", str(home/"litellm.yaml"), "--port", str(port), "--num_workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"})
    while True:
        try:
            if not asyncio.run(load(port, "sk-bench", 1, 1))["bad"]: break
        except OSError: time.sleep(.5)
        if p.poll() is not None or time.perf_counter()-t > 180: raise SystemExit("the peer did not start")
    return p, port, "sk-bench", time.perf_counter()-t

BARE = """
import sys, json, aiohttp, uvicorn
base, session = sys.argv[1], None
async def app(scope, receive, send):
    global session
    if scope["type"] != "http": return
    session = session or aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)
    body, more = b"", True
    while more: m = await receive(); body += m.get("body", b""); more = m.get("more_body")
    async with session.post(base+"/chat/completions", data=body, headers={"content-type": "application/json"}) as r:
        await send(dict(type="http.response.start", status=r.status, headers=[(k, v) for k, v in r.raw_headers if k.lower() in (b"content-type", b"content-length")]))
        async for part in r.content.iter_any(): await send(dict(type="http.response.body", body=part, more_body=True))
        await send(dict(type="http.response.body", body=b""))
class Server(uvicorn.Server):
    async def startup(self, sockets=None): await super().startup(sockets); print("Ready:", self.servers[0].sockets[0].getsockname()[1], flush=True)
Server(uvicorn.Config(app, port=0, loop="uvloop", http="httptools", lifespan="off", access_log=False, log_level="warning", date_header=False, server_header=False)).run()
"""

def bare(mock_port):
    t = time.perf_counter()
    p, m = start([sys.executable, "-c", BARE, f"http://127.0.0.1:{mock_port}/v1"], None, r"Ready: (\d+)")
    return p, int(m[1]), "x", time.perf_counter()-t

def measure(name, p, port, key, took, mock_port, n, rounds):
    go = lambda *a, **kw: asyncio.run(load(port, key, *a, **kw))
    if (got := go(max(20, n//20), 8))["bad"]: raise SystemExit(f"{name}: {got['bad']} requests failed: {got['status']}")
    out, each = dict(name=name, ready=took, start=rss(p.pid)), dict(one=[], many=[], stream=[])
    direct, through, first, first0 = [], [], [], []
    for _ in range(rounds):
        for what, kw in (("one", dict(c=1)), ("many", dict(c=32)), ("stream", dict(c=8, stream=True))):
            k = max(32, n//rounds//(8 if what == "stream" else 1))
            a = cpu(p.pid); got = go(k, **kw); b = cpu(p.pid)
            if got["bad"]: raise SystemExit(f"{name}, {what}: {got['bad']} of {k} failed: {got['status']}")
            each[what].append((b-a)/k*1e6)
            if what == "one": through += got["ms"]; direct += asyncio.run(load(mock_port, key, k, 1))["ms"]
        first += go(20, 1, stream=True)["first"]; first0 += asyncio.run(load(mock_port, key, 20, 1, stream=True))["first"]
    out |= {k: st.median(v) for k, v in each.items()} | dict(p50=pct(through, .5)-pct(direct, .5), p99=pct(through, .99)-pct(direct, .99), first=st.median(first)-st.median(first0), rss=rss(p.pid))
    print(f"  {name}: done, load {os.getloadavg()[0]:.1f}", flush=True)
    return out

def table(rows):
    "Markdown; the last column of ratios is against the first row"
    print("\n| gateway | CPU µs per request, c=1 | c=32 | requests/s per core, c=32 | added p50 / p99 ms, c=1 | CPU µs per 40-piece stream | first piece later by, ms | MB at the start / end | ready after, s |\n|---|---|---|---|---|---|---|---|---|")
    for r in rows: print(f"| {r['name']} | {r['one']:,.0f} | {r['many']:,.0f} | {1e6/r['many']:,.0f} | {r['p50']:.2f} / {r['p99']:.2f} | {r['stream']:,.0f} | {r['first']:.2f} | {r['start']:.0f} / {r['rss']:.0f} | {r['ready']:.2f} |")
    a = rows[0]
    for r in rows[1:]: print(f"\n{r['name']} : {a['name']} = CPU {r['one']/a['one']:.1f} (c=1), {r['many']/a['many']:.1f} (c=32), streams {r['stream']/a['stream']:.1f}, memory {r['rss']/a['rss']:.1f}", end="")
    print(flush=True)

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--requests", type=int, default=6000); a.add_argument("--rounds", type=int, default=5); a.add_argument("--peer"); a.add_argument("--peer-requests", type=int, default=600)
    a.add_argument("--memory", type=int, default=0, help="so many more requests at c=32, to see whether memory grows"); a.add_argument("--mock", action="store_true", help=argparse.SUPPRESS)
    o = a.parse_args()
    if o.mock: return asyncio.run(mock())
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d %H:%M')}")
    m, line = start([sys.executable, __file__, "--mock"])
    mock_port, running, rows = int(line), [m], []
    try:
        with tempfile.TemporaryDirectory() as d:
            p, *rest = ours(Path(d), mock_port); running.append(p)
            again, _ = start_again(Path(d))
            print(f"  a second start of ours, with its home there: ready after {again:.2f} s")
            rows.append(measure("somaagent", p, *rest, mock_port, o.requests, o.rounds))
            q, *rest2 = bare(mock_port); running.append(q)
            rows.append(measure("limit: bare raw ASGI + aiohttp", q, *rest2, mock_port, o.requests, o.rounds))
            if o.peer:
                q, *rest2 = peer(o.peer, Path(d), mock_port); running.append(q)
                rows.append(measure("LiteLLM", q, *rest2, mock_port, o.peer_requests, o.rounds))
            table(rows)
            print(f"beside it, the office: {sum(rss(c) for c in children(p.pid)):.0f} MB")
            if o.memory:
                for k in range(5): asyncio.run(load(rest[0], rest[1], o.memory//5, 32)); print(f"  somaagent after {(k+1)*o.memory//5:,} more: {rss(p.pid):.0f} MB", flush=True)
            p.send_signal(signal.SIGTERM); p.wait(60)
    finally:
        for p in running:
            if p.poll() is None: p.kill()

if __name__ == "__main__": main()
