"""Near and semantic duplicates, embeddings, contamination: planted truth, invariances, hostile text, leaks that must be found."""
import json, os, tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from somaagent.core.errors import DataError, MissingExtraError, ModelError, SomaError
from somaagent.data.contamination import Benchmark, check, fingerprint, leaks, load_benchmarks
from somaagent.data.dedup import text_key
from somaagent.data.neardup import NearIndex, clusters, near
from somaagent.data.semantic import groups, semantic
from somaagent.data.shingles import fold, shingles, words
from somaagent.data.sketches import curve, plan
from somaagent.llm import embed as emb

shared = Path(os.environ.get("SOMA_SHARED_DATA") or Path(__file__).resolve().parents[2]/"shared/data")
FROZEN = ["ddbc321ac501df00", "99bcf32acd57b07b", "3189c4ade1caee2a"]
few = settings(max_examples=40, deadline=None)

def key(texts): return pl.DataFrame({"t": texts}, schema={"t": pl.String}).select(text_key("t"))["t"].to_list()

# --- planted truth

def jaccard(a, b, n=3):
    f = lambda t: {tuple(w[i:i+n]) for w in [t.split()] for i in range(max(1, len(w)-n+1))}
    x, y = f(a), f(b)
    return len(x & y)/len(x | y)

def planted(n, seed, lo=30, hi=250, rate=.06):
    "`n` texts of 200 to 1,500 characters, each with an edited copy; a word list as uneven as a language's"
    r = np.random.default_rng(seed)
    p = 1/np.arange(5, 20005); p /= p.sum()
    draw = lambda k: [f"w{x}x" for x in r.choice(20000, k, p=p)]
    out = []
    for _ in range(n):
        a = draw(int(r.integers(lo, hi)))
        b = list(a)
        for i in r.integers(0, len(b), r.binomial(len(b), r.random()*rate)): b[i] = draw(1)[0]
        out.append((" ".join(a), " ".join(b)))
    return out

def test_planted_near_duplicates_are_found_and_nothing_else():
    """Truth: exact Jaccard similarity of word triples. A pair just at .8 becomes no candidate with probability .0028 and is misread by the sketch only within some .02 of the threshold, so of 1,500 pairs spread
    over the threshold fewer than 3 % on either side may be wrong (expected: 1 %; more than 3 % by chance has a probability below one in a million)."""
    pairs = planted(1500, 7)
    t = pl.Series([x for p in pairs for x in p])
    lab = NearIndex().add(None, t).clusters()
    true = np.array([jaccard(*p) for p in pairs]) >= .8
    found = lab[::2] == lab[1::2]
    assert 700 < true.sum() < 1400
    assert found[true].mean() >= .97, "recall"
    assert true[found].mean() >= .97, "precision of planted pairs"
    assert len(np.unique(lab)) == len(lab) - found.sum(), "texts that have nothing to do with each other were joined"

@pytest.mark.parametrize("words_", [6, 10, 16, 24])
def test_short_texts_are_exact(words_):
    "With few shingles the odd sketch has next to no collisions: the verdict is that of the exact similarity, for all but a pair in fifty"
    r = np.random.default_rng(words_)
    pairs = planted(250, words_, words_, words_+1, .3)
    lab = NearIndex().add(None, pl.Series([x for p in pairs for x in p])).clusters()
    true = np.array([jaccard(*p) for p in pairs]) >= .8
    assert ((lab[::2] == lab[1::2]) == true).mean() >= .98

def test_the_plan_keeps_its_promise():
    for t in (.3, .5, .65, .8, .9, .95, 1.):
        r, b = plan(t)
        assert 1-curve(t, r, b) <= .01 and r*b <= 256
    for bad in (0, .2, 1.5, -1):
        with pytest.raises(DataError, match="between .3 and 1"): plan(bad)

# --- invariances

word = st.sampled_from("the card payment has not arrived please help me with my transfer to another bank account today".split())
text = st.lists(word, max_size=14).map(" ".join)

@few
@given(st.lists(text, min_size=1, max_size=24), st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_order(texts, rnd):
    o = list(range(len(texts))); rnd.shuffle(o)
    a = NearIndex(.6).add(None, pl.Series(texts, dtype=pl.String)).clusters()
    b = NearIndex(.6).add(None, pl.Series([texts[i] for i in o], dtype=pl.String)).clusters()
    back = np.empty(len(o), int); back[o] = b
    part = lambda l: {frozenset(np.flatnonzero(l == x).tolist()) for x in set(l.tolist())}
    assert part(a) == part(back)
    assert (a == a[a]).all() and (a <= np.arange(len(a))).all(), "a label is the first row of its group"

@few
@given(st.lists(st.tuples(text, st.floats(0, 1)), min_size=1, max_size=24), st.integers(1, 7))
def test_near_is_idempotent_honest_and_streams(rows, step):
    df = pl.DataFrame(dict(id=[f"r{i:02d}" for i in range(len(rows))], prompt=[t for t, _ in rows], quality=[q for _, q in rows]))
    kept, dropped = near(df, threshold=.6)
    assert kept.height+dropped.height == df.height and kept["copies"].sum() == df.height
    assert set(dropped["kept_id"]) <= set(kept["id"]) and (dropped["similarity"] >= .6-1e-9).all()
    q = dict(zip(df["id"], df["quality"]))
    assert all(q[k] >= q[d] for d, k in zip(dropped["id"], dropped["kept_id"])), "the better row is kept"
    assert near(kept, threshold=.6)[1].is_empty()
    assert near(df.reverse(), threshold=.6)[0].sort("id").equals(kept.sort("id"))
    ix = NearIndex(.6)
    for a in range(0, len(df), step): ix.add(np.arange(a, min(a+step, len(df))), df["prompt"][a:a+step])
    assert (ix.clusters() == NearIndex(.6).add(None, df["prompt"]).clusters()).all()

@few
@given(st.lists(text, min_size=1, max_size=16))
def test_match_agrees_with_clusters(texts):
    t = pl.Series(texts, dtype=pl.String)
    m = NearIndex(.7).add(None, t).match(t)
    assert m["row"].to_list() == [i for i, x in enumerate(texts) if x.strip()], "every text with a word finds itself"
    assert (m["similarity"] == 1).all()

def test_large_buckets_are_bounded_and_joined():
    "A template that thousands filled in: one group, and fewer comparisons than pairs"
    base = " ".join(f"w{i}" for i in range(60))
    t = pl.Series([base+f" number{i}" for i in range(3000)])
    ix = NearIndex()
    calls = []
    real = NearIndex._similar
    try:
        NearIndex._similar = lambda self, i, j: (calls.append(len(i)), real(self, i, j))[1]
        assert len(np.unique(ix.add(None, t).clusters())) == 1
    finally: NearIndex._similar = real
    assert sum(calls) < 3000*2999/2/4

def test_memory_per_row_is_fixed():
    r = np.random.default_rng(0)
    t = pl.Series([" ".join(f"w{x}" for x in r.integers(0, 9999, 150)) for _ in range(6000)])
    ix = NearIndex()
    tracemalloc.start()
    for a in range(0, 6000, 1500): ix.add(None, t[a:a+1500])
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert ix.nbytes <= 404*6000*1.3
    assert peak < ix.nbytes + 70e6, "a slice at a time, and no text kept"

def test_keys_and_arguments():
    ix = NearIndex().add([10, 20], pl.Series(["a b c d e", "f g h i j"])).add([2**63+5], pl.Series(["a b c d e"]))
    assert ix.keys.tolist() == [10, 20, 2**63+5] and ix.clusters().tolist() == [0, 1, 0]
    assert NearIndex().clusters().tolist() == [] and NearIndex().add(None, pl.Series([], dtype=pl.String)).clusters().tolist() == []
    assert NearIndex().match(pl.Series(["a"])).is_empty()
    for bad in (lambda: ix.add([1], pl.Series(["a", "b"])), lambda: ix.best([1, 2]), lambda: NearIndex(unit="line"), lambda: NearIndex(n=0), lambda: NearIndex(2.)):
        with pytest.raises(DataError): bad()
    empty = pl.DataFrame(schema=dict(id=pl.String, prompt=pl.String))
    assert near(empty)[0].is_empty() and clusters(empty).is_empty()

# --- hostile text

@few
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
def test_words_are_those_of_text_key(texts):
    "For plain text and any other: what `text_key` calls the same has the same words"
    w, at = words(pl.Series(texts, dtype=pl.String))
    seq = [w[a:b].tolist() for a, b in zip(at, at[1:])]
    k = key(texts)
    for i, a in enumerate(texts):
        if a.isascii(): assert len(seq[i]) == max(len(k[i].split()), int(k[i] != "")) or not any(c.isalnum() for c in k[i])
        for j in range(i):
            if k[i] == k[j]: assert seq[i] == seq[j]

@few
@given(st.lists(st.text(alphabet=st.characters(max_codepoint=127), max_size=30), min_size=2, max_size=6))
def test_different_keys_are_different_words_in_plain_text(texts):
    w, at = words(pl.Series(texts, dtype=pl.String))
    seq, k = [w[a:b].tolist() for a, b in zip(at, at[1:])], key(texts)
    for i in range(len(texts)):
        for j in range(i):
            if any(c.isalnum() for c in k[i]+k[j]) and k[i] != k[j]: assert seq[i] != seq[j]

def test_disguises_do_not_help():
    plain = "please transfer nine hundred pounds to the account of my landlord before friday noon thank you"
    masks = [plain.upper(), plain.replace("a", "а"), "\u200b".join(plain), "\u202e"+plain, plain.replace(" ", "\u00a0"), plain.replace("l", "ｌ"), plain.replace(" ", ",  "), plain.replace("o", "ο")]
    lab = NearIndex(.8).add(None, pl.Series([plain, *masks])).clusters()
    assert lab.tolist() == [0]*9
    assert fold(pl.Series(["Где моя карта"])).to_list() == ["где моя карта"], "a text in one alphabet is left alone"

def test_scripts_without_spaces_long_lines_and_nothing():
    zh = "我昨天在网上申请了一张新的银行卡但是到今天还没有收到请帮我查一下它现在在哪里谢谢你们的帮助"
    big = "ab "*350_000
    t = pl.Series([zh, zh.replace("昨天", "前天"), zh[::-1], "", None, " \u200b ", "?!", "?!", big, big+"c", "x"*1_000_000])
    lab = NearIndex(.7).add(None, t).clusters().tolist()
    assert lab[:2] == [0, 0] and lab[2:7] == [2, 3, 4, 5, 6] and lab[7] == 6 and lab[10] == 10

def test_numbers_are_the_same_everywhere():
    "Fingerprints are shipped and compared between machines: these must never change"
    g, at = shingles(pl.Series(["Where is my card? It has not arrived.", "我的卡"]), 3)
    assert [f"{x:016x}" for x in g[[0, 5, -1]]] == FROZEN and at.tolist() == [0, 6, 7]

# --- embeddings

def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(emb.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"somaagent\[embed\]"): emb.minilm_folder()

def test_a_model_that_was_tampered_with_is_refused(monkeypatch, tmp_path):
    (tmp_path/"model").mkdir()
    monkeypatch.setattr(emb.importlib.util, "find_spec", lambda name: type("S", (), dict(submodule_search_locations=[str(tmp_path)])))
    with pytest.raises(SomaError, match="missing"): emb.minilm_folder()
    for f in emb._files: (tmp_path/"model"/f).write_bytes(b"not the original")
    with pytest.raises(ModelError, match="not the original"): emb.minilm_folder()

def test_no_vector_is_made_up():
    class Broken(emb.Embedder):
        name, dim = "broken", 4
        def _vectors(self, texts): return np.zeros((len(texts), 4))
    with pytest.raises(ModelError, match="no usable vector"): Broken().embed(["a"])
    for bad in ("", "?!", None, 3):
        with pytest.raises(DataError, match="row 1"): emb.Hashed().embed(["a", bad])

def test_cached_vectors_survive_damage(tmp_path):
    from somaagent.store.cache import Cache
    h = emb.Hashed(Cache(tmp_path)); a = h.embed(["where is my card", "x"])
    for p in tmp_path.rglob("*"):
        if p.is_file(): p.write_bytes(b"\0"*99)
    assert np.array_equal(emb.Hashed(Cache(tmp_path)).embed(["where is my card", "x"]), a)

# --- semantic duplicates

@few
@given(st.integers(2, 40), st.integers(0, 9))
def test_groups_of_vectors_are_those_of_all_pairs(n, seed):
    v = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    lab, near_ = groups(v, .9), v @ v.T >= .9
    want = np.linalg.matrix_power((near_ | np.eye(n, dtype=bool)).astype(float), n) > 0
    assert ((lab[:, None] == lab[None]) == want).all()

def test_semantic_keeps_what_has_no_words():
    df = pl.DataFrame(dict(id=list("abcde"), prompt=["Where is my card?", "where is my card", "", "?!", None], quality=[.1, .9, .5, .5, .5]))
    kept, dropped = semantic(df, embed=emb.Hashed())
    assert dropped.select("id", "kept_id").rows() == [("a", "b")] and kept["copies"].sum() == 5
    for bad in (np.ones((4, 2)), np.ones((5, 2)), np.ones(5)):
        with pytest.raises(DataError): semantic(df, embed=bad)

# --- contamination

def lightly(t, rng, rate):
    "Every `1/rate`-th word replaced, left out, or joined by another"
    w = t.split()
    for i in sorted(rng.choice(len(w), max(1, round(len(w)*rate)), replace=False))[::-1]:
        k = rng.integers(3)
        if k == 0: w[i] = f"thing{rng.integers(99)}"
        elif k == 1: del w[i]
        else: w.insert(i, "really")
    return " ".join(w)

def test_a_leaking_split_is_blocked_and_a_clean_one_is_not():
    pairs = planted(60, 3, 20, 80, 0)
    exam = pl.DataFrame(dict(id=[f"e{i}" for i in range(60)], prompt=[a for a, _ in pairs]))
    other = pl.DataFrame(dict(id=[f"t{i}" for i in range(200)], prompt=[a for a, _ in planted(200, 4, 20, 80, 0)]))
    assert not check(other, exam).raise_if_leaking().blocked
    rng = np.random.default_rng(1)
    leak = pl.DataFrame(dict(id=["x0", "x1", "x2"], prompt=[exam["prompt"][4].upper(), lightly(exam["prompt"][5], rng, .06), "Please solve this: "+exam["prompt"][6]+" Think first."]))
    train = pl.concat([other, leak])
    c = check(train, exam)
    assert c.blocked and c.frame.select("id", "other").rows() == [("x0", "e4"), ("x1", "e5"), ("x2", "e6")]
    assert leaks(train, exam).arg_true().to_list() == [200, 201, 202]
    with pytest.raises(DataError, match=r"3 of 60 rows of test.*x0 repeats test e4.*leaks\(train, test\)"): c.raise_if_leaking()
    assert not check(train, exam, allow=.05).blocked and check(train, exam, allow=.04).blocked
    s = c.summary().row(0, named=True)
    assert s["lo"] < .05 == s["share"] < s["hi"] and (s["exact"], s["overlap"]) == (1, 2)

def test_copies_in_the_examination_all_count():
    exam = pl.DataFrame(dict(prompt=["the quick brown fox jumps over the lazy dog near the old river bank today"]*3 + ["ok then"]*2))
    c = check(pl.DataFrame(dict(prompt=["OK, then!", exam["prompt"][0]])), exam)
    assert c.leaked == {"test": 5}

def test_boilerplate_is_no_leak():
    "A hundred questions that begin alike do not give each other away"
    head = "answer the following question with a single number and do not explain how you found it "
    exam = pl.DataFrame(dict(prompt=[head+a for a, _ in planted(60, 5, 15, 25, 0)]))
    train = pl.DataFrame(dict(prompt=[head+a for a, _ in planted(60, 6, 15, 25, 0)]))
    assert not check(train, exam).blocked

def test_fingerprints_travel_and_hold_no_text(tmp_path):
    t = pl.Series([a for a, _ in planted(30, 8, 5, 40, 0)])
    b = fingerprint("exam", t); b.save(tmp_path/"b.npz")
    c = Benchmark.load(tmp_path/"b.npz")
    train = pl.DataFrame(dict(prompt=t.sample(fraction=1, shuffle=True, seed=1)))
    assert check(train, benchmarks=[c]).frame.equals(check(train, benchmarks=[b]).frame) and check(train, benchmarks=[c]).leaked == {"exam": 30}
    with np.load(tmp_path/"b.npz") as z: assert not any(w.encode() in z[k].tobytes() for k in z.files for w in t[0].split())

@pytest.mark.parametrize("name,body,match", [("b.json", "[]", "unknown ending"), ("b.jsonl", "{oops", "cannot be read"), ("b.csv", "a,b\n1,2\n", "olumns are: a, b"), ("b.npz", "PK", "cannot be read"), ("b.parquet", "PAR", "cannot be read"), ("c.jsonl", None, "is not there")])
def test_broken_benchmarks_say_so(tmp_path, name, body, match):
    if body is not None: (tmp_path/name).write_text(body)
    with pytest.raises(DataError, match=match): load_benchmarks({"exam": tmp_path/name})

def test_gsm8k_questions_in_a_log():
    "Twenty test questions planted as they are and 300 lightly edited (one word in twenty): all and at least 95 % found; of the real training split only rows that share most of a question"
    d = shared/"gsm8k"
    if not d.exists(): pytest.skip("../shared/data/gsm8k is not here")
    read = lambda n: pl.Series([json.loads(l)["question"] for l in (d/f"{n}.jsonl").read_text().splitlines()])
    train, test = read("train"), read("test")
    gsm = load_benchmarks({"gsm8k": {"path": d/"test.jsonl", "columns": ["question"]}})
    ship = load_benchmarks(["gsm8k"])[0]
    assert ship.ids == gsm[0].ids and np.array_equal(ship.grams, gsm[0].grams) and np.array_equal(ship.whole, gsm[0].whole), "the shipped fingerprints are of this file"
    rng = np.random.default_rng(0)
    pick = rng.choice(len(test), 320, replace=False)
    log = pl.concat([train, test.gather(pick[:20]), pl.Series([lightly(test[int(i)], rng, .05) for i in pick[20:]])])
    c = check(pl.DataFrame(dict(id=[str(i) for i in range(len(log))], prompt=log)), benchmarks=gsm)
    got = {r["row"]: int(r["other"]) for r in c.frame.iter_rows(named=True)}
    hit = [got.get(len(train)+k) == i for k, i in enumerate(pick)]
    assert all(hit[:20]) and np.mean(hit[20:]) >= .95
    assert sorted(train[r][:30] for r in got if r < len(train)) == ["A train travels 270 miles in 3", "A train travels 360 miles in 3", "Bella bought stamps at the pos"]
