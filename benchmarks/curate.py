"""How long it takes to make a dataset from a large log, how much memory, and what it finds.

    python benchmarks/curate.py                          everything, on 1 M interactions; 0.1, 1 and 3 M for the exponent
    python benchmarks/curate.py --rows 200000 --sizes 50000 200000
    python benchmarks/curate.py --quick                  20 k rows, no peers

The log is generated (the same bytes every time): lengths are log-normal (a prompt has 28 words in the median, an answer 65), words follow Zipf's law, users are few and busy or many and quiet, 12 % of the rows are rated,
10 % of the prompts are other prompts with a few words changed, of which the similarity is computed exactly, and 6 % hold personal data. Every build runs in a process of its own; memory is the largest sum of
the resident sets of that process and its children, sampled ten times a second; CPU counts all of them. The scan floor is polars reading the Parquet file of the same log and writing it back, same compression.
Peers run on part of the same rows, in a scratch environment, as their own documentation says, and are extrapolated linearly; they are compared by CPU seconds, which a busy machine disturbs less than the clock.
With --folder the logs and the result of every run are kept, and --part does a part of the work again: build, growth or peers.
"""
import argparse, json, math, os, platform, shutil, subprocess, sys, tempfile, threading, time
from pathlib import Path

import numpy as np, polars as pl

CHUNK = 50_000
GROUP = ("order delivery refund invoice account login address warranty return discount subscription feedback").split()
HEAD = ("the to a i you is of and it my for in that was on with not have be this your we at can are but if as from will do me an or what when how there please has any has been would so get after why").split()
HELLO,BYE = "hi hello hey dear good so".split(), "please thanks cheers asap today".split()
PRIVATE = dict(EMAIL="You can write to me at {a}.{b}{n}@mail{k}.example.com about this.", PHONE="Please call me on +1 212 555 {m:04d} in the evening.", IBAN="The account is DE89 3704 0044 0532 0130 00 as before.",
               CARD="I paid with the card 4111 1111 1111 1111 last week.", IP="My connection comes from the address 203.0.113.{k} every time.", KEY="I use the key sk-{n:020d}abcdef for it.")
LEFT = dict(EMAIL=r"@mail\d+\.example\.com", PHONE=r"\+1 212 555 \d{4}", IBAN=r"DE89 3704 0044", CARD=r"4111 1111 1111 1111", IP=r"203\.0\.113\.\d", KEY=r"sk-\d{20}abcdef")

def vocabulary(n=6000):
    r = np.random.default_rng(1)
    a,b = list("bcdfghjklmnprstvw")+["st","tr","ch","pl"], "a e i o u ea ou".split()
    words = list(dict.fromkeys(HEAD + ["".join(r.choice(a)+r.choice(b) for _ in range(r.integers(1,4))) + r.choice(["","n","r","s","t","d"]) for _ in range(2*n)]))[:n]
    return words, [w+"." for w in words]

def texts(r, words, ends, lengths):
    "Sentences of Zipf-distributed words"
    v,total = len(words), int(lengths.sum())
    p = 1/np.arange(3, v+3)**1.05
    ix = np.searchsorted(np.cumsum(p/p.sum()), r.random(total)).clip(0, v-1)
    last = np.cumsum(lengths)-1
    stop = r.random(total) < 1/13; stop[last] = True
    row = np.repeat(np.arange(len(lengths)), lengths)
    s = pl.Series("w", words+ends).gather(ix + v*stop)
    return pl.DataFrame(dict(row=row, w=s)).group_by("row", maintain_order=True).agg("w")["w"]

def edited(r, w, words):
    "A prompt as someone else would have put it: some words more, fewer or others, the longer the text the more"
    w,kind = list(w), r.random()
    if kind < .45 or len(w) < 40: w = ([HELLO[r.integers(len(HELLO))]] if r.random() < .5 else []) + w + ([BYE[r.integers(len(BYE))]] if r.random() < .7 else [])
    else:
        for _ in range(r.integers(1, max(2, len(w)//45+1))):
            i = int(r.integers(len(w)))
            if r.random() < .5: w[i] = words[r.integers(len(words))]
            else: del w[i]
    return w

def shingles(t):
    w = t.lower().replace(".","").split()
    return {tuple(w[i:i+3]) for i in range(len(w)-2)} or {tuple(w)}

def generated(n, seed=0):
    "Frames of interactions with the truth about them"
    words,ends = vocabulary()
    for c in range(-(-n//CHUNK)):
        r,m = np.random.default_rng([seed,c]), min(CHUNK, n-c*CHUNK)
        long = lambda median,sigma,most: np.exp(r.normal(math.log(median), sigma, m)).clip(4, most).astype(int)
        prompts,answers = texts(r, words, ends, long(28,.8,1500)).to_list(), texts(r, words, ends, long(65,.7,3000)).list.join(" ").to_list()
        of = np.full(m, -1)
        copy = np.sort(r.choice(np.arange(1,m), m//10, replace=False)); fresh = np.setdiff1d(np.arange(m), copy)
        for i in copy: of[i] = j = int(fresh[r.integers(len(fresh))]); prompts[i] = edited(r, prompts[j], words)
        prompts = [" ".join(w) for w in prompts]
        kinds = np.full(m, "", object); hold = r.choice(m, m*6//100, replace=False); names = list(PRIVATE)
        for i in hold:
            if of[i] >= 0 or (of == i).any(): continue
            k = kinds[i] = names[r.integers(len(names))]
            prompts[i] += " " + PRIVATE[k].format(a=words[50+r.integers(900)], b=words[50+r.integers(900)], n=int(r.integers(10**6)), k=int(r.integers(1,250)), m=int(r.integers(100,200)))
        bad = r.random(m) < .25
        answers = [a[:-1].rsplit(" ",1)[0] if b and u < .5 else "I'm sorry, but I cannot help with that. "+a if b and u < .8 else a for a,b,u in zip(answers, bad, r.random(m))]
        user = (50_000*r.random(m)**2).astype(int)
        like = np.where(bad, 2., 4.3) + r.normal(0,.9,m)
        rated = r.random(m) < .12
        yield pl.DataFrame(dict(id=[f"int_{c*CHUNK+i:010d}" for i in range(m)], ts=1_780_000_000_000 + r.integers(0, 90*86_400_000, m), app=["bench"]*m, user_id=[f"u{u:05d}" for u in user], session_id=[f"s{u:05d}-{k}" for u,k in zip(user, r.integers(0,12,m))],
            prompt=prompts, answer=answers, model=np.array(["small","large","new"])[r.integers(0,3,m)], provider=["local"]*m, category=np.array(GROUP)[np.minimum((r.pareto(.7,m)).astype(int), len(GROUP)-1)], prompt_tokens=[len(p)//5 for p in prompts], completion_tokens=[len(a)//5 for a in answers],
            latency_ms=r.lognormal(6.5,.5,m), status=np.where(r.random(m) < .01, "error", "ok"), rating=pl.Series(np.clip(np.rint(like),1,5)).set(pl.Series(~rated), None),
            feedback=np.where(r.random(m) < .05, np.where(bad, '{"regenerated": true}', '{"copied": true}'), ""))).with_columns(pl.col("ts").cast(pl.Datetime("ms","UTC"))), of + np.where(of >= 0, c*CHUNK, 0), kinds

def prepare(n, folder):
    "The log as Parquet and in a warehouse, and the truth about it"
    from somaagent.store.warehouse import Warehouse
    (folder/"parquet").mkdir(parents=True)
    of,kinds,sims = [],[],[]
    with Warehouse(f"chdb://{folder/'wh'}", mode="direct") as wh:
        for c,(df,o,k) in enumerate(generated(n)):
            df.write_parquet(folder/"parquet"/f"{c:04d}.parquet", compression="zstd", compression_level=3, row_group_size=50_000)
            wh.insert("interactions", df, token=f"bench{c}")
            p = df["prompt"].to_list(); at = np.flatnonzero(o >= 0)
            for i in at: a,b = shingles(p[i]),shingles(p[o[i]-c*CHUNK]); sims.append(len(a&b)/len(a|b))
            of.append(o); kinds.append(k.astype(str))
        wh.command("OPTIMIZE TABLE interactions")
        nbytes = int(wh.query("SELECT sum(length(prompt)+length(answer)) n FROM interactions")["n"][0])
    of = np.concatenate(of); sim = np.full(n, np.nan); sim[of >= 0] = sims
    np.savez(folder/"truth.npz", of=of, sim=sim, kind=np.concatenate(kinds))
    return nbytes

# ---- in a process of its own

def cpu():
    t = os.times(); return t.user+t.system+t.children_user+t.children_system

class Watch:
    "Largest resident set of this process and its children, and seconds by stage"
    def __init__(self):
        import psutil
        self.me,self.peak,self.alive,self.marks = psutil.Process(),0,True,[]
        threading.Thread(target=self.look, daemon=True).start()
    def look(self):
        import psutil
        while self.alive:
            n = 0
            for p in [self.me, *self.me.children(recursive=True)]:
                try: n += p.memory_info().rss
                except psutil.Error: pass
            self.peak = max(self.peak, n); time.sleep(.1)
    def mark(self, stage): self.marks.append((stage, time.perf_counter(), cpu()))
    def end(self):
        self.mark("end"); self.alive = False
        return dict(peak=self.peak, seconds=self.marks[-1][1]-self.marks[0][1], cpu=self.marks[-1][2]-self.marks[0][2], stages=[(a[0], b[1]-a[1], b[2]-a[2]) for a,b in zip(self.marks, self.marks[1:])])

def child_floor(folder, **_):
    w = Watch(); w.mark("read and write")
    pl.scan_parquet(str(folder/"parquet"/"*.parquet")).sink_parquet(folder/"floor.parquet", compression="zstd", compression_level=3, row_group_size=50_000)
    return w.end()

def child_build(folder, recipe, **_):
    from somaagent.data import builder
    from somaagent.data.dataset import load_dataset_dir
    from somaagent.store.state import State
    from somaagent.store.warehouse import Warehouse
    seen,near,queries = {},builder._near,[]
    def spy(log, rows, threshold):
        out = near(log, rows, threshold)
        seen.update(ids=rows["id"], row=rows["row"].to_numpy(), kept=out.to_numpy())
        return out
    builder._near = spy
    st = State(f"sqlite:///{folder/'state.db'}")
    with Warehouse(f"chdb://{folder/'wh'}", mode="direct") as wh:
        for name in ("query","stream"): setattr(wh, name, lambda *a, _f=getattr(wh,name), **k: (queries.append(1), _f(*a, **k))[1])
        w = Watch()
        ds = builder.build(wh, "bench", folder/"datasets", recipe, st=st, on_stage=w.mark)
        out = w.end()
    m = load_dataset_dir(ds.path, verify=False).manifest
    out |= dict(queries=len(queries), splits=ds.splits, hash=ds.hash, funnel=ds.counts["funnel"], quality={k: m["quality"].get(k) for k in ("method","reliability","rated","fitted_on")}, notes=m["notes"], privacy=m.get("privacy",{}), bytes=sum(f.stat().st_size for f in Path(ds.path).glob("*.parquet")))
    truth = np.load(folder/"truth.npz", allow_pickle=False)
    if seen: out["near"] = judged(seen, truth, recipe["dedup"]["near"])
    if recipe.get("privacy",{}).get("redact"):
        rows = pl.concat([pl.scan_parquet(Path(ds.path)/f"{s}.parquet").select("id","prompt") for s in ("train","validation","test")]).collect(engine="streaming")
        kind = pl.Series("kind", truth["kind"]).gather(rows["id"].str.slice(4).cast(pl.Int64))
        out["left"] = {k: (int((kind == k).sum()), int(((kind == k) & rows["prompt"].str.contains(rx)).sum())) for k,rx in LEFT.items()}
    st.close()
    return out

def judged(seen, truth, threshold):
    "Recall and precision of the planted near-duplicates among the rows that the index was shown"
    no = seen["ids"].str.slice(4).cast(pl.Int64).to_numpy()
    n = len(truth["of"]); group = np.full(n, -1); by_row = dict(zip(seen["row"].tolist(), no.tolist()))
    group[no] = [by_row[k] for k in seen["kept"].tolist()]
    copy = np.flatnonzero((truth["of"] >= 0) & (group >= 0)); copy = copy[group[truth["of"][copy]] >= 0]
    sim,hit = truth["sim"][copy], group[copy] == group[truth["of"][copy]]
    # two copies of one prompt may be nearer to each other than the kept one is to either: family, not pair, is what counts for precision
    family = np.where(truth["of"] >= 0, truth["of"], np.arange(n))
    gone = no[group[no] != no]
    return dict(planted=int(len(copy)), over=int((sim >= threshold).sum()), found=int(hit[sim >= threshold].sum()), under_found=int(hit[sim < threshold].sum()), under=int((sim < threshold).sum()), dropped=int(len(gone)), right=int((family[gone] == family[group[gone]]).sum()))

def in_child(what, folder, keep="", again=True, **kw):
    "The result of a run; with `keep` it is written down, and unless it is to be run again, read"
    if keep and not again and (f := folder/f"{keep}.json").exists(): return json.loads(f.read_text())
    p = subprocess.run([sys.executable, __file__, "--child", json.dumps(dict(what=what, folder=str(folder), **kw))], capture_output=True, text=True, env=os.environ | dict(SOMA_PROGRESS="none", OMP_NUM_THREADS="1"))
    if p.returncode: sys.exit(p.stderr[-3000:])
    if keep: (folder/f"{keep}.json").write_text(p.stdout.splitlines()[-1])
    return json.loads(p.stdout.splitlines()[-1])

# ---- peers

PEERS = dict(
    datasketch=("MinHashLSH(0.8), 128 permutations, word 3-shingles", "datasketch", """
import json, sys, time
from datasketch import MinHash, MinHashLSH
t = [json.loads(l) for l in open(sys.argv[1])]
a = time.process_time(); lsh = MinHashLSH(threshold=.8, num_perm=128)
for i,x in enumerate(t):
    w = x.lower().split(); m = MinHash(num_perm=128)
    m.update_batch([" ".join(w[k:k+3]).encode() for k in range(max(1,len(w)-2))]); lsh.query(m); lsh.insert(i, m)
print(time.process_time()-a)"""),
    presidio=("AnalyzerEngine and AnonymizerEngine, defaults", "presidio-analyzer presidio-anonymizer", """
import json, sys, time
import spacy.util
if not spacy.util.is_package("en_core_web_lg"): sys.exit("its language model en_core_web_lg is not installed")
from presidio_analyzer import AnalyzerEngine
from presidio_anonymizer import AnonymizerEngine
t = [json.loads(l) for l in open(sys.argv[1])]
e,z = AnalyzerEngine(),AnonymizerEngine(); a = time.process_time()
for x in t: z.anonymize(text=x, analyzer_results=e.analyze(text=x, language="en"))
print(time.process_time()-a)"""),
    scrubadub=("Scrubber(), defaults", "scrubadub", """
import json, sys, time
import scrubadub
t = [json.loads(l) for l in open(sys.argv[1])]
s = scrubadub.Scrubber(); s.clean("warm"); a = time.process_time()
for x in t: s.clean(x)
print(time.process_time()-a)"""))

def peers(folder, n, which):
    "CPU seconds of each peer on part of the rows; a sentence where it cannot run"
    df = pl.scan_parquet(str(folder/"parquet"/"*.parquet")).select("prompt","answer").head(n).collect()
    out,venv = {}, folder/"venv"
    if subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True).returncode: return {k: "no scratch environment could be made" for k in which}
    for k in which:
        say,packages,code = PEERS[k]
        p = subprocess.run([venv/"bin/python", "-m", "pip", "install", "-q", *packages.split()], capture_output=True, text=True)
        if p.returncode: out[k] = "not installable: " + (p.stderr.strip().splitlines() or ["?"])[-1][:160]; continue
        part = df["prompt"].head(n).to_list() if k == "datasketch" else (df["prompt"].head(n//20) + "\n" + df["answer"].head(n//20)).to_list()
        (folder/"rows.jsonl").write_text("\n".join(json.dumps(x) for x in part))
        p = subprocess.run([venv/"bin/python", "-c", code, str(folder/"rows.jsonl")], capture_output=True, text=True)
        version = subprocess.run([venv/"bin/python", "-m", "pip", "list", "--format", "freeze"], capture_output=True, text=True).stdout
        v = " ".join(l for l in version.splitlines() if l.split("==")[0] in packages.split())
        out[k] = (v+", "+say, len(part), float(p.stdout.split()[-1])) if not p.returncode else "does not run: " + (p.stderr.strip().splitlines() or ["?"])[-1][:160]
    return out

# ---- the table

def table(title, head, rows):
    cells = [head, *[[x if isinstance(x,str) else f"{x:,.0f}" if isinstance(x,int) or x >= 100 else f"{x:.3g}" for x in r] for r in rows]]
    w = [max(len(c[i]) for c in cells) for i in range(len(head))]
    print(f"\n**{title}**\n")
    for k,c in enumerate(cells):
        print("| " + " | ".join(v.ljust(n) if i == 0 else v.rjust(n) for i,(v,n) in enumerate(zip(c,w))) + " |")
        if not k: print("|" + "|".join("-"*(n+1) + ("-" if i == 0 else ":") for i,n in enumerate(w)) + "|")
    sys.stdout.flush()

PLAIN = dict(quality=dict(method="calibrated", min_tier="Good"), dedup=dict(near=.8), balance=dict(temperature=.7))
PARTS = ["build","growth","peers"]
FULL = PLAIN | dict(privacy=dict(redact=True))

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--rows", type=int, default=1_000_000); a.add_argument("--sizes", type=int, nargs="*", default=[100_000, 1_000_000, 3_000_000])
    a.add_argument("--quick", action="store_true"); a.add_argument("--no-peers", action="store_true"); a.add_argument("--peer-rows", type=int, default=20_000); a.add_argument("--folder", help="kept, with the logs in it"); a.add_argument("--part", nargs="*", choices=PARTS, default=PARTS); a.add_argument("--child")
    o = a.parse_args()
    if o.child:
        k = json.loads(o.child); f = globals()["child_"+k.pop("what")]
        return print(json.dumps(f(folder=Path(k.pop("folder")), **k)))
    if o.quick: o.rows,o.sizes,o.no_peers = 20_000,[10_000,20_000],True
    top = Path(o.folder or tempfile.mkdtemp(prefix="curate-"))
    try: run(o, top)
    finally:
        if not o.folder: shutil.rmtree(top, ignore_errors=True)

def run(o, top):
    load = os.getloadavg()
    print(f"`python benchmarks/curate.py {' '.join(sys.argv[1:])}` on {os.cpu_count()} cores ({platform.processor() or platform.machine()}), Python {platform.python_version()}, polars {pl.__version__}; load average {load[0]:.1f} at the start")
    made = {}
    def log(n):
        f = top/str(n)
        if not (f/"truth.npz").exists(): shutil.rmtree(f, ignore_errors=True); f.mkdir(parents=True); t = time.time(); b = prepare(n, f); (f/"bytes").write_text(str(b)); print(f"\n{n:,} interactions, {b/1e6:,.0f} MB of text, generated and stored in {time.time()-t:.0f} s", flush=True)
        made[n] = f; return f
    f = log(o.rows)
    new = "build" in o.part
    floor = min((in_child("floor", f, f"floor{k}", new) for k in range(3)), key=lambda r: r["seconds"]); (f/"floor.parquet").unlink(missing_ok=True)
    runs = {"without redaction": in_child("build", f, "plain", new, recipe=PLAIN), "with redaction": in_child("build", f, "full", new, recipe=FULL)}
    rows = [["scan floor: polars reads and writes", floor["seconds"], floor["cpu"], o.rows/floor["seconds"], floor["peak"]/1e9, 1.]]
    for name,r in runs.items():
        rows.append([f"**build {name}**", r["seconds"], r["cpu"], o.rows/r["seconds"], r["peak"]/1e9, r["seconds"]/floor["seconds"]])
        rows += [["– "+s, t, c, o.rows/max(t,1e-9), "", t/floor["seconds"]] for s,t,c in r["stages"]]
    table(f"{o.rows:,} interactions", ["", "seconds", "CPU s", "rows/s", "peak GB", "× floor"], rows)
    r = runs["with redaction"]; n = r["near"]
    print(f"\nDataset: {', '.join(f'{k} {v:,}' for k,v in r['splits'].items())}; {r['bytes']/1e6:,.0f} MB; {r['queries']} queries. Quality: {json.dumps(r['quality'])}.")
    for name,x in runs.items():
        n = x["near"]
        print(f"Near-duplicates {name}: {n['over']:,} planted with a similarity of 0.8 or more, recall {n['found']/max(1,n['over']):.4f}; {n['under']:,} planted below it, of which {n['under_found']:,} were found too; {n['dropped']:,} rows dropped, precision {n['right']/max(1,n['dropped']):.4f} (of one planted family).")
    p = r["privacy"]
    print(f"Personal data: {p['findings']:,} findings in {p['rows_with']:,} rows. Planted and still there in the dataset: " + ", ".join(f"{k} {left} of {of:,}" for k,(of,left) in r["left"].items()) + ".")
    good = r["splits"]["train"]
    print(f"Founding figure: 1,000 good examples in 300 s, 3.3 a second; here {good:,} in {r['seconds']:.0f} s, {good/r['seconds']:,.0f} a second: {good/r['seconds']/(1000/300):,.0f} times as many.")
    if len(o.sizes) > 1 and "growth" in o.part:
        times = {s: runs["without redaction"] if s == o.rows else in_child("build", log(s), "plain", "growth" in o.part, recipe=PLAIN) for s in o.sizes}
        x,y = (np.log([float(v) for v in z]) for z in (list(times), [t["seconds"] for t in times.values()]))
        table("Growth, without redaction", ["interactions", "seconds", "CPU s", "rows/s", "peak GB", "queries"], [[f"{s:,}", t["seconds"], t["cpu"], s/t["seconds"], t["peak"]/1e9, t["queries"]] for s,t in times.items()])
        print(f"\nSeconds grow with the rows to the power of {np.polyfit(x,y,1)[0]:.2f}; CPU seconds {np.polyfit(x,np.log([t['cpu'] for t in times.values()]),1)[0]:.2f}.")
    if not o.no_peers and "peers" in o.part:
        ours = dict(datasketch=dict((s,c) for s,_,c in runs["without redaction"]["stages"])["de-duplicating"]) | dict.fromkeys(("presidio","scrubadub"), dict((s,c) for s,_,c in r["stages"])["redacting"])
        got = peers(f, o.peer_rows, list(PEERS))
        table(f"Peers for one stage, on part of the same rows, extrapolated linearly to {o.rows:,}", ["", "rows run", "CPU s", f"CPU s for {o.rows:,}", "our stage", "times ours"],
              [[k+": "+v, "–", "–", "–", ours[k], "–"] if isinstance(v,str) else [v[0], v[1], v[2], v[2]*o.rows/v[1], ours[k], v[2]*o.rows/v[1]/ours[k]] for k,v in got.items()])
    if o.quick: assert n["found"] >= .9*n["over"] and r["queries"] <= 5

if __name__ == "__main__": main()
