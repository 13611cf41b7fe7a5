"""Documents a second, and what the speed costs in retrieval: MiniLM in integers, in 32 bits, through sentence-transformers, and the static table.

    python benchmarks/embed.py [--threads 2] [--seconds 4] [--data ../shared/data] [--json out.json]

All of them embed the same texts in the same run, in turn and twice; the better round counts. Texts are real sentences of the shipped help centre, put together until they have about 20 or 100 tokens.
Where other processes are at work, seconds of the processor say more than seconds of the clock: both are printed. nDCG@10 is that of the vectors alone on the help centre and, with --data, on Banking77 (same intent)."""
import argparse, csv, json, os, statistics, sys, time
from pathlib import Path

a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
a.add_argument("--threads", type=int, default=2)
a.add_argument("--seconds", type=float, default=4., help="per embedder, length and round")
a.add_argument("--data", default="", help="folder with banking77")
a.add_argument("--json", default="")
a.add_argument("--only", default="", help="comma-separated names")
args = a.parse_args()
os.environ["SOMA_MODELS_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(args.threads)
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np

from somaagent.llm.embed import embedder, minilm_folder
from somaagent.rag.measure import collection, interval, measure

hc = collection()
pool = [s.strip() + "." for d in hc.docs for s in d["text"].split(". ")]

def texts(tokens, n, tok):
    "About `tokens` tokens each, no two alike"
    rng, out = np.random.default_rng(tokens), []
    while len(out) < n:
        t = ""
        while True:
            t = (t + " " + pool[rng.integers(len(pool))]).strip()
            ids = tok.encode(t)
            if len(ids.ids) >= tokens: break
        out.append(t[:ids.offsets[tokens-2][1]])
    return list(dict.fromkeys(out))

class SentenceTransformers:
    name = "sentence-transformers"
    def __init__(self):
        import torch
        from sentence_transformers import SentenceTransformer
        torch.set_num_threads(args.threads)
        self.model = SentenceTransformer(str(minilm_folder()), device="cpu")
    def _vectors(self, t): return self.model.encode(t, batch_size=32, show_progress_bar=False)
    def embed(self, t, query=False): return self.model.encode(t, batch_size=32, show_progress_bar=False, normalize_embeddings=True)

def make(name): return SentenceTransformers() if name == "sentence-transformers" else embedder(name, cache=False, **(dict(threads=args.threads) if name == "minilm-int8" else {}))

names = [n for n in ("minilm-int8", "minilm", "sentence-transformers", "static") if not args.only or n in args.only.split(",")]
made, loaded = {}, {}
for n in names:
    if n == "sentence-transformers":
        try: import sentence_transformers  # noqa
        except ImportError: print("sentence-transformers is not installed: left out", file=sys.stderr); continue
    if n in ("minilm-int8", "static"): make(n)   # the first use writes its file
    t = time.perf_counter(); made[n] = make(n); loaded[n] = time.perf_counter()-t

tok = embedder("minilm-int8", cache=False).tok
speed = {n: {} for n in made}
for tokens, n_texts in ((20, 256), (100, 64)):
    T = texts(tokens, n_texts, tok)
    for _ in range(2):
        for n, e in made.items():
            e._vectors(T[:8])
            done, t, c, parts = 0, time.perf_counter(), time.process_time(), [T[i:i+64] for i in range(0, len(T), 64)] if n != "static" else [T]
            while time.perf_counter()-t < args.seconds:
                e._vectors(parts[0]); done += len(parts[0]); parts.append(parts.pop(0))
            t, c = time.perf_counter()-t, time.process_time()-c
            best = speed[n].get(tokens, (0, 0))
            speed[n][tokens] = (max(best[0], done/t), max(best[1], done/c))

def single(e):
    "Milliseconds for one question"
    out = []
    for q in hc.answerable[:60]: t = time.perf_counter(); e._vectors([q["question"]]); out.append(1000*(time.perf_counter()-t))
    return statistics.median(out)

def rank(V, ids, qs): return {q["id"]: [ids[i] for i in np.argsort(-v, kind="stable")[:20]] for q, v in zip(qs, V)}
def collections():
    docs = hc.documents()
    yield "help centre", [d["id"] for d in docs], [d["text"] for d in docs], hc.answerable
    if args.data:
        rd = lambda f: list(csv.DictReader(open(Path(args.data)/"banking77"/f, encoding="utf-8", newline="")))
        rng = np.random.default_rng(0)
        docs, asked = ([r[i] for i in rng.permutation(len(r))[:n]] for r, n in ((rd("train.csv"), 2500), (rd("test.csv"), 300)))
        ids = [str(i) for i in range(len(docs))]
        yield "banking77", ids, [d["text"] for d in docs], [dict(id=str(i), question=q["text"], kind="", relevant={j: 1 for j, d in zip(ids, docs) if d["category"] == q["category"]}) for i, q in enumerate(asked)]

quality = {n: {} for n in made}
for where, ids, docs, qs in collections():
    M = {n: measure(rank(e.embed([q["question"] for q in qs], query=True) @ e.embed(docs).T, ids, qs), qs) for n, e in made.items()}
    for n, m in M.items():
        d = m.against(M["minilm"]) if "minilm" in M else None
        quality[n][where] = dict(zip(("ndcg", "lo", "hi"), interval(m.frame["ndcg"]))) | (dict(less=d.diff, less_lo=d.lo, less_hi=d.hi) if d else {})

base = "sentence-transformers" if "sentence-transformers" in made else "minilm"
print(f"{args.threads} threads, load {os.getloadavg()[0]:.1f}\n")
print(f"| | documents/s, 20 tokens | 100 tokens | per processor second, 20 / 100 | × {base}, 20 / 100 (processor) | one question, ms | loaded, s | " + " | ".join(f"nDCG@10 {w}" for w in quality[names[0]]) + " |")
print("|" + "---|"*(7+len(quality[names[0]])))
ms = {n: single(e) for n, e in made.items()}
for n in made:
    s, b = speed[n], speed[base]
    q = " | ".join(f"{x['ndcg']:.3f}" + (f" ({x['less']:+.3f} [{x['less_lo']:+.3f}, {x['less_hi']:+.3f}])" if n != "minilm" and "less" in x else "") for x in quality[n].values())
    print(f"| {n} | {s[20][0]:,.0f} | {s[100][0]:,.0f} | {s[20][1]:,.0f} / {s[100][1]:,.0f} | {s[20][1]/b[20][1]:.2f} / {s[100][1]/b[100][1]:.2f} | {ms[n]:.1f} | {loaded[n]:.2f} | {q} |")
if args.json: Path(args.json).write_text(json.dumps(dict(threads=args.threads, load=os.getloadavg()[0], speed=speed, quality=quality, single_ms=ms, loaded_s=loaded), indent=1))
