"""An OpenAI- and Anthropic-shaped provider on loopback whose behaviour is the name of the model: good ones, slow ones, broken ones, liars."""
import asyncio, json, threading

from aiohttp import web

def answer(body, text, **more):
    msg = dict(role="assistant", content=text) | more
    return dict(id="chatcmpl-1", object="chat.completion", created=1, model=body["model"], choices=[dict(index=0, message=msg, finish_reason="tool_calls" if more else "stop")], usage=dict(prompt_tokens=11, completion_tokens=7, total_tokens=18))

def piece(body, delta, finish=None, **more):
    return "data: " + json.dumps(dict(id="chatcmpl-1", object="chat.completion.chunk", created=1, model=body["model"], choices=[dict(index=0, delta=delta, finish_reason=finish)]) | more) + "\n\n"

call = dict(id="call_1", type="function", function=dict(name="order", arguments='{"id": 7}'))

class Fake:
    "The provider; `seen` holds what it was asked, `left` how many streams were broken off by the other side"
    def __init__(self): self.seen, self.left, self.fails, self.ready, self.port = [], 0, {}, threading.Event(), None

    async def chat(self, request):
        body = await request.json()
        how = body["model"]
        self.seen.append(dict(body, _key=request.headers.get("authorization", "")))
        if how.startswith("status-"): return web.json_response(dict(error=dict(message=f"no: {how}", type="t", code="c")), status=int(how[7:]), headers={"retry-after": "0"})
        if how == "flaky" and self.fails.setdefault(how, 0) < 1:
            self.fails[how] += 1
            return web.json_response(dict(error=dict(message="once")), status=500)
        if how == "stall": await asyncio.sleep(30)
        if body.get("stream"): return await self.stream(request, body, how)
        if how == "liar":
            raw = json.dumps(answer(body, "half")).encode()
            request.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (len(raw)+50) + raw)
            await asyncio.sleep(.02); request.transport.close()
            return web.Response()
        if how == "garbage": return web.Response(body=b"<html>oops", content_type="application/json")
        if how == "nothing": return web.json_response(dict(choices=[]))
        if how == "slow": await asyncio.sleep(5)
        if body.get("tools"): return web.json_response(answer(body, None, tool_calls=[call]))
        return web.json_response(answer(body, f"You said: {body['messages'][-1]['content']}"))

    async def stream(self, request, body, how):
        r = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await r.prepare(request)
        put = lambda s: r.write(s.encode() if isinstance(s, str) else s)
        try:
            if how == "garbage": await put("data: {nope\n\n"); return r
            await put(piece(body, dict(role="assistant", content="")))
            if body.get("tools"):
                await put(piece(body, dict(tool_calls=[dict(index=0, id="call_1", type="function", function=dict(name="order", arguments=""))])))
                for a in ('{"id"', ": 7}"): await put(piece(body, dict(tool_calls=[dict(index=0, function=dict(arguments=a))])))
            else:
                for i in range(200 if how == "slow" else 20 if how == "brief" else 40 if how == "forty" else 3):
                    await put(piece(body, dict(content=f"w{i} ")))
                    if how in ("slow", "brief"): await asyncio.sleep(.05)
                    if i == 1 and how == "stall-mid": await asyncio.sleep(30)
                    if i == 1 and how == "cut": request.transport.close(); return r
                    if i == 1 and how == "broken": await put("data: {\"id\": \n\n"); return r
                    if i == 1 and how == "polite-cut": await r.write_eof(); return r
            await put(piece(body, {}, "tool_calls" if body.get("tools") else "stop"))
            await put(piece(body, {}, usage=dict(prompt_tokens=11, completion_tokens=7, total_tokens=18)).replace('[{"index": 0, "delta": {}, "finish_reason": null}]', "[]") + "data: [DONE]\n\n")
        except (ConnectionResetError, asyncio.CancelledError): self.left += 1; raise
        return r

    async def messages(self, request):
        body = await request.json()
        self.seen.append(dict(body, _key=request.headers.get("x-api-key", "")))
        usage = dict(input_tokens=11, output_tokens=7)
        if not body.get("stream"):
            return web.json_response(dict(id="msg_1", type="message", role="assistant", model=body["model"], content=[dict(type="text", text="Bonjour")], stop_reason="end_turn", usage=usage))
        r = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await r.prepare(request)
        events = [dict(type="message_start", message=dict(id="msg_1", model=body["model"], usage=dict(input_tokens=11, output_tokens=0))), dict(type="content_block_start", index=0, content_block=dict(type="text", text="")), dict(type="ping"),
            *[dict(type="content_block_delta", index=0, delta=dict(type="text_delta", text=t)) for t in ("Bon", "jour")], dict(type="content_block_stop", index=0), dict(type="message_delta", delta=dict(stop_reason="end_turn"), usage=dict(output_tokens=7)), dict(type="message_stop")]
        for e in events: await r.write(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode())
        return r

    async def embed(self, request):
        body = await request.json()
        return web.json_response(dict(object="list", model=body["model"], data=[dict(object="embedding", index=i, embedding=[.5, -.25]) for i, _ in enumerate(body["input"])], usage=dict(prompt_tokens=3, total_tokens=3)))

    def run(self):
        asyncio.set_event_loop(loop := asyncio.new_event_loop())
        async def go():
            app = web.Application()
            app.add_routes([web.post("/v1/chat/completions", self.chat), web.post("/v1/messages", self.messages), web.post("/v1/embeddings", self.embed)])
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            self.ready.set()
            await asyncio.Event().wait()
        loop.run_until_complete(go())

    def start(self):
        threading.Thread(target=self.run, daemon=True).start()
        self.ready.wait(10)
        return self
