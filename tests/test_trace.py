"""Traces of the gateway as a process: nothing of OpenTelemetry where it is off; on, spans arrive by OTLP over HTTP at a collector on loopback, joined to the caller's trace and handed on to the provider."""
import asyncio, http.server, json, os, signal, subprocess, sys, threading, time
from pathlib import Path

import aiohttp, pytest

sys.path.insert(0, str(Path(__file__).parent/"fakes"))
from upstream import Fake
from wild import Wild

CODE = """
import sys
from somaagent.serve.server import serve
try: serve(port=0, ship=False, warm=False, grace=3)
finally: print('otel' if any(m.startswith('opentelemetry') for m in sys.modules) else 'lean', flush=True)
"""
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

class Collector(http.server.ThreadingHTTPServer):
    "Takes OTLP; `spans` are (name, trace id, span id, parent, kind, attributes, status)"
    def __init__(self):
        self.spans, self.auth, self.status = [], None, 200
        super().__init__(("127.0.0.1", 0), Take)
        threading.Thread(target=self.serve_forever, daemon=True).start()
    def wait(self, name, n=1, seconds=20):
        end = time.monotonic()+seconds
        while time.monotonic() < end:
            if len(got := [s for s in list(self.spans) if s["name"] == name]) >= n: return got
            time.sleep(.05)
        raise AssertionError(f"no span {name}: {[s['name'] for s in self.spans]}")

class Take(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
        raw = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip
            raw = gzip.decompress(raw)
        self.server.auth = self.headers.get("authorization")
        value = lambda v: [value(x) for x in v.array_value.values] if v.WhichOneof("value") == "array_value" else getattr(v, v.WhichOneof("value"))
        for rs in ExportTraceServiceRequest.FromString(raw).resource_spans:
            for ss in rs.scope_spans:
                for s in ss.spans: self.server.spans.append(dict(name=s.name, trace=s.trace_id.hex(), id=s.span_id.hex(), parent=s.parent_span_id.hex(), kind=s.kind, status=s.status.code, service=next(value(a.value) for a in rs.resource.attributes if a.key == "service.name"), **{"attributes": {a.key: value(a.value) for a in s.attributes}}))
        self.send_response(self.server.status); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *a): pass

class Gate:
    def __init__(self, home, port, trace):
        home.mkdir(parents=True)
        self.home = home
        (home/"gateway.yaml").write_text(json.dumps(dict(providers=dict(fake=dict(base_url=f"http://127.0.0.1:{port}/v1", tries=1), spare=dict(base_url=f"http://127.0.0.1:{port}/v1", tries=1)), models={"fake/echo": dict(price=dict(input=1, output=2)), "fake/status-500": dict(fallbacks=["spare/echo"])}, **(dict(trace=trace) if trace else {}))))
        self.p = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=open(home/"err", "w"), text=True, env={**os.environ, "SOMA_STORES_HOME": str(home), "COLLECTOR_KEY": "Basic abc"})
        for line in self.p.stdout:
            if line.startswith("Ready"): break
        else: raise AssertionError((home/"err").read_text()[-3000:])
        self.cred = json.loads((home/"credentials.json").read_text())
    def ask(self, body, **headers):
        async def go():
            async with aiohttp.ClientSession() as s, s.post(self.cred["base_url"]+"/v1/chat/completions", json=body, headers={"authorization": f"Bearer {self.cred['api_key']}", **headers}) as r: return r.status, r.headers, await r.text()
        return asyncio.run(go())
    def stop(self):
        "What it says at its end"
        self.p.send_signal(signal.SIGTERM)
        try: out, _ = self.p.communicate(timeout=30)
        except subprocess.TimeoutExpired: self.p.kill(); raise
        return out

def talk(model, text="my secret question", **kw): return dict(model=model, messages=[dict(role="user", content=text)], **kw)

@pytest.fixture(scope="module")
def fake(): return Fake().start()

def test_spans_reach_a_collector_and_carry_the_trace_on(fake, tmp_path):
    c = Collector()
    g = Gate(tmp_path/"home", fake.port, dict(endpoint=f"http://127.0.0.1:{c.server_port}/v1/traces", service="desk", key_env="COLLECTOR_KEY"))
    try:
        _, h, _ = g.ask(talk("fake/echo", max_tokens=9), traceparent=PARENT, **{"x-request-id": "req-7"})
        g.ask(talk("fake/echo", stream=True))
        g.ask(talk("fake/status-500"))
        g.ask(talk("nobody"))
        tops = c.wait("POST /v1/chat/completions", 4)
        top = next(s for s in tops if s["attributes"].get("soma.request.id") == "req-7")
        assert (top["trace"], top["parent"], top["kind"], top["service"], c.auth) == (PARENT[3:35], PARENT[36:52], 2, "desk", "Basic abc")
        a = top["attributes"]
        assert (a["http.response.status_code"], a["soma.interaction.id"], a["gen_ai.request.model"], a["gen_ai.usage.input_tokens"], a["soma.model"]) == (200, h["x-soma-interaction"], "fake/echo", 11, "fake/echo") and a["soma.cost_usd"] == pytest.approx(25e-6)
        under = {s["name"]: s for s in c.spans if s["trace"] == top["trace"] and s is not top}
        assert set(under) == {"route", "chat echo", "spool"} and all(s["parent"] == top["id"] for s in under.values())
        call = under["chat echo"]
        assert call["kind"] == 3 and {k: call["attributes"][k] for k in ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "gen_ai.request.max_tokens", "gen_ai.response.id", "gen_ai.response.finish_reasons", "gen_ai.usage.output_tokens", "server.port")} == {
            "gen_ai.operation.name": "chat", "gen_ai.provider.name": "fake", "gen_ai.request.model": "echo", "gen_ai.request.max_tokens": 9, "gen_ai.response.id": "chatcmpl-1", "gen_ai.response.finish_reasons": ["stop"], "gen_ai.usage.output_tokens": 7, "server.port": fake.port}
        streamed = next(s for s in c.spans if s["attributes"].get("gen_ai.request.stream"))
        assert streamed["attributes"]["gen_ai.response.time_to_first_chunk"] >= 0 and streamed["attributes"]["gen_ai.usage.output_tokens"] == 7
        bad = next(s for s in c.spans if s["name"] == "chat status-500")
        again = next(s for s in c.spans if s["name"] == "chat echo" and s["parent"] == bad["parent"])
        assert bad["status"] == 2 and bad["attributes"]["error.type"] == "500" and again["status"] != 2 and next(s for s in tops if s["id"] == bad["parent"])["attributes"]["soma.model"] == "spare/echo"
        assert next(s for s in tops if s["attributes"]["http.response.status_code"] == 404)
        assert "secret" not in json.dumps(c.spans)
        c.status = 503                         # a collector that is down costs traces, not answers
        t = time.monotonic()
        assert g.ask(talk("fake/echo"))[0] == 200 and time.monotonic()-t < 5
        c.status = 200
        assert g.stop().strip().endswith("otel")
    finally:
        if g.p.poll() is None: g.p.kill()
        c.shutdown()

def test_the_provider_gets_the_trace_and_texts_go_along_when_asked_for(tmp_path):
    c, wild = Collector(), Wild().start()
    g = Gate(tmp_path/"home", wild.port, dict(endpoint=f"http://127.0.0.1:{c.server_port}/v1/traces", content=True))
    try:
        g.ask(talk("fake/echo"), traceparent=PARENT)
        top, call = c.wait("POST /v1/chat/completions")[0], c.wait("chat echo")[0]
        assert f"traceparent: 00-{top['trace']}-{call['id']}-01" in wild.seen[0][0].lower()
        assert "my secret question" in top["attributes"]["gen_ai.input.messages"] and "my secret question" in top["attributes"]["gen_ai.output.messages"]
        before = len(c.spans)
        g.ask(talk("fake/echo"), traceparent=PARENT[:-1]+"0")      # its caller has decided: not this one
        time.sleep(1.5)
        assert len(c.spans) == before
    finally: g.stop(); c.shutdown()

def test_off_it_is_not_even_imported(fake, tmp_path):
    g = Gate(tmp_path/"home", fake.port, None)
    try:
        assert g.ask(talk("fake/echo"), traceparent=PARENT)[0] == 200
        assert g.stop().strip().endswith("lean")
    finally:
        if g.p.poll() is None: g.p.kill()
