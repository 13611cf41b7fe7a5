"""A provider written in bytes: what no web framework would send. The name of the model is what it does."""
import asyncio, json, re, threading, time

def answer(text="fine"): return json.dumps(dict(id="c1", object="chat.completion", created=1, model="m", choices=[dict(index=0, message=dict(role="assistant", content=text), finish_reason="stop")], usage=dict(prompt_tokens=3, completion_tokens=2, total_tokens=5)), ensure_ascii=False).encode()
def chunk(text=None, finish=None, **kw): return json.dumps(dict(id="c1", object="chat.completion.chunk", created=1, model="m", choices=[dict(index=0, delta=dict(content=text) if text else {}, finish_reason=finish)]) | kw, ensure_ascii=False)
def ok(body, kind="application/json", **h): return b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n%s\r\n" % (kind.encode(), len(body), b"".join(b"%s: %s\r\n" % (k.replace("_", "-").encode(), v.encode()) for k, v in h.items())) + body
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"

class Wild:
    "`seen` are the requests (headers, body), `gone` the models whose connection the other side closed early"
    def __init__(self): self.seen, self.gone, self.ready, self.port, self.wrote = [], [], threading.Event(), None, 0

    async def serve(self, r, w):
        try:
            while True:
                head = await r.readuntil(b"\r\n\r\n")
                body = json.loads(await r.readexactly(int(re.search(rb"content-length: *(\d+)", head, re.I)[1])))
                self.seen.append((head.decode("latin-1"), body))
                try: await self.act(body["model"], body, r, w)
                except (ConnectionError, asyncio.IncompleteReadError): self.gone.append(body["model"]); return
                if w.is_closing(): return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError): pass
        finally: w.close()

    async def until_gone(self, r, seconds=20):
        "Wait until the other side closes"
        try:
            async with asyncio.timeout(seconds):
                if not await r.read(1): raise ConnectionResetError
        except TimeoutError: pass

    async def act(self, how, body, r, w):
        put = lambda raw: w.write(raw)
        if how == "echo":
            text = body["messages"][-1]["content"]
            if not body.get("stream"): return put(ok(answer(text)))
            put(STREAM+f"data: {chunk(text)}\n\ndata: {chunk(finish='stop')}\n\ndata: [DONE]\n\n".encode()); await w.drain(); w.close(); return
        if how == "blank": return put(ok(answer("")))
        if how == "down": return put(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n")
        if how == "silent": return await self.until_gone(r)
        if how == "trickle":                      # a header that never ends, a byte at a time
            put(b"HTTP/1.1 200 OK\r\nx-a: ")
            for _ in range(400):
                put(b"a"); await w.drain(); await asyncio.sleep(.05)
                if r.at_eof(): raise ConnectionResetError
            return
        raw = dict(redirect=b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://169.254.169.254/latest/meta-data\r\ncontent-length: 0\r\n\r\n", nonsense=b"SSH-2.0-OpenSSH_9.9\r\n", empty=b"", headers=b"HTTP/1.1 200 OK\r\n"+b"".join(b"h%d: %s\r\n" % (i, b"x"*4000) for i in range(100))+b"\r\n",
            chunks=b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", short=b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n"+answer(), two=ok(answer())+ok(answer("smuggled")), null=ok(b"null"), lists=ok(b"[]"), deep=ok(b"["*200_000),
            latin=ok("{\"a\": \"\xe9\"}".encode("latin-1")), packed=ok(b"\x1f\x8b\x08\x00garbage", content_encoding="gzip"), html=ok(b"<html>login</html>", "text/html"), nochoice=ok(b'{"choices": [{"message": 7}]}'), inject=ok(answer("line\r\nx-evil: 1\r\n\r\nHTTP/1.1 200 OK")), names=ok(b'{"error": {"message": "no\\r\\nx-evil: 1", "code": "a\\nb"}}')).get(how)
        if raw is not None:
            put(raw); await w.drain()
            if how not in ("redirect", "null", "lists", "deep", "latin", "two", "packed", "html", "nochoice", "inject", "names"): w.close()
            return
        if how == "endless":                      # never ends, never a whole answer
            put(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
            for _ in range(400): put(b" "*2**20); await w.drain(); self.wrote += 2**20
            return
        put(STREAM)
        one = lambda text: put(f"data: {text}\n\n".encode())
        if how == "odd-sse":                      # all that the standard allows
            raw = "\ufeff: hello\r\n\r\nid: 7\r\nretry: 10\r\nevent: message\r\ndata: ".encode()+chunk("Gr").encode()+b"\r\n\r\n:\n\ndata:"+chunk("üß dich 🎈").encode()+b"\n\n"
            d = chunk(", Welt")
            raw += b"".join(b"data: %s\n" % l for l in json.dumps(json.loads(d), indent=0).encode().split(b"\n"))+b"\ndata: "+chunk(finish="stop").encode()+b"\n\ndata: [DONE]\n\n"
            for i in range(0, len(raw), 7): put(raw[i:i+7]); await w.drain()
        elif how == "no-done": one(chunk("a")); one(chunk(finish="stop"))
        elif how == "unfinished": one(chunk("a")); one("[DONE]")
        elif how == "long-event":
            put(b"data: ")
            for _ in range(64): put(b"x"*2**20); await w.drain(); self.wrote += 2**20
        elif how == "flood":                      # faster than anybody reads
            for i in range(200): one(chunk("y"*500_000)); await w.drain(); self.wrote += 500_000
            one(chunk(finish="stop"))
        elif how == "hold":
            one(chunk("w0"))
            await w.drain(); await self.until_gone(r, 60)
        elif how == "error-event": one(chunk("a")); one('{"error": {"message": "overloaded", "type": "x"}}')
        elif how == "wrong-kinds": one(chunk("a")); one('{"choices": 7}')
        elif how == "number": one(chunk("a")); one("7")
        elif how == "bytes": one(chunk("a")); put(b"data: \xff\xfe\n\n")
        await w.drain()
        w.close()

    def start(self):
        def run():
            async def go():
                s = await asyncio.start_server(self.serve, "127.0.0.1", 0, limit=2**22, backlog=1000)
                self.port = s.sockets[0].getsockname()[1]
                self.ready.set()
                await s.serve_forever()
            asyncio.run(go())
        threading.Thread(target=run, daemon=True).start()
        self.ready.wait(10)
        return self
