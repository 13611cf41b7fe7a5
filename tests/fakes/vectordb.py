"""Pinecone's data plane and the one route of its control plane that finds an index, on loopback, after the published OpenAPI (2026-07): names of fields, limits and refusals are the specification's."""
import json, math, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np

def holds(f, m):
    "A metadata filter, read independently of the package's own"
    def one(k, c):
        if k == "$and": return all(holds(x, m) for x in c)
        if k == "$or": return any(holds(x, m) for x in c)
        assert not k.startswith("$"), k
        has, v = k in m, m.get(k)
        same = lambda a, b: isinstance(a, bool) == isinstance(b, bool) and isinstance(a, str) == isinstance(b, str) and a == b
        num = has and not isinstance(v, (bool, str))
        tests = {"$eq": lambda x: has and same(v, x), "$ne": lambda x: has and not same(v, x), "$exists": lambda x: has == x, "$gt": lambda x: num and v > x, "$gte": lambda x: num and v >= x,
                 "$lt": lambda x: num and v < x, "$lte": lambda x: num and v <= x, "$in": lambda x: has and any(same(v, y) for y in x), "$nin": lambda x: has and not any(same(v, y) for y in x)}
        return all(tests[op](x) for op, x in c.items())
    return all(one(k, c) for k, c in f.items())

class Refused(Exception): pass
def need(ok, why):
    if not ok: raise Refused(why)
def only(body, *names): need(not set(body) - set(names), f"unknown fields {set(body) - set(names)}")
def good_id(i): need(isinstance(i, str) and 1 <= len(i) <= 512 and i.isascii() and "\0" not in i, f"bad id {i!r}")

class FakePinecone:
    "`with FakePinecone(dim, metric) as p: p.url`"
    def __init__(self, dim=8, metric="cosine", key="pc-test"):
        self.dim, self.metric, self.key, self.spaces, self.calls, self.lock = dim, metric, key, {}, [], threading.Lock()
        outer = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *a): pass
            def answer(self, body):
                u = urlsplit(self.path)
                try:
                    if self.headers.get("Api-Key") != outer.key: return self.send(401, "Unauthorized", "text/plain")
                    need(self.headers.get("X-Pinecone-Api-Version") == "2026-07", "no version header")
                    with outer.lock: out = outer.route(self.command, u.path, parse_qs(u.query), body)
                    self.send(200, json.dumps(out))
                except Refused as e: self.send(400, json.dumps(dict(code=3, message=str(e), details=[])))
            def send(self, status, text, kind="application/json"):
                self.send_response(status); self.send_header("Content-Type", kind); self.send_header("Content-Length", str(len(text.encode()))); self.end_headers(); self.wfile.write(text.encode())
            def do_GET(self): self.answer(None)
            def do_POST(self): self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"pinecone://test?host={self.host}"
    def __enter__(self): threading.Thread(target=self.server.serve_forever, daemon=True).start(); return self
    def __exit__(self, *e): self.server.shutdown(); self.server.server_close()

    def route(self, method, path, q, b):
        self.calls.append((method, path))
        ns = (q.get("namespace", [""])[0] if b is None else b.get("namespace") or "") or "__default__"
        rows = self.spaces.get(ns, {})
        if (method, path) == ("POST", "/vectors/upsert"):
            only(b, "vectors", "namespace")
            need(1 <= len(b["vectors"]) <= 1000 and len(json.dumps(b)) <= 2 * 2**20, "an upsert has 1 to 1000 records and 2 MB")
            for v in b["vectors"]:
                only(v, "id", "values", "metadata"); good_id(v["id"])
                need(len(v["values"]) == self.dim, f"Vector dimension {len(v['values'])} does not match the dimension of the index {self.dim}")
                need(all(math.isfinite(x) for x in v["values"]) and any(v["values"]), "Dense vectors must contain at least one non-zero value")
                need(len(json.dumps(v.get("metadata", {}))) <= 40960 and all(isinstance(x, (str, int, float, bool)) for x in v.get("metadata", {}).values()) and not any(k.startswith("$") for k in v.get("metadata", {})), "bad metadata")
            for v in b["vectors"]: self.spaces.setdefault(ns, {})[v["id"]] = (np.asarray(v["values"], np.float32), {k: x if isinstance(x, (str, bool)) else float(x) for k, x in v.get("metadata", {}).items()})
            return dict(upsertedCount=len(b["vectors"]))
        if (method, path) == ("POST", "/query"):
            only(b, "vector", "topK", "namespace", "filter", "includeMetadata", "includeValues")
            need(1 <= b["topK"] <= 10000 and len(b["vector"]) == self.dim, "bad query")
            q = np.asarray(b["vector"], np.float32)
            near = dict(cosine=lambda v: v @ q / np.linalg.norm(v) / np.linalg.norm(q), dotproduct=lambda v: v @ q, euclidean=lambda v: ((v - q)**2).sum())[self.metric]
            got = sorted(((float(near(v)), i, m) for i, (v, m) in rows.items() if not b.get("filter") or holds(b["filter"], m)), key=lambda x: x[0] if self.metric == "euclidean" else -x[0])
            return dict(matches=[dict(id=i, score=s) | (dict(metadata=m) if b.get("includeMetadata") else {}) for s, i, m in got[:b["topK"]]], namespace=ns, usage=dict(readUnits=1))
        if (method, path) == ("POST", "/vectors/delete"):
            only(b, "ids", "namespace", "deleteAll", "filter")
            need(("ids" in b) + ("filter" in b) + bool(b.get("deleteAll")) == 1, "one of ids, filter, deleteAll")
            need(1 <= len(b.get("ids", [0])) <= 1000, "1 to 1000 ids")
            for i in b.get("ids", []): good_id(i); rows.pop(i, None)
            return {}
        if (method, path) == ("POST", "/describe_index_stats"):
            return dict(namespaces={n: dict(vectorCount=len(r)) for n, r in self.spaces.items()}, dimension=self.dim, indexFullness=0, totalVectorCount=sum(map(len, self.spaces.values())), metric=self.metric, vectorType="dense")
        full = lambda i: dict(id=i, values=[float(x) for x in rows[i][0]], metadata=rows[i][1])
        if (method, path) == ("GET", "/vectors/fetch"):
            need(1 <= len(q["ids"]) <= 1000, "1 to 1000 ids")
            for i in q["ids"]: good_id(i)
            return dict(vectors={i: full(i) for i in q["ids"] if i in rows}, namespace=ns, usage=dict(readUnits=1))
        if (method, path) in (("POST", "/vectors/fetch_by_metadata"), ("GET", "/vectors/list")):
            listing = b is None
            if not listing: only(b, "namespace", "filter", "limit", "paginationToken"); need(b["filter"], "an empty filter")
            limit, token = (int(q.get("limit", [100])[0]), q.get("paginationToken", [""])[0]) if listing else (b.get("limit", 100), b.get("paginationToken", ""))
            need(1 <= limit <= 100, "limit")
            ids = sorted(i for i in rows if i > token and (listing or holds(b["filter"], rows[i][1])))
            page = ids[:limit]
            out = dict(vectors=[dict(id=i) for i in page] if listing else {i: full(i) for i in page}, namespace=ns, usage=dict(readUnits=1))
            return out | (dict(pagination=dict(next=page[-1])) if len(ids) > limit else {})
        raise Refused(f"no route {method} {path}")
