"""The gateway's own HTTP client against servers that keep to the standard, and against some that do not."""
import asyncio, time

import pytest

from somaagent.serve.dial import Broken, Pool, Unreachable

OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK+b"content-length: 5\r\n\r\nHello"

class Server(asyncio.Protocol):
    "Answers with the bytes that stand under the target of the request; `made` counts connections"
    answers, made, order = {}, 0, []
    def connection_made(self, t):
        self.t = t; Server.made += 1
        if self.answers.get("at once") == "close": t.close()
    def connection_lost(self, e): self.t = None
    def data_received(self, data):
        target = data.split()[1].decode()
        Server.order.append(target)
        got = self.answers.get(target.split("?")[0], WHOLE)
        for wait, raw in got if isinstance(got, list) else [(0, got)]: asyncio.get_running_loop().call_later(wait, self.put, raw) if wait else self.put(raw)
    def put(self, raw):
        if self.t is not None: self.t.close() if raw is None else self.t.write(raw)

async def fetch(pool, target="/", seconds=5., stall=None):
    c = await pool.post(pool.head(target, {}), b"{}", seconds, stall)
    raw = b""
    try:
        while (p := await c.piece()): raw += p
    finally: c.finish()
    return c.status, c.headers, raw

def run(work, answers={}, limit=2, loop="uvloop", **kw):
    async def go():
        Server.answers, Server.made, Server.order = answers, 0, []
        s = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        pool = Pool(f"http://127.0.0.1:{s.sockets[0].getsockname()[1]}", limit, **kw)
        try:
            async with asyncio.timeout(10): return await work(pool)
        finally: await pool.close(); s.close()
    with asyncio.Runner(loop_factory=__import__("uvloop").new_event_loop if loop == "uvloop" else None) as r: return r.run(go())

@pytest.mark.parametrize("raw,body,kept", [
    (WHOLE, b"Hello", True), (OK+b"connection: close\r\ncontent-length: 5\r\n\r\nHello", b"Hello", False), (b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nHello", b"Hello", False),
    (OK+b"transfer-encoding: chunked\r\n\r\n2;name=value;x=\"y\"\r\nHe\r\n3\r\nllo\r\n0\r\n\r\n", b"Hello", True), (OK+b"transfer-encoding: chunked\r\n\r\n5\r\nHello\r\n0\r\nx-checksum: 1\r\n\r\n", b"Hello", True),
    (b"HTTP/1.1 100 Continue\r\nx-a: 1\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"+WHOLE, b"Hello", True), (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True), (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", b"", True)])
def test_answers_of_every_form(raw, body, kept):
    async def work(pool):
        one = await fetch(pool)
        await asyncio.sleep(.01)
        two = await fetch(pool)
        return one, two, Server.made
    one, two, made = run(work, {"/": raw})
    assert one[2] == two[2] == body and made == (1 if kept else 2) and "x-a" not in one[1] and not any("\r" in v or "\n" in v for v in one[1].values())

@pytest.mark.parametrize("raw", [OK+b"content-length: 5\r\ncontent-length: 6\r\n\r\nHello", OK+b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n5\r\nHello\r\n0\r\n\r\n", OK+b"content-length: -1\r\n\r\nHello", OK+b"content-length: 5, 5\r\n\r\nHello", OK+b"transfer-encoding: chunked\r\n\r\n-1\r\nHello\r\n",
    OK+b"transfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\nHello", b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nHello", b"HTTP/1.1 100 Continue\r\n\r\n"*4000, OK+b"x"*70_000, OK+b"x-folded: a\r\n b\r\ncontent-length: 5\r\n\r\nHello"])
def test_answers_that_could_mean_two_things_are_none(raw):
    async def work(pool):
        with pytest.raises(Broken): await fetch(pool)
        await asyncio.sleep(.01)
        return pool.n
    assert run(work, {"/": raw}) == 0

def test_what_follows_an_answer_belongs_to_nobody():
    async def work(pool):
        one = await fetch(pool)
        await asyncio.sleep(.01)
        return one, await fetch(pool, "/second"), Server.made
    one, two, made = run(work, {"/": WHOLE+b"HTTP/1.1 500 Oops\r\nx-evil: 1\r\ncontent-length: 8\r\n\r\nsmuggled", "/second": OK+b"content-length: 4\r\n\r\nmine"}, limit=1)
    assert (one[0], one[2]) == (200, b"Hello") and "x-evil" not in one[1] and two[2] == b"mine" and made == 2

def test_the_begin_of_another_answer_is_not_kept_either():
    async def work(pool):
        one = await fetch(pool)
        await asyncio.sleep(.01)
        return one[2], (await fetch(pool, "/second"))[2], Server.made
    assert run(work, {"/": WHOLE+b"HTTP/1.1 200 OK\r\nx-a: ", "/second": OK+b"content-length: 4\r\n\r\nmine"}, limit=1) == (b"Hello", b"mine", 2)

def test_trailers_are_not_headers_and_cannot_grow():
    raw = OK+b"content-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n5\r\nHello\r\n0\r\ncontent-type: text/html\r\n"
    async def work(pool):
        got = await fetch(pool, "/small")
        with pytest.raises(Broken, match="trailers"): await fetch(pool, "/big")
        return got
    got = run(work, {"/small": raw+b"\r\n", "/big": [(0, raw), *[(.002*i, b"x-%d: " % i+b"y"*9000+b"\r\n") for i in range(1, 12)], (.1, b"\r\n")]})
    assert got[1]["content-type"] == "text/plain" and got[2] == b"Hello"

@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_server_that_hangs_up_at_once_is_not_waited_for(loop):
    async def work(pool):
        t = time.monotonic()
        with pytest.raises((Broken, Unreachable)): await fetch(pool, seconds=5)
        await asyncio.sleep(.02)
        return time.monotonic()-t, pool.n
    took, n = run(work, {"at once": "close"}, loop=loop)
    assert took < 1 and n == 0

def test_who_came_first_is_served_first():
    async def work(pool):
        tasks = []
        async def many(i):      # each asks again as soon as it has its answer
            for k in range(6): await fetch(pool, f"/{i}?{k}")
        tasks = [asyncio.ensure_future(many(i)) for i in range(4)]
        await asyncio.gather(*tasks)
        return [int(t[1]) for t in Server.order]
    order = run(work, {f"/{i}": [(.002, WHOLE)] for i in range(4)}, limit=1)
    assert max(abs(order[:n].count(i)-n/4) for n in range(4, 24) for i in range(4)) < 2, order       # nobody is overtaken again and again

def test_waiting_in_line_counts():
    async def work(pool):
        first, t = asyncio.ensure_future(fetch(pool, "/slow")), time.monotonic()
        await asyncio.sleep(.01)
        with pytest.raises(TimeoutError): await fetch(pool, "/never", seconds=.6)
        took = time.monotonic()-t
        await first
        await asyncio.sleep(.02)
        return took, (await fetch(pool))[2], pool.n
    took, after, n = run(work, {"/slow": [(.4, WHOLE)], "/never": b""}, limit=1)
    assert took < .85 and after == b"Hello" and n == 1

def test_who_is_cancelled_leaves_nothing_behind():
    async def work(pool):
        tasks = [asyncio.ensure_future(fetch(pool, "/slow")) for _ in range(40)]
        for k, t in enumerate(tasks):
            await asyncio.sleep(.003)
            if k % 3: t.cancel()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(.05)
        return sum(not isinstance(g, BaseException) for g in got), pool.n, len(pool.all), len(pool.line), (await fetch(pool))[2]
    good, n, all_, line, after = run(work, {"/slow": [(.01, WHOLE)]}, limit=3)
    assert good >= 14 and n == all_ <= 3 and line == 0 and after == b"Hello"

def test_idle_connections_are_not_kept_for_ever():
    async def work(pool):
        await asyncio.gather(*[fetch(pool, "/slow") for _ in range(8)])
        most = pool.n
        for _ in range(6): await asyncio.sleep(.05); await fetch(pool)
        await asyncio.sleep(.02)
        return most, pool.n
    assert run(work, {"/slow": [(.02, WHOLE)]}, limit=8, idle_s=.15) == (8, 1)

def test_names_and_headers_that_cannot_be():
    with pytest.raises(Unreachable): asyncio.run(Pool("http://a..b.invalid").post(b"POST / HTTP/1.1\r\ncontent-length: ", b"{}"))
    for key in ("Bearer x\r\ny: z", "Bearer x\ny: z", "Bearer x\x00", "Bearer “x”"):
        with pytest.raises(Unreachable, match="check the key") as e: Pool("http://127.0.0.1:1").head("/", {"authorization": key})
        assert "Bearer" not in str(e.value)
    assert b"host: [::1]:8000\r\n" in Pool("http://user:pw@[::1]:8000/v1").head("/", {}) and Pool("http://[::1]:8000/v1").host == "::1"

def test_certificates_are_checked(tmp_path):
    import ssl, subprocess
    cert, key = tmp_path/"c.pem", tmp_path/"k.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    ctx = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH); ctx.load_cert_chain(cert, key)
    names = []
    ctx.sni_callback = lambda sock, name, c: names.append(name)
    async def work():
        Server.answers = {}
        s = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, ssl=ctx)
        port, pool = s.sockets[0].getsockname()[1], None
        with pytest.raises(Unreachable, match="certificate"): await fetch(Pool(f"https://localhost:{port}"))
        for host, good in (("localhost", True), ("127.0.0.1", False)):
            pool = Pool(f"https://{host}:{port}"); pool.context = ssl.create_default_context(cafile=cert)
            if good: assert (await fetch(pool))[2] == b"Hello"
            else:
                with pytest.raises(Unreachable, match="(?i)mismatch|certificate"): await fetch(pool)
            await pool.close()
        s.close()
    asyncio.run(work())
    assert "localhost" in names
