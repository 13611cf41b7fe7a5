"""Vector stores that agree, chunks that can be checked, an index that survives: against real stores, real processes and an exact oracle."""
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from fakes.pinecone import FakePinecone
from somaagent.core.errors import DataError, StoreError
from somaagent.rag.chunk import chunk, token_starts
from somaagent.rag.filters import Columns, matches, parse
from somaagent.rag.qdrant import Qdrant, _Remote, spell, unspell
from somaagent.rag.search import Index
from somaagent.rag.vectors import Exact, vectors

root = Path(__file__).resolve().parents[1]
some = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
few = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
texts = st.text(st.one_of(st.characters(), st.sampled_from("# \n\r\t|`~=-.!?。abc\0")), max_size=400)

# ---- chunks

def pieces(t): return [t[i:i+3] for i in range(0, len(t), 3)]
@some
@given(texts, st.integers(1, 40), st.integers(0, 39), st.sampled_from(["auto", "markdown", "text", "code"]), st.booleans())
@example("```\nnever closed\n\n# x", 4, 2, "markdown", False)
@example("a" * 300, 3, 1, "text", False)
@example("| a |\n| - |\n" * 30, 9, 3, "markdown", True)
def test_chunks_of_any_text(t, size, overlap, kind, thirds):
    tok = (lambda s: [(i, i+3) for i in range(0, len(s), 3)]) if thirds else None
    cs = chunk(t, "d", size, min(overlap, size-1), tok, kind)
    for c in cs:
        assert t[c.start:c.end] == c.text and c.text.strip() == c.text != "" and c.tokens <= size and len(c.text) <= 16*size
    covered = np.zeros(len(t)+1, bool)
    for c in cs: covered[c.start:c.end] = True
    assert all(covered[i] or ch.isspace() for i, ch in enumerate(t))
    assert all(a.start < b.start and a.end < b.end for a, b in zip(cs, cs[1:])) and len({c.id for c in cs}) == len(cs)
    starts = token_starts(t, tok)
    for a, b in zip(cs, cs[1:]): assert b.start >= a.end or sum(b.start <= s < a.end for s in starts) <= min(overlap, size-1)
    assert cs == chunk(t, "d", size, min(overlap, size-1), tok, kind)

def test_structure_is_kept_where_it_fits():
    code, table = "```py\n# no heading\n\nx = 1\n```", "| a | b |\n|---|---|\n| 1 | 2 |"
    md = f"# One\n\nText of one.\n\n{code}\n\nTwo\n---\n\n{table}\n\nAfter.\n"
    cs = chunk(md, size=40, overlap=5)
    assert any(code in c.text for c in cs) and any(table in c.text for c in cs)
    assert [c.heading for c in cs] == [("One",), ("One", "Two")] and "# no heading" not in str(cs[0].heading)
    assert [c.heading for c in chunk("# A\n## B\nx\n# C\ny")] == [("A", "B"), ("C",)]
    assert chunk("# A\r\n\r\nx y\r\n")[0].text == "# A\r\n\r\nx y"

def test_a_tokenizers_own_counts():
    from tokenizers import Tokenizer
    from somaagent.llm.embed import minilm_folder
    tok = Tokenizer.from_file(str(minilm_folder(("tokenizer.json",))/"tokenizer.json"))
    tok.no_truncation(); tok.no_padding()
    t = "Réfunds aren’t instantaneous: ünbelievably, they take 14 days. " * 60
    cs = chunk(t, size=50, overlap=10, tokenizer=tok)
    assert len(cs) > 10
    for c in cs: assert len(tok.encode(c.text, add_special_tokens=False).ids) == c.tokens <= 50

def test_a_huge_text_takes_seconds_not_minutes():
    t0 = time.process_time()
    cs = chunk("word " * 200_000 + "x" * 300_000 + "\n\n# h\n\n" + "A sentence. " * 50_000, size=200)
    assert len(cs) > 1000 and time.process_time()-t0 < 8

# ---- filters

names = st.sampled_from(["app", "größe", "a.b", "x'; --", "n"])
values = st.one_of(st.booleans(), st.integers(-3, 3), st.sampled_from([.5, 1., -2., "1", "", "shop", "ü/..'\"", "true", "True"]))
metas = st.dictionaries(names, values, max_size=4)
conds = st.one_of(values, st.fixed_dictionaries({}, optional={"$ne": values, "$in": st.lists(values, max_size=3), "$nin": st.lists(values, max_size=3), "$gte": st.integers(-3, 3), "$lt": st.sampled_from([0, .5, 2])}).filter(bool))
wheres = st.recursive(st.dictionaries(names, conds, max_size=2), lambda w: st.one_of(st.fixed_dictionaries({"$and": st.lists(w, min_size=1, max_size=3)}), st.fixed_dictionaries({"$or": st.lists(w, min_size=1, max_size=3)})), max_leaves=4)

@some
@given(wheres, st.lists(metas, max_size=8))
def test_columns_mean_what_matches_means(w, ms): assert Columns(ms).mask(parse(w)).tolist() == [matches(parse(w), m) for m in ms]

@some
@given(st.text(max_size=12))
def test_spelled_names_come_back(f): assert unspell(spell(f)) == f and spell(f).isascii()

# ---- stores: one suite, an exact oracle

@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    p = subprocess.Popen([Path(sys.executable).with_name("chroma"), "run", "--path", tmp_path_factory.mktemp("chroma"), "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "ANONYMIZED_TELEMETRY": "False"})
    for _ in range(600):
        try: socket.create_connection(("127.0.0.1", port), .2).close(); break
        except OSError: time.sleep(.05)
    yield f"chroma+http://127.0.0.1:{port}"
    p.terminate(); p.wait(20)

kinds = ["memory", "file", "chroma", "chroma-server", "qdrant", "qdrant-client", "pinecone"]
made = iter(range(10**6))
@pytest.fixture
def opener(request, tmp_path, monkeypatch):
    "A function that opens a collection of the store by name, and opens it again"
    kind = request.param
    if kind == "pinecone":
        monkeypatch.setenv("PINECONE_API_KEY", "pc-test")
        servers = {}
        def open_(name="default", dim=None, metric="cosine"):
            key = dim or 4, metric
            if key not in servers: servers[key] = FakePinecone(dim or 4, dict(cosine="cosine", dot="dotproduct", l2="euclidean")[metric]).__enter__()
            return vectors(servers[key].url, name, dim, metric)
        yield open_
        for s in servers.values(): s.__exit__()
        return
    if kind == "qdrant-client":
        from qdrant_client import QdrantClient
        from somaagent.rag.vectors import safe_name
        client = QdrantClient(":memory:")
        monkeypatch.setattr(client, "close", lambda **k: None)
        yield lambda name="default", dim=None, metric="cosine": Qdrant(_Remote(client, safe_name(name)), name, dim, metric)
        return
    url = dict(memory="memory://", file=f"memory://{tmp_path}", chroma=f"chroma://{tmp_path}", qdrant=f"qdrant://{tmp_path}").get(kind) or request.getfixturevalue("chroma_server")
    prefix = f"t{next(made)} " if kind == "chroma-server" else ""
    opened = []
    def open_(name="default", dim=None, metric="cosine"): opened.append(vectors(url, prefix+name, dim, metric)); return opened[-1]
    yield open_
    for v in opened: v.close()
    if kind == "chroma": opened[0].place.close() if opened else None
every = pytest.mark.parametrize("opener", kinds, indirect=True)
kept = pytest.mark.parametrize("opener", [k for k in kinds if k != "memory"], indirect=True)

ids_ = st.sampled_from(["a", "b", "ü/../x", "'; DROP TABLE x; --", "id 5%", "日本", "..\\c", "\x7f"])
rows = st.lists(st.tuples(ids_, st.integers(0, 30), st.one_of(st.none(), st.sampled_from(["", "text", "ein Text\nmit 'Zeichen' 日本"])), metas), max_size=5, unique_by=lambda r: r[0])
ops = st.lists(st.one_of(st.tuples(st.just("up"), rows), st.tuples(st.just("del"), st.lists(ids_, max_size=3)), st.tuples(st.just("where"), wheres)), min_size=1, max_size=5)
bank = np.random.default_rng(7).normal(size=(31, 4)).astype(np.float32)

def same(got, want, k):
    "The same hits to 1e-5; among equal scores at the cut any will do"
    assert len(got) == len(want)
    for g, w in zip(got, want): assert abs(g.score-w.score) < 1e-5*max(1, abs(w.score))
    cut = want[-1].score+2e-5 if len(want) == k else -np.inf
    full = lambda hs: {h.id: (h.text, h.meta, {f: type(v) for f, v in h.meta.items() if not isinstance(v, float)}) for h in hs if h.score > cut}
    a, b = full(got), full(want)
    near = {h.id for h in [*got, *want] if abs(h.score-cut) < 1e-4}
    assert {i: (t, m) for i, (t, m, _) in a.items() if i not in near} == {i: (t, m) for i, (t, m, _) in b.items() if i not in near}

@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
@every
@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_every_store_agrees_with_the_exact_one(opener, metric):
    v = opener("run", 4, metric)
    @settings(few, max_examples=8 if metric == "cosine" else 2)
    @given(ops, st.lists(wheres, min_size=1, max_size=3), st.integers(0, 30), st.integers(1, 7))
    @example([("up", [("a", 1, "t", {"n": True}), ("b", 2, None, {"n": 1}), ("日本", 3, "", {"n": "1"})]), ("up", [("a", 4, None, {"app": "shop"})])], [{"n": True}, {"n": {"$ne": 1}}, {"n": {"$in": [1, "1"]}}, {"app": {"$nin": []}}], 5, 2)
    def check(todo, filters, q, k):
        exact = Exact("run", 4, metric)
        v.delete(where={}); assert len(v) == 0
        for what, arg in todo:
            if what == "up":
                for x in (v, exact): x.upsert([r[0] for r in arg], bank[[r[1] for r in arg]], [r[2] for r in arg], [r[3] for r in arg])
            elif what == "del": assert v.delete(arg) == exact.delete(arg)
            else: assert v.delete(where=arg) == exact.delete(where=arg)
            assert len(v) == len(exact)
        for w in [None, *filters]: same(v.search(bank[q], k, w), exact.search(bank[q], k, w), k)
        back = {i: (x, t, m) for ids, xs, ts, ms in v.read() for i, x, t, m in zip(ids, xs, ts, ms)}
        want = {i: (x, t, m) for ids, xs, ts, ms in exact.read() for i, x, t, m in zip(ids, xs, ts, ms)}
        assert back.keys() == want.keys() and all(np.allclose(back[i][0], want[i][0], atol=1e-6) and back[i][1:] == want[i][1:] for i in want)
    check()

@every
def test_what_no_store_could_answer_is_refused(opener):
    v = opener("x", 4)
    v.upsert(["a"], bank[:1])
    for bad in ([[1, 2, 3]], [[0, 0, 0, 0]], [[1, 2, 3, np.nan]], [[1, 2, 3, np.inf]], [1, 2, 3, 4], [["x"]*4]):
        with pytest.raises(DataError): v.upsert(["b"], bad)
        with pytest.raises(DataError): v.search(bad[0] if np.ndim(bad) == 2 else bad[:2])
    for ids in (["b", "b"], [""], ["\ud800"], ["a\0b"], ["x"*513], "ab", [None]):
        with pytest.raises(DataError): v.upsert(ids, bank[:len(ids)])
    for meta in ({"$x": 1}, {"a": [1]}, {"a": float("nan")}, {"a": 2**60}, {"": 1}, {"a": "\ud800"}, [1]):
        with pytest.raises(DataError): v.upsert(["b"], bank[:1], meta=[meta])
    with pytest.raises(DataError): v.upsert(["b"], bank[:1], ["\ud800"])
    with pytest.raises(DataError): v.upsert(["b", "c"], bank[:1])
    for k in (0, -1, 1.5, True):
        with pytest.raises(DataError): v.search(bank[0], k)
    with pytest.raises(DataError): v.delete()
    assert len(v) == 1 and v.stats() == dict(store=v.kind, name=v.name, count=1, dim=4, metric="cosine")
    assert v.delete([]) == 0 and v.upsert([], []) == 0 and v.search(bank[0], 5, {"a": {"$in": []}}) == []
    big = v.upsert(["big"], [[1e30, 0, 0, 1e-30]])
    assert big == 1 and abs(v.search([1, 0, 0, 0], 1)[0].score-1) < 1e-5

@kept
def test_names_and_reopening(opener):
    odd = ["Bücher/../b", "'; DROP TABLE x", "x"*300, "日本"]
    for j, name in enumerate(odd):
        v = opener(name); v.upsert([f"{j}"], bank[j:j+1], [name]); v.close()
    for j, name in enumerate(odd):
        v = opener(name)
        assert [(h.id, h.text) for h in v.search(bank[j])] == [(f"{j}", name)] and v.dim == 4
        with pytest.raises((StoreError, DataError)): v.upsert(["w"], [[1, 2, 3]])
        v.close()
        if v.kind != "pinecone" and j == 0:
            for kw in (dict(dim=7), dict(metric="l2")):
                with pytest.raises(StoreError): opener(name, **kw)

@pytest.mark.parametrize("opener", ["chroma", "chroma-server", "qdrant"], indirect=True)
def test_approximate_stores_find_nearly_everything(opener):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 32))
    x = centres[rng.integers(0, 40, 2500)]+.4*rng.normal(size=(2500, 32))
    ids, meta = [f"{i}" for i in range(2500)], [dict(ten=i % 10) for i in range(2500)]
    v, exact = opener("many"), Exact()
    for s in (v, exact): s.upsert(ids, x, meta=meta)
    for k, w in ((10, None), (100, None), (10, {"ten": 3}), (10, {"ten": {"$gte": 8}})):
        hit = [len({h.id for h in v.search(q, k, w)} & {h.id for h in exact.search(q, k, w)})/k for q in x[::250]+.1]
        assert np.mean(hit) >= .97, (k, w, hit)
    assert v.delete(where={"ten": 3}) == 250 and len(v) == 2250

other = """
import sys, numpy as np
from somaagent.rag.vectors import vectors
v = vectors(sys.argv[1], "shared")
v.upsert([f"{sys.argv[2]}{i}" for i in range(300)], np.random.default_rng(int(sys.argv[3])).normal(size=(300, 4)))
print([h.id for h in v.search(np.eye(4)[0], 3)], len(v))
"""
@pytest.mark.parametrize("kind", ["memory", "chroma"])
def test_two_processes_see_each_other(kind, tmp_path):
    url = f"{kind}://{tmp_path}"
    v = vectors(url, "shared", 4)
    v.upsert(["mine"], [[-1, 0, 0, 0]]); assert v.search([-1, 0, 0, 0], 1)[0].id == "mine"
    ps = [subprocess.Popen([sys.executable, "-c", other, url, c, str(s)], stdout=subprocess.PIPE, text=True) for c, s in (("a", 1), ("b", 2))]
    v.upsert(["also"], [[0, -1, 0, 0]])
    assert [p.communicate(timeout=60) and p.returncode for p in ps] == [0, 0]
    x = {f"{c}{i}": r for c, s in (("a", 1), ("b", 2)) for i, r in enumerate(np.random.default_rng(s).normal(size=(300, 4)))}
    assert len(v) == 602
    for i in ("a0", "a299", "b150"): assert v.search(x[i], 1)[0].id == i
    v.close()
    if kind == "chroma": v.place.close()
    again = vectors(url, "shared")
    assert len(again) == 602 and again.search(x["b299"], 1)[0].id == "b299" and again.search([0, -1, 0, 0], 1)[0].id == "also"

def test_one_process_at_a_time_opens_a_qdrant_path(tmp_path):
    code = "from somaagent.rag.vectors import vectors; import sys\nfrom somaagent.rag.qdrant import _Edge\n_Edge.ready.__defaults__ = (.2,)\ntry: vectors(sys.argv[1], 'shared').search([1,0,0,0])\nexcept Exception as e: print(type(e).__name__, e)\nelse: print('open')"
    run = lambda: subprocess.run([sys.executable, "-c", code, f"qdrant://{tmp_path}"], capture_output=True, text=True).stdout
    with vectors(f"qdrant://{tmp_path}", "shared", 4) as v:
        v.upsert(["a"], bank[:1]); assert run().startswith("StoreError another process has this collection open")
    assert run() == "open\n"

def test_nothing_leaves_the_machine(tmp_path):
    code = """
import socket, sys
real = socket.socket.connect
def connect(self, a):
    if self.family != socket.AF_UNIX and a[0] not in ("127.0.0.1", "::1"): print("OUT", a)
    return real(self, a)
socket.socket.connect = connect
look = socket.getaddrinfo
def names(h, *a, **k):
    if h not in ("127.0.0.1", "localhost", None): print("LOOKS UP", h)
    return look(h, *a, **k)
socket.getaddrinfo = names
from somaagent.rag.vectors import vectors
for kind in ("chroma", "qdrant"):
    v = vectors(f"{kind}://{sys.argv[1]}/{kind}"); v.upsert(["a"], [[1, 0]]); v.search([1, 0]); v.delete(["a"]); v.close()
print("posthog" in sys.modules)
"""
    r = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert r.stdout == "False\n", r.stdout+r.stderr[-2000:]

def test_unreachable_servers_are_said():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    for url in (f"chroma+http://127.0.0.1:{port}", f"qdrant+http://127.0.0.1:{port}"):
        with pytest.raises(StoreError): vectors(url, "x").stats()
    with pytest.raises(DataError): vectors("redis://x")
