"""Vector stores at 100,000 vectors of 384 dimensions: time of a search, recall, insertion, memory; ours beside each store's own client and beside numpy.

python benchmarks/vectors.py [--n 100000] [--dim 384] [--queries 300] [--stores memory,chroma,chroma-server,qdrant] [--save FILE.json]

Each store runs in a process of its own. Vectors lie in a thousand clusters; questions are drawn from the same clusters and are not among them. Both clients hold the same vectors with the same settings of the graph, and each question
goes to both in turn, so that other work on the machine slows both alike: the ratio is the figure to look at. Processor time is that of the process, all its threads; that of a server is not in it."""
import argparse, gc, json, os, resource, socket, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np

def data(n, dim, queries, clusters=1000, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim)).astype(np.float32)
    def draw(m):
        x = centres[rng.integers(0, clusters, m)]+.7*rng.normal(size=(m, dim)).astype(np.float32)
        return x/np.linalg.norm(x, axis=1, keepdims=True)
    return draw(n), draw(queries)

def rss(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])/1024

class BareChroma:
    "Chroma's own client"
    def __init__(self, path=None, client=None):
        import chromadb
        from chromadb.config import Settings
        self.c = client or chromadb.PersistentClient(path=path, settings=Settings(anonymized_telemetry=False))
        self.col = self.c.get_or_create_collection("bare", embedding_function=None, configuration=dict(hnsw=dict(space="cosine", ef_construction=100, ef_search=100, max_neighbors=16)))
    def insert(self, ids, x, meta): self.col.upsert(ids=ids, embeddings=x, metadatas=meta)
    def done(self): pass
    def search(self, q, where): return self.col.query(query_embeddings=q[None], n_results=10, where={"ten": 3} if where else None, include=["distances", "metadatas", "documents"])["ids"][0]

class BareQdrant:
    "Qdrant's engine itself"
    def __init__(self, path):
        import qdrant_edge as q, uuid
        os.makedirs(path); self.q, self.uuid = q, uuid
        self.s = q.EdgeShard.create(path, q.EdgeConfig(vectors=q.EdgeVectorParams(size=DIM, distance=q.Distance.Cosine), hnsw_config=q.HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=1000), optimizers=q.EdgeOptimizersConfig(indexing_threshold=1000)))
        self.s.update(q.UpdateOperation.create_field_index("ten", q.PayloadSchemaType.Float))
        self.f = q.Filter(must=[q.FieldCondition("ten", range=q.RangeFloat(gte=3., lte=3.))])
    def insert(self, ids, x, meta): self.s.update(self.q.UpdateOperation.upsert_points([self.q.Point(int(i), v.tolist(), m) for i, v, m in zip(ids, x, meta)]))
    def done(self): self.s.optimize(); self.s.flush()
    def search(self, q, where): return [str(p.id) for p in self.s.query(self.q.QueryRequest(limit=10, query=self.q.Query.Nearest(q.tolist()), with_payload=True, filter=self.f if where else None, params=self.q.SearchParams(hnsw_ef=100)))]

class BareNumpy:
    "All products, and the ten largest: what no exact search can undercut on one core"
    def __init__(self): self.x = None
    def insert(self, ids, x, meta): self.x = x if self.x is None else np.concatenate([self.x, x])
    def done(self): self.ten = np.flatnonzero(np.arange(len(self.x)) % 10 == 3); self.part = self.x[self.ten]
    def search(self, q, where):
        s = (self.part if where else self.x) @ q
        best = np.argpartition(-s, 10)[:10]
        best = best[np.argsort(-s[best])]
        return [str(i) for i in (self.ten[best] if where else best)]

def filled(put, done, x, batch=2000):
    "Vectors in; seconds of wall and processor, and MB that the process grew"
    gc.collect(); m0, t0, c0 = rss(), time.perf_counter(), time.process_time()
    for a in range(0, len(x), batch): put([str(i) for i in range(a, min(a+batch, len(x)))], x[a:a+batch], [dict(ten=i % 10) for i in range(a, min(a+batch, len(x)))])
    done()
    gc.collect()
    return dict(per_s=len(x)/(time.perf_counter()-t0), per_cpu_s=len(x)/(time.process_time()-c0), mb=rss()-m0)

def timed(ways, questions, truth, where):
    "Each question to each way, in turn"
    out = {w: dict(ms=[], cpu=[], hit=[]) for w in ways}
    for j, q in enumerate(questions):
        for w in (list(ways) if j % 2 else list(ways)[::-1]):
            t, c = time.perf_counter(), time.process_time()
            got = ways[w](q, where)
            out[w]["ms"].append((time.perf_counter()-t)*1e3); out[w]["cpu"].append((time.process_time()-c)*1e3)
            out[w]["hit"].append(len(set(got) & truth[j])/10)
    return {w: dict(p50=float(np.percentile(r["ms"], 50)), p95=float(np.percentile(r["ms"], 95)), cpu=float(np.median(r["cpu"])), recall=float(np.mean(r["hit"]))) for w, r in out.items()}

def measure(store, n, queries):
    from somaagent.rag.vectors import vectors
    x, questions = data(n, DIM, queries)
    numpy_ = BareNumpy(); numpy_.insert(None, x, None); numpy_.done()
    truths = {w: [set(numpy_.search(q, w)) for q in questions] for w in (False, True)}
    out = dict(store=store, n=n)
    with tempfile.TemporaryDirectory() as tmp:
        server = None
        if store == "chroma-server":
            with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
            server = subprocess.Popen([Path(sys.executable).with_name("chroma"), "run", "--path", tmp, "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while socket.socket().connect_ex(("127.0.0.1", port)): time.sleep(.2)
        try:
            ours = vectors({"memory": "memory://", "chroma": f"chroma://{tmp}/ours", "qdrant": f"qdrant://{tmp}/ours"}.get(store) or f"chroma+http://127.0.0.1:{port}", "ours", DIM)
            out["insert ours"] = filled(lambda i, v, m: ours.upsert(i, v, meta=m), lambda: None, x)
            if store == "memory": bare = numpy_
            else:
                bare = BareQdrant(f"{tmp}/bare") if store == "qdrant" else BareChroma(f"{tmp}/bare") if store == "chroma" else BareChroma(client=ours.place.client)
                out["insert bare"] = filled(bare.insert, bare.done, x)
            ways = {"ours": lambda q, w: [h.id for h in ours.search(q, 10, {"ten": 3} if w else None)], "bare": bare.search} | ({} if store == "memory" else {"numpy": numpy_.search})
            for w, name in ((False, "search"), (True, "filtered")):
                timed(ways, questions[:20], truths[w], w)
                out[name] = timed(ways, questions, truths[w], w)
            if server: out["server_mb"] = int(next(l for l in open(f"/proc/{server.pid}/status") if l.startswith("VmRSS")).split()[1])/1024
            out["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
        finally:
            if server: server.terminate(); server.wait(20)
    return out

def main():
    global DIM
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=100_000); p.add_argument("--dim", type=int, default=384); p.add_argument("--queries", type=int, default=300)
    p.add_argument("--stores", default="memory,chroma,chroma-server,qdrant"); p.add_argument("--one"); p.add_argument("--save")
    a = p.parse_args(); DIM = a.dim
    if a.one: print(json.dumps(measure(a.one, a.n, a.queries))); return
    rows = []
    print(f"{a.n:,} x {a.dim}, k = 10, {a.queries} questions; load {os.getloadavg()[0]:.1f}\n\n| store | client | p50 / p95 ms | processor ms | recall | filtered p50 / p95 ms | recall | inserted per s (per processor s) | MB |\n|---|---|---|---|---|---|---|---|---|", flush=True)
    for s in a.stores.split(","):
        r = subprocess.run([sys.executable, __file__, "--one", s, "--n", str(a.n), "--dim", str(a.dim), "--queries", str(a.queries)], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(row := json.loads(r.stdout.splitlines()[-1]) | dict(load=os.getloadavg()[0]))
        for w in row["search"]:
            u, f, i = row["search"][w], row["filtered"][w], row.get(f"insert {w}")
            print(f"| {s} | {w} | {u['p50']:.2f} / {u['p95']:.2f} | {u['cpu']:.2f} | {u['recall']:.3f} | {f['p50']:.2f} / {f['p95']:.2f} | {f['recall']:.3f} | " + (f"{i['per_s']:,.0f} ({i['per_cpu_s']:,.0f}) | {i['mb']:.0f} |" if i else "| |"), flush=True)
        k = row["search"]; print(f"| {s} | ours / bare | {k['ours']['p50']/k['bare']['p50']:.2f} / {k['ours']['p95']/k['bare']['p95']:.2f} | {k['ours']['cpu']/k['bare']['cpu']:.2f} | | {row['filtered']['ours']['p50']/row['filtered']['bare']['p50']:.2f} / {row['filtered']['ours']['p95']/row['filtered']['bare']['p95']:.2f} | | | load {row['load']:.1f} |", flush=True)
    if a.save: Path(a.save).write_text(json.dumps(rows, indent=1))

if __name__ == "__main__": main()
