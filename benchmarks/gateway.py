"""What the gateway costs per request: requests a second per core, added latency, streams, memory.

    python benchmarks/gateway.py                  everything on ours, a few minutes
    python benchmarks/gateway.py --requests 2000  shorter
    python benchmarks/gateway.py --peer 'SCRATCH/bin/litellm'   LiteLLM's proxy beside it, in turn, from an environment of its own

A mock provider in raw asyncio answers at once (one process); the loader (another process) keeps `c` connections busy; the gateway is a third, with everything on: keys, limits and a budget, retries, fallback, prices,
metrics, and the durable log. `CPU µs` is the gateway process's own user+system time per request, read from /proc before and after, so it holds on a busy machine as well; requests/s per core is its inverse.
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

def measure(name, p, port, key, mock_port, n, rounds):
    go = lambda *a, **kw: asyncio.run(load(port, key, *a, **kw))
    if (got := go(200, 8))["bad"]: raise SystemExit(f"{name}: {got['bad']} requests failed: {got['status']}")
    out = dict(name=name, start_rss=rss(p.pid))
    for what, kw in (("one", dict(c=1)), ("many", dict(c=32)), ("stream", dict(c=8, stream=True))):
        k = n if what != "stream" else max(50, n//8)
        a = cpu(p.pid); got = go(k, **kw); b = cpu(p.pid)
        if got["bad"]: raise SystemExit(f"{name}, {what}: {got['bad']} of {k} failed: {got['status']}")
        out[what] = dict(us=(b-a)/k*1e6, rps=k/got["wall"])
    direct, through, first = [], [], []
    for _ in range(rounds):
        direct += asyncio.run(load(mock_port, key, n//rounds, 1))["ms"]; through += go(n//rounds, 1)["ms"]
        first += go(20, 1, stream=True)["first"]
    out |= dict(p50=pct(through, .5)-pct(direct, .5), p99=pct(through, .99)-pct(direct, .99), first=st.median(first), rss=rss(p.pid))
    return out

def report(r, took):
    print(f"\n{r['name']}: ready after {took:.2f} s, {r['start_rss']:.0f} MB then, {r['rss']:.0f} MB at the end")
    print(f"  whole answers  c=1  {r['one']['us']:8.0f} µs CPU per request  {1e6/r['one']['us']:8,.0f} requests/s per core   ({r['one']['rps']:,.0f}/s by the clock)")
    print(f"                 c=32 {r['many']['us']:8.0f} µs CPU per request  {1e6/r['many']['us']:8,.0f} requests/s per core   ({r['many']['rps']:,.0f}/s by the clock)")
    print(f"  40-piece stream c=8 {r['stream']['us']:8.0f} µs CPU per stream;  first byte {r['first']:.2f} ms (median, c=1)")
    print(f"  added at c=1: p50 {r['p50']:.2f} ms, p99 {r['p99']:.2f} ms")
    sys.stdout.flush()

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--requests", type=int, default=8000); a.add_argument("--rounds", type=int, default=5); a.add_argument("--peer"); a.add_argument("--peer-requests", type=int, default=600)
    a.add_argument("--memory", type=int, default=0, help="so many more requests at c=32, to see whether memory grows"); a.add_argument("--mock", action="store_true", help=argparse.SUPPRESS)
    o = a.parse_args()
    if o.mock: return asyncio.run(mock())
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    m, line = start([sys.executable, __file__, "--mock"])
    mock_port, running = int(line), [m]
    try:
        with tempfile.TemporaryDirectory() as d:
            p, port, key, took = ours(Path(d), mock_port); running.append(p)
            report(r := measure("somaagent", p, port, key, mock_port, o.requests, o.rounds), took)
            if o.memory:
                for k in range(5): asyncio.run(load(port, key, o.memory//5, 32)); print(f"  after {(k+1)*o.memory//5:,} more: {rss(p.pid):.0f} MB", flush=True)
            if o.peer:
                q, *rest = peer(o.peer, Path(d), mock_port); running.append(q)
                report(s := measure("peer", q, *rest[:2], mock_port, o.peer_requests, o.rounds), rest[2])
                print(f"\nrequests/s per core, ours : peer = {s['many']['us']/r['many']['us']:.0f} (c=32), {s['one']['us']/r['one']['us']:.0f} (c=1); streams {s['stream']['us']/r['stream']['us']:.0f}")
            p.send_signal(signal.SIGTERM); p.wait(20)
    finally:
        for p in running:
            if p.poll() is None: p.kill()

if __name__ == "__main__": main()
