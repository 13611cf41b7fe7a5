"""Does the gateway keep its promises for as long as it runs? The highest rate it sustains, held for minutes, over a provider that fails at random.

    python benchmarks/soak.py                          10 minutes at the highest sustained rate
    python benchmarks/soak.py --minutes 2 --rate 300   shorter, at a given rate
    python benchmarks/soak.py --json soak.json         the figures as well

Four kinds of processes on one machine: the gateway alone on one core; its helpers (warehouse, state), the mock provider and this loader on the others. The mock answers with errors (500, 429), stalls, half answers, broken
streams, garbage and resets, in the shares of `FAULTS`; some clients leave in mid-stream. Half the models have a fallback at a second provider, half have none, so that both ways are taken.

Requests begin at their time whether or not earlier ones are answered (an open loop). Every one has an id. At the end each must have been answered, whole or with an error that says so, and each that was not
refused at the door must be in the warehouse exactly once, whatever became of it. Memory of the gateway is read every second; its slope comes from the last four fifths of the hold, in 20 blocks, with a 95 % interval.
Promises: nothing unanswered, nothing lost, nothing twice, nothing invented, no credible growth of memory beyond 0.5 MB a minute. The exit status is 1 when one of them breaks.
"""
import argparse, asyncio, contextlib, json, os, platform, random, re, signal, statistics as st, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path

FAULTS = dict(error=.02, limit=.01, stall=.002, liar=.005, garbage=.005, reset=.01, cut=.015, broken=.01, quiet=.002)     # the last three in streams only; shares of requests to the first provider
LEAVE, STREAMS, PIECES = .01, .4, 8
ANSWER = json.dumps(dict(id="chatcmpl-1", object="chat.completion", created=1, model="m", choices=[dict(index=0, message=dict(role="assistant", content="Your order is on its way. "*3), finish_reason="stop")], usage=dict(prompt_tokens=40, completion_tokens=21, total_tokens=61))).encode()
def _piece(delta, finish=None): return b"data: " + json.dumps(dict(id="chatcmpl-1", object="chat.completion.chunk", created=1, model="m", choices=[dict(index=0, delta=delta, finish_reason=finish)])).encode() + b"\n\n"
WORD, LAST = _piece(dict(content="word ")), _piece({}, "stop")+b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[],"usage":{"prompt_tokens":40,"completion_tokens":8,"total_tokens":48}}\n\ndata: [DONE]\n\n'

class Mock(asyncio.Protocol):
    "A provider that fails at random, unless it is asked for `sound`"
    rng, made = random.Random(7), {}
    def connection_made(self, t): self.t, self.buf = t, b""
    def connection_lost(self, e): self.t = None
    def data_received(self, data):
        self.buf += data
        while (i := self.buf.find(b"\r\n\r\n")) >= 0:
            m = re.search(rb"content-length: *(\d+)", self.buf[:i], re.I)
            n = i+4+int(m[1] if m else 0)
            if len(self.buf) < n: return
            head, body, self.buf = self.buf[:i], self.buf[i+4:n], self.buf[n:]
            if head.startswith(b"GET"): self.whole(json.dumps(self.made).encode()); continue
            stream = b'"stream":true' in body.replace(b" ", b"")
            how = "" if b'"sound"' in body else self.fault(stream)
            self.made[how or "none"] = self.made.get(how or "none", 0)+1
            if how or stream: asyncio.ensure_future(self.act(how, stream))
            else: self.whole(ANSWER)
    def fault(self, stream):
        x = self.rng.random()
        for k, share in FAULTS.items():
            if (x := x-share) < 0: return k if stream or k not in ("cut", "broken", "quiet") else ""
        return ""
    def put(self, raw):
        if self.t is not None: self.t.write(raw)
    def end(self, abort=False):
        if self.t is not None: self.t.abort() if abort else self.t.close()
    def whole(self, raw, status=b"200 OK", more=b""): self.put(b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%s\r\n" % (status, len(raw), more) + raw)
    async def act(self, how, stream):
        if how == "error": return self.whole(b'{"error": {"message": "boom"}}', b"500 Internal Server Error")
        if how == "limit": return self.whole(b'{"error": {"message": "slow down"}}', b"429 Too Many Requests", b"retry-after: 0\r\n")
        if how == "stall": await asyncio.sleep(8); return self.end()
        if how == "reset": return self.end(True)
        if how == "garbage": return self.whole(b"<html>oops</html>")
        if how == "liar": self.put(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (len(ANSWER)+99) + ANSWER); await asyncio.sleep(.02); return self.end()
        chunk = lambda raw: self.put(b"%x\r\n%s\r\n" % (len(raw), raw))
        self.put(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for i in range(PIECES):
            chunk(WORD); await asyncio.sleep(.002)
            if i == 3 and how == "cut": return self.end(True)
            if i == 3 and how == "broken": chunk(b'data: {"id": \n\n'); return self.put(b"0\r\n\r\n")
            if i == 3 and how == "quiet": await asyncio.sleep(8); return self.end()
        chunk(LAST); self.put(b"0\r\n\r\n")

async def mock():
    s = await asyncio.get_running_loop().create_server(Mock, "127.0.0.1", 0)
    print(s.sockets[0].getsockname()[1], flush=True)
    await s.serve_forever()

CONFIG = """
providers:
  mock: {{base_url: 'http://127.0.0.1:{p}/v1', timeout_s: 2, stall_s: 1, tries: 2, concurrent: 300}}
  spare: {{base_url: 'http://127.0.0.1:{p}/v1', timeout_s: 5, stall_s: 2, concurrent: 300}}
models:
  mock/alone: {{price: {{input: 0.15, output: 0.60}}}}
  mock/backed: {{price: {{input: 0.15, output: 0.60}}, fallbacks: [spare/sound]}}
  spare/sound: {{price: {{input: 0.30, output: 1.20}}}}
limits: {{concurrent: 500, streams: 300}}
"""

class Load:
    "An open loop of requests, each with an id and an end"
    def __init__(self, port, key, seed=1, timeout=30.):
        self.port, self.key, self.rng, self.timeout = port, key, random.Random(seed), timeout
        self.idle, self.fate, self.ms, self.running, self.why = [], [], [], 0, {}     # fate[n]: what became of request n

    def request(self, n):
        stream, model = self.rng.random() < STREAMS, "mock/backed" if self.rng.random() < .5 else "mock/alone"
        body = json.dumps(dict(model=model, messages=[dict(role="user", content=f"Where is my order {n}? It should have been here on Monday.")], max_tokens=64, stream=stream, user=f"u{n % 1000}")).encode()
        return stream, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\nx-request-id: soak-%d\r\ncontent-length: %d\r\n\r\n" % (self.key, n, len(body)) + body

    async def ask(self, n, r, w):
        "(fate, may the connection be used again)"
        stream, raw = self.request(n)
        leave = stream and self.rng.random() < LEAVE/STREAMS
        w.write(raw)
        head = await r.readuntil(b"\r\n\r\n")
        status, low = int(head[9:12]), head.lower()
        if leave and status == 200: await r.readline(); return "left", False
        if m := re.search(rb"content-length: *(\d+)", low): body = await r.readexactly(int(m[1]))
        else:
            parts = []
            while size := int((await r.readline()).strip(), 16): parts.append((await r.readexactly(size+2))[:-2])
            await r.readexactly(2)
            body = b"".join(parts)
        again = b"connection: close" not in low
        if status == 200: return ("broken off, said so" if b'data: {"error"' in body else "answered by the fallback" if b"in place of" in low else "answered") if not stream or b"[DONE]" in body or b'data: {"error"' in body else "cut without a word", again
        if status in (429, 503) and b"retry-after" in low and (b"overloaded" in body or b"at once" in body or b"log_full" in body or b"shutting" in body): return "refused", again
        self.why[status] = self.why.get(status, 0)+1
        return ("error, said so" if b'"error"' in body else "error without a word"), again

    async def connection(self):
        "One that was used within the last 3 s (the gateway closes what idles for 5), or a new one"
        while self.idle:
            at, r, w = self.idle.pop()
            if time.monotonic()-at < 3 and not r.at_eof() and not w.is_closing(): return r, w
            w.close()
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def one(self, n):
        t, w = time.perf_counter(), None
        self.running += 1
        try:
            async with asyncio.timeout(self.timeout):
                r, w = await self.connection()
                fate, again = await self.ask(n, r, w)
                if again: self.idle.append((time.monotonic(), r, w)); w = None
        except TimeoutError: fate = "unanswered: no end within 30 s"
        except (OSError, EOFError, ValueError, asyncio.IncompleteReadError) as e: fate = f"unanswered: {type(e).__name__}"
        finally: self.running -= 1
        if w is not None: w.close()
        self.fate[n] = fate
        self.ms.append((time.perf_counter()-t)*1000)

    async def run(self, rate, seconds, each=None):
        "So many requests a second for so long; then wait for the last one: dict(rate, p50, p99, behind)"
        first, t0, tasks, k, most, mark, behind = len(self.fate), time.perf_counter(), set(), 0, 0, len(self.ms), 0.
        while (now := time.perf_counter()-t0) < seconds:
            due = int(now*rate)-k
            behind = max(behind, due/rate)
            for _ in range(min(due, 200)):
                self.fate.append("")
                task = asyncio.ensure_future(self.one(len(self.fate)-1)); tasks.add(task); task.add_done_callback(tasks.discard); k += 1
            most = max(most, self.running)
            if each is not None: each(now)
            await asyncio.sleep(.002)
        done, end = sum(map(bool, self.fate[first:])), time.perf_counter()-t0
        while tasks: await asyncio.wait(tasks)
        ms = sorted(self.ms[mark:])
        return dict(sent=k, rate=done/end, offered=k/end, p50=ms[len(ms)//2], p99=ms[int(len(ms)*.99)], at_once=most, behind=behind, refused=self.fate[first:].count("refused"))

def children(pid):
    out = []
    for t in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError): out += [c for p in t.read_text().split() for c in (int(p), *children(int(p)))]
    return out
def pin(pid, cpus):
    for t in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError): os.sched_setaffinity(int(t.name), cpus)
def rss(pid): return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])/1024
def cpu(pid):
    f = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(f[11])+int(f[12]))/os.sysconf("SC_CLK_TCK")

def slope(points):
    "MB a minute with its 95 % interval, from (minute, MB), in 20 blocks"
    from scipy import stats
    n = max(1, len(points)//20)
    blocks = [[st.fmean(v) for v in zip(*points[i:i+n])] for i in range(0, len(points)-n+1, n)]
    if len(points) < 60: return float("nan"), float("nan"), float("nan")
    f = stats.linregress(*zip(*blocks))
    half = stats.t.ppf(.975, len(blocks)-2)*f.stderr
    return f.slope, f.slope-half, f.slope+half

def start(args, env, until):
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=open(env["SOAK_ERR"], "a") if "SOAK_ERR" in env else None, text=True, env={**os.environ, **env})
    for line in p.stdout:
        if m := re.search(until, line): return p, m
    raise SystemExit(f"{args[-1]} did not start")

async def highest(load, say):
    "The highest rate that is sustained: what is asked is answered, and nothing piles up"
    rate, good = 100., None
    while True:
        got = await load.run(rate, 4.)
        fine = got["rate"] > .97*got["offered"] and got["offered"] > .97*rate and got["p50"] < 100 and not got["refused"] and not any(f.startswith("unans") for f in load.fate)
        say(f"  {rate:6.0f}/s offered {got['offered']:6.0f}, answered {got['rate']:6.0f}, p50 {got['p50']:.1f} ms, p99 {got['p99']:.0f} ms, {got['at_once']} at once{'' if fine else '  ← too much'}")
        if not fine and good is None and rate < 20: raise SystemExit("not even 20 requests a second are sustained")
        if not fine and (good is not None and rate/good < 1.15): return good
        if fine: good, rate = rate, rate*(1.5 if good is None or rate/good > 1.3 else 1.1)
        else: rate = good*1.1 if good is not None and rate > good*1.1 else rate*.8 if good is None else good

def spooled(home): return [f for f in home.glob("spool/sp_*/*") if f.suffix in (".jsonl", ".open") and f.stat().st_size]

def logged(home, seconds):
    "Wait until the spool is empty; (numbers of the requests in the warehouse, in order; statuses)"
    end = time.monotonic()+seconds
    while spooled(home) and time.monotonic() < end: time.sleep(.5)
    from somaagent.store.warehouse import warehouse
    with warehouse(mode="shared") as wh:
        df = wh.query("SELECT toInt64OrZero(substring(meta['request_id'], 6)) AS n, status, error FROM interactions WHERE startsWith(meta['request_id'], 'soak-') ORDER BY n")
    return df["n"].to_list(), df

def verdicts(fate, there, growth, left):
    "(what was promised, kept?, what was found)"
    from collections import Counter
    seen = Counter(there)
    must = {n for n, f in enumerate(fate) if f not in ("refused",) and not f.startswith("unanswered")}
    lost, twice, strange = must-seen.keys(), [n for n, k in seen.items() if k > 1], [n for n in seen if not 0 <= n < len(fate)]
    bad = [f for f in fate if not f or f.startswith("unanswered") or "without a word" in f]
    return [("every request answered", not bad, f"{len(bad)} of {len(fate):,} not" + (f" ({Counter(bad).most_common(2)})" if bad else "")), ("none lost in the log", not lost, f"{len(lost)} of {len(must):,}"), ("none twice", not twice, str(len(twice))),
            ("none invented", not strange, str(len(strange))), ("all written by the end", not left, f"{left} files left"), ("memory does not grow", not growth[1] > .5, f"{growth[0]:+.2f} MB/min, 95 % {growth[1]:+.2f} to {growth[2]:+.2f}" if growth[0] == growth[0] else "too short to say")]

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--minutes", type=float, default=10.); a.add_argument("--rate", default="auto"); a.add_argument("--json"); a.add_argument("--mock", action="store_true", help=argparse.SUPPRESS)
    a.add_argument("--share", type=float, default=.9, help="of the highest rate that was found, which is held"); a.add_argument("--grace", type=float, default=120., help="seconds that the log may take to reach the warehouse at the end")
    o = a.parse_args()
    if o.mock: return asyncio.run(mock())
    say = lambda *t: print(*t, flush=True)
    say(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    running = []
    with tempfile.TemporaryDirectory() as d:
        home = Path(d)/"home"; home.mkdir()
        os.environ.update(SOMA_STORES_HOME=str(home), SOMA_PROGRESS="none")
        try: return soak(o, home, running, say)
        finally:
            for p in running:
                if p.poll() is None: p.kill()
            for f in home.glob("**/server.json"):       # the shared warehouse of this home
                with contextlib.suppress(Exception): os.kill(json.loads(f.read_text())["pid"], signal.SIGTERM)

def soak(o, home, running, say):
    m, got = start([sys.executable, __file__, "--mock"], {}, r"(\d+)"); running.append(m)
    (home/"gateway.yaml").write_text(CONFIG.format(p=got[1]))
    t = time.perf_counter()
    g, at = start([sys.executable, "-c", "from somaagent.serve.server import serve; serve(port=0, warm=False)"], dict(SOAK_ERR=str(home.parent/"err")), r"Ready: http://127.0.0.1:(\d+)"); running.append(g)
    say(f"ready after {time.perf_counter()-t:.2f} s, {rss(g.pid):.0f} MB")
    if (n := os.cpu_count()) > 1:
        pin(g.pid, {0})
        for p in (*children(g.pid), m.pid, os.getpid()): pin(p, set(range(1, n)))
    load = Load(int(at[1]), json.loads((home/"credentials.json").read_text())["api_key"].encode())
    points, last = [], [0.]
    def each(now):
        if now-last[0] >= 1: last[0] = now; points.append((now/60, rss(g.pid)))
    async def go():
        rate = float(o.rate) if o.rate != "auto" else o.share*await highest(load, say)
        before, c0 = len(load.fate), cpu(g.pid)
        say(f"holding {rate:.0f} requests/s for {o.minutes:g} minutes")
        held = await load.run(rate, o.minutes*60, each)
        return rate, before, held, cpu(g.pid)-c0
    rate, before, held, used = asyncio.run(go())
    there, df = logged(home, o.grace)
    left = len(spooled(home))
    others = sum(rss(p) for p in children(g.pid))
    faults = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{got[1]}/", timeout=10).read())
    g.send_signal(signal.SIGTERM); g.wait(40)
    growth = slope(points[len(points)//5:])
    return report(o, say, load, there, df, held, used, points, growth, left, others, rate, faults)

def report(o, say, load, there, df, held, used, points, growth, left, others, rate, faults):
    from collections import Counter
    fates, checks = Counter(load.fate), verdicts(load.fate, there, growth, left)
    say(f"\nheld {held['offered']:.0f} requests/s ({held['sent']:,} in {o.minutes:g} minutes; {held['p50']:.1f} ms p50, {held['p99']:.0f} ms p99, {held['at_once']} at once at most); gateway {used/o.minutes/60:.0%} of its core, {used/max(1, held['sent'])*1e6:.0f} µs a request")
    say(f"  the provider was asked {sum(faults.values()):,} times: " + ", ".join(f"{n:,} {k}" for k, n in sorted(faults.items(), key=lambda x: -x[1])))
    for k, n in fates.most_common(): say(f"  {n:>9,}  {k}")
    say(f"  {len(there):>9,}  in the warehouse: {', '.join(f'{n:,} {s}' for s, n in Counter(df['status']).most_common())}; errors {dict(load.why)}")
    say(f"  memory of the gateway {points[0][1]:.0f} MB at the start of the hold, {points[-1][1]:.0f} MB at its end, at most {max(p[1] for p in points):.0f} MB; its helpers {others:.0f} MB")
    say("")
    for what, kept, found in checks: say(f"  {'kept  ' if kept else 'BROKEN'}  {what:<24} {found}")
    if o.json: Path(o.json).write_text(json.dumps(dict(rate=rate, held=held, fates=fates, faults=faults, logged=len(there), memory=points, slope=growth, promises=[dict(promise=w, kept=k, found=f) for w, k, f in checks]), indent=1))
    return 0 if all(k for _, k, _ in checks) else 1

if __name__ == "__main__": sys.exit(main())
