"""Near-duplicates of a million texts: time, memory, recall and precision, beside the libraries that do the same.

    python benchmarks/near.py                          # 1 M texts through a NearIndex
    python benchmarks/near.py --rows 100000 --peers    # and the peers that are installed: pip install rensa gaoya datasketch

Texts of 30 to 250 words (150 to 1,650 characters) from a word list as uneven as a language's; a tenth are copies of others with up to one word in sixteen replaced, so their similarities lie on both sides of the threshold.
The index is built in a process of its own, which has read the texts and done nothing else; its resident set is looked at a hundred times a second. The truth is the exact Jaccard similarity of word triples. Everything runs on one core (the peers' thread pools too); seconds are CPU seconds of this process, which a busy machine disturbs less than the clock.
"""
import argparse, os, subprocess, sys, tempfile, threading, time
from pathlib import Path
for k in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS"): os.environ[k] = "1"

import numpy as np
import polars as pl

from somaagent.data.neardup import NearIndex

def texts(n, seed=0, share=.1, rate=.0625, vocabulary=30000):
    "`n` texts in chunks, and the pairs (copy, original) among them"
    r = np.random.default_rng(seed)
    syllables = np.array("ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo zu an er in or us al em ic op ut".split())
    words = np.array(["".join(syllables[r.integers(0, 30, r.integers(1, 5))]) for _ in range(vocabulary)])
    cdf = np.cumsum(p := 1/np.arange(5, vocabulary+5))/p.sum()
    draw = lambda k: words[np.searchsorted(cdf, r.random(k)).clip(0, vocabulary-1)]
    out, pairs = [], []
    for a in range(0, n, 1000):
        m = min(1000, n-a); old = m-int(m*share)
        chunk = [draw(int(k)) for k in r.integers(30, 251, old)]
        for s in r.integers(0, old, m-old):
            w = chunk[s].copy(); at = r.integers(0, len(w), r.binomial(len(w), r.random()*rate)); w[at] = draw(len(at))
            pairs.append((a+len(chunk), a+s)); chunk.append(w)
        out += [" ".join(w) for w in chunk]
    return pl.Series(out), np.array(pairs)

def jaccard(a, b):
    f = lambda t: {tuple(w[i:i+3]) for w in [t.split()] for i in range(max(1, len(w)-2))}
    x, y = f(a), f(b)
    return len(x & y)/len(x | y)

def timed(what, fn):
    c, w = time.process_time(), time.perf_counter()
    res = fn()
    print(f"{what:<52}{time.process_time()-c:8.1f} s CPU {time.perf_counter()-w:8.1f} s", flush=True)
    return res

def quality(found, pairs, t):
    "Recall and precision over the planted pairs, and rows joined that were not planted"
    true = np.array([jaccard(t[int(a)], t[int(b)]) for a, b in pairs]) >= .8
    return f"planted {len(pairs):,}, truly ≥ .8 {true.sum():,}; recall {found[true].mean():.4f}, precision {true[found].mean():.4f}"

class Peak:
    "The largest resident set of this process while it is open"
    def __enter__(self):
        import psutil
        self.me, self.on = psutil.Process(), True
        self.base = self.peak = self.me.memory_info().rss
        self.t = threading.Thread(target=self.look, daemon=True); self.t.start()
        return self
    def look(self):
        while self.on: self.peak = max(self.peak, self.me.memory_info().rss); time.sleep(.01)
    def __exit__(self, *_): self.on = False; self.t.join()

def ours(t, pairs, chunk=50_000):
    ix = NearIndex()
    def add():
        for a in range(0, len(t), chunk): ix.add(None, t[a:a+chunk])
    with Peak() as m:
        timed(f"NearIndex.add, {len(t):,} texts", add)
        lab = timed("NearIndex.clusters", ix.clusters)
    found = lab[pairs[:, 0]] == lab[pairs[:, 1]]
    rows = (lab != np.arange(len(t))).sum()
    print(f"  index {ix.nbytes/1e6:,.0f} MB, peak above the process with its texts ({m.base/1e6:,.0f} MB) {(m.peak-m.base)/1e6:,.0f} MB; {quality(found, pairs, t)}; rows in groups that no planted pair explains: {rows-found.sum():,}")

def peers(t, pairs):
    lists = lambda: [[" ".join(w[i:i+3]) for i in range(max(1, len(w)-2))] for w in (x.split() for x in t.to_list())]
    try:
        from rensa import RMinHash, RMinHashLSH
        tok = timed("rensa: lists of tokens in Python", lists)
        m = timed("rensa: sketches", lambda: RMinHash.digest_matrix_from_token_sets(tok, num_perm=128, seed=1))
        def flags():
            return RMinHashLSH(threshold=.8, num_perm=128, num_bands=16).insert_matrix_and_query_duplicate_flags(m, 0)
        f = np.array(timed("rensa: flags (candidates, no pairs)", flags))
        print(f"  {f.sum():,} rows flagged"); del tok
    except ImportError: print("rensa is not installed")
    try:
        from gaoya.minhash import MinHashStringIndex
        ix = MinHashStringIndex(hash_size=16, jaccard_threshold=.8, num_bands=16, band_size=8, analyzer="word", lowercase=True, ngram_range=(3, 3))
        s = t.to_list()
        timed("gaoya: insert", lambda: ix.par_bulk_insert_docs(list(range(len(s))), s))
        q = timed("gaoya: query", lambda: ix.par_bulk_query(s))
        print(f"  {quality(np.array([int(b) in q[int(a)] for a, b in pairs]), pairs, t)}")
    except ImportError: print("gaoya is not installed")
    try:
        from datasketch import MinHash, MinHashLSH
        k = min(len(t), 10_000)
        def run():
            m = MinHash.bulk([[g.encode() for g in x] for x in (lambda s: [[" ".join(w[i:i+3]) for i in range(max(1, len(w)-2))] for w in (x.split() for x in s)])(t[:k].to_list())], num_perm=128)
            lsh = MinHashLSH(threshold=.8, num_perm=128)
            for i, x in enumerate(m): lsh.insert(i, x)
            return [lsh.query(x) for x in m]
        timed(f"datasketch, {k:,} texts", run)
    except ImportError: print("datasketch is not installed")

def apart(t, pairs):
    "`ours` in a process that holds the texts and nothing else"
    with tempfile.TemporaryDirectory() as d:
        t.to_frame("t").write_parquet(Path(d)/"t.parquet"); np.save(Path(d)/"pairs.npy", pairs)
        if subprocess.run([sys.executable, __file__, "--child", d]).returncode: sys.exit("the index was not built")

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rows", type=int, default=1_000_000)
    p.add_argument("--peers", action="store_true")
    p.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        ours(pl.read_parquet(a.child/"t.parquet")["t"], np.load(a.child/"pairs.npy")); sys.exit()
    t, pairs = texts(a.rows)
    n = t.str.len_bytes()
    print(f"{len(t):,} texts of {n.min()} to {n.max():,} characters, mean {n.mean():.0f}; Python {sys.version.split()[0]}, numpy {np.__version__}", flush=True)
    apart(t, pairs)
    if a.peers: peers(t, pairs)
