"""OpenAI's chat completions and Anthropic's messages on loopback: the published shapes, streamed or whole, and faults on order.

A plan is a list of acts, one per request; when it is empty the server answers. Each request is kept: (path, headers, body)."""
import json, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

def completion(text="Your card is on its way.", calls=(), usage=None, finish=None, model="gpt-4o-mini-2024-07-18", tier="default"):
    "A chat completion, with every field that the API documents as required"
    msg = dict(role="assistant", content=None if calls else text, refusal=None) | (dict(tool_calls=[dict(id=f"call_{i}", type="function", function=dict(name=n, arguments=a if isinstance(a, str) else json.dumps(a))) for i, (n, a) in enumerate(calls)]) if calls else {})
    usage = usage or dict(prompt_tokens=1200, completion_tokens=300, total_tokens=1500, prompt_tokens_details=dict(cached_tokens=1024, audio_tokens=0), completion_tokens_details=dict(reasoning_tokens=256, audio_tokens=0, accepted_prediction_tokens=0, rejected_prediction_tokens=0))
    return dict(id="chatcmpl-abc", object="chat.completion", created=1_795_000_000, model=model, choices=[dict(index=0, message=msg, finish_reason=finish or ("tool_calls" if calls else "stop"), logprobs=None)], usage=usage, system_fingerprint="fp_1", service_tier=tier)

def message(text="Your card is on its way.", calls=(), usage=None, stop=None, model="claude-sonnet-5-5"):
    "A message of Anthropic's API"
    blocks = ([dict(type="text", text=text, citations=None)] if text and not calls else []) + [dict(type="tool_use", id=f"toolu_{i}", name=n, input=a) for i, (n, a) in enumerate(calls)]
    return dict(id="msg_abc", type="message", role="assistant", model=model, content=blocks, stop_reason=stop or ("tool_use" if calls else "end_turn"), stop_sequence=None, usage=usage or dict(input_tokens=176, output_tokens=300, cache_read_input_tokens=1024, cache_creation_input_tokens=0))

def chunks_of(c):
    "A chat completion as the events of a stream"
    base, m = {k: c[k] for k in ("id", "created", "model", "system_fingerprint", "service_tier")} | dict(object="chat.completion.chunk"), c["choices"][0]["message"]
    one = lambda delta, finish=None: base | dict(choices=[dict(index=0, delta=delta, finish_reason=finish, logprobs=None)], usage=None)
    out = [one(dict(role="assistant", content="", refusal=None))]
    text = m.get("content") or ""
    out += [one(dict(content=text[i:i+5])) for i in range(0, len(text), 5)]
    for i, t in enumerate(m.get("tool_calls") or []):
        a = t["function"]["arguments"]
        out += [one(dict(tool_calls=[dict(index=i, id=t["id"], type="function", function=dict(name=t["function"]["name"], arguments=""))]))] + [one(dict(tool_calls=[dict(index=i, function=dict(arguments=a[k:k+4]))])) for k in range(0, len(a), 4)]
    return [f"data: {json.dumps(x)}\n\n" for x in [*out, one({}, c["choices"][0]["finish_reason"]), base | dict(choices=[], usage=c["usage"])]] + ["data: [DONE]\n\n"]

def events_of(m):
    "A message as the events of a stream"
    ev = lambda **d: f"event: {d['type']}\ndata: {json.dumps(d)}\n\n"
    out = [ev(type="message_start", message=m | dict(content=[], stop_reason=None, usage=m["usage"] | dict(output_tokens=1))), ev(type="ping")]
    for i, b in enumerate(m["content"]):
        out.append(ev(type="content_block_start", index=i, content_block=dict(type="text", text="") if b["type"] == "text" else b | dict(input={})))
        raw = b["text"] if b["type"] == "text" else json.dumps(b["input"])
        out += [ev(type="content_block_delta", index=i, delta=dict(type="text_delta", text=raw[k:k+5]) if b["type"] == "text" else dict(type="input_json_delta", partial_json=raw[k:k+5])) for k in range(0, len(raw), 5)]
        out.append(ev(type="content_block_stop", index=i))
    return out + [ev(type="message_delta", delta=dict(stop_reason=m["stop_reason"], stop_sequence=None), usage=m["usage"]), ev(type="message_stop")]

class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128
    def handle_error(self, request, client_address): pass

class FakeModels:
    "Both providers in this process; a context manager"
    def __init__(self, *plan):
        self.plan, self.requests, self.lock, fake = list(plan), [], threading.Lock(), self
        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
            def log_message(self, *a): pass
            def do_POST(self):
                try: fake.serve(self)
                except (ConnectionError, OSError): self.close_connection = True
        self.http = _Server(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.http.server_port}"
        self.url = self.origin+"/v1"
    def __enter__(self): threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start(); return self
    def __exit__(self, *_): self.http.shutdown(); self.http.server_close()
    bodies = property(lambda self: [b for _, _, b in self.requests])

    def serve(self, h):
        body = json.loads(h.rfile.read(int(h.headers.get("content-length") or 0)))
        with self.lock:
            self.requests.append((h.path, {k.lower(): v for k, v in h.headers.items()}, body))
            act = self.plan.pop(0) if self.plan else {}
        if callable(act): act = act(body)
        claude = h.path.endswith("/messages")
        if claude and {"temperature", "top_p", "top_k"} & set(body) and h.headers.get("anthropic-version", "") >= "2026-10-21": act = dict(status=400, message="sampling parameters are not accepted by this version")
        if act.get("wait"): time.sleep(act["wait"])
        if act.get("drop"): h.connection.close(); h.close_connection = True; return
        if "status" in act:
            err = dict(type="error", error=dict(type="rate_limit_error", message=act.get("message", "no"))) if claude else dict(error=dict(message=act.get("message", "no"), type="rate_limit", code="rate_limited", param=None))
            return self.send(h, act["status"], json.dumps(act.get("body", err)).encode(), act.get("headers", {}))
        if "raw" in act: return self.send(h, 200, act["raw"].encode(), {"content-type": act.get("kind", "application/json")})
        got = (message if claude else completion)(**{k: v for k, v in act.items() if k in ("text", "calls", "usage", "finish", "stop", "tier")})
        if not body.get("stream"): return self.send(h, 200, json.dumps(got).encode(), {"x-request-id": "req_42", "request-id": "req_42"} if not claude else {"request-id": "req_42"})
        h.send_response(200)
        for k, v in {"content-type": "text/event-stream", "transfer-encoding": "chunked", "x-request-id": "req_42"}.items(): h.send_header(k, v)
        h.end_headers()
        for i, e in enumerate(events_of(got) if claude else chunks_of(got)):
            if i == act.get("break_at"): h.connection.close(); h.close_connection = True; return
            if i == act.get("end_at"): break
            if i == act.get("stall_at"): time.sleep(act.get("seconds", 5))
            if i == act.get("garbage_at"): e = ("event: content_block_delta\n" if claude else "")+"data: {not json\n\n"
            if i == act.get("error_at"): e = f"event: error\ndata: {json.dumps(dict(type='error', error=dict(type='overloaded_error', message='overloaded')))}\n\n"
            raw = e.encode()
            h.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw)); h.wfile.flush()
        h.wfile.write(b"0\r\n\r\n")

    def send(self, h, status, raw, headers):
        h.send_response(status)
        for k, v in {"content-type": "application/json", "content-length": str(len(raw)), **headers}.items(): h.send_header(k, v)
        h.end_headers(); h.wfile.write(raw)
