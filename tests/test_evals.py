"""Evaluation: suites, judges and their passports, metrics and the cache, by golden values, by simulation with a stated error, on published data, and with what goes wrong."""
import json, math, os, re, signal, subprocess, sys
from collections import namedtuple
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given, settings as hyp, strategies as st
from scipy import stats
from scipy.stats import binomtest

from somaagent.core.errors import EvalError, MissingExtraError
from somaagent.evals.cached import Kept, run_suite
from somaagent.evals.compare import compare
from somaagent.evals.metrics import pass_at_k, pass_hat_k, perplexity, repeats, squad_words, token_f1, win_rate
from somaagent.evals.pairwise import Judge, ask, by_score, length_judge, model_judge, overlap_judge, read_verdict, similarity_judge
from somaagent.evals.passport import cohen_kappa, krippendorff_alpha, length, load_pairs, load_replies, logit_firth, passport, position, recorded
from somaagent.evals.ppi import ppi_mean, rehearse
from somaagent.evals.suites import load_suite, loads_suite, suites, suites_folder
from somaagent.store.cache import Cache

shared = Path(os.environ.get("SOMA_SHARED_DATA") or Path(__file__).resolve().parents[2]/"shared"/"data")
Reply = namedtuple("Reply", "text prompt_tokens completion_tokens finish")

def some_pairs(n=30, seed=0):
    g = np.random.default_rng(seed)
    return pl.DataFrame([dict(id=f"{i:03d}", source=f"s{i//3}", prompt=f"Question {i}?", a="x"*int(a), b="y"*int(b), human=str(h)) for i, (a, b, h) in enumerate(zip(g.integers(5, 90, n), g.integers(5, 90, n), g.choice(["a", "b", "tie"], n)))])

# ---- asking a judge --------------------------------------------------------------------------------------------------
@given(st.text(max_size=60))
@hyp(max_examples=300, deadline=None)
def test_prose_is_no_verdict(text):
    v = read_verdict(text)
    assert v in ("a", "b", "tie", None)
    if v and "[[" not in text: assert re.sub(r"[^a-z]", "", re.sub(r"(?i)answer|verdict|winner", "", text).lower()) in ("a", "b", "tie")

@pytest.mark.parametrize("reply", ["A or B", "a better one", "Answer A is better than B", "not a", "[[A]] [[B]]", "neither", "1", "ab", "a\nb", b"a", 0, ["a"]])
def test_what_is_not_a_verdict(reply): assert read_verdict(reply) is None

def test_neither_silence_nor_nonsense_is_a_tie():
    p = some_pairs(40)
    def judge(q, a, b):
        k = int(q.split()[1][:-1])
        if k % 4 == 1: raise OSError("no route to host")
        return ["tie", "", "hmm", "a"][k % 4]
    said = ask(judge, p, give_up=99)
    f = said.frame.with_columns(k=pl.int_range(pl.len()) % 4)
    assert f.filter(k=0)["verdict"].to_list() == ["tie"]*10 and set(f.filter(k=0)["status"]) == {"ok"}
    assert f.filter(k=1)["verdict"].null_count() == 10 and set(f.filter(k=1)["status"]) == {"down"} and set(f.filter(k=2)["status"]) == {"nonsense"}
    assert f.filter(k=3)["verdict"].to_list() == ["tie"]*10 and set(f.filter(k=3)["status"]) == {"split"}
    assert f.filter(pl.col("verdict").is_null())["points"].null_count() == 20 and said.calls == 80+40 and "no route" in said.trouble

def test_one_order_answered_is_not_enough():
    p, n = some_pairs(4), iter(range(100))
    def judge(q, a, b):
        if next(n) >= 4: raise TimeoutError
        return "a"
    assert set(ask(judge, p, retries=0, give_up=99).frame["status"]) == {"down"}

def test_a_tie_that_one_order_gave_is_split():
    said = ask(lambda q, a, b: "tie" if "x" in a else "a", some_pairs(3))
    assert said.counts == {"split": 3} and said.frame["verdict"].to_list() == ["tie"]*3

def test_a_judge_that_is_down_is_left_alone():
    p, seen = some_pairs(50), []
    def judge(q, a, b):
        seen.append(q)
        if len(seen) > 10: raise ConnectionError("refused")
        return "a"
    said = ask(judge, p, swap=False, retries=5, give_up=3)
    assert said.counts == {"down": 40, "ok": 10} and len(seen) == 13
    for bad in (lambda q, a, b: "perhaps", lambda q, a, b: 1/0):
        with pytest.raises(EvalError, match="no verdict at all"): ask(bad, p)
    with pytest.raises(EvalError, match="wrong number"): ask(Judge(None, "short", "h", lambda ts: ["a"]), p.head(3))

def test_pairs_are_checked():
    for bad, what in ((dict(prompt=["p"], a=["x"]), "lack a column"), (dict(prompt=["p"], a=["x"], b=[None]), "empty cells"), (dict(id=["1", "1"], prompt=["p", "q"], a=["x", "x"], b=["y", "y"]), "share an id"), (dict(prompt=[], a=[], b=[]), "no pairs")):
        with pytest.raises(EvalError, match=what): ask(length_judge(), pl.DataFrame(bad, schema_overrides={"b": pl.String} if "b" in bad else None))

def test_only_verdicts_are_kept(tmp_path):
    p, c, mood = some_pairs(12), Cache(tmp_path), dict(bad=True)
    def fn(q, a, b):
        if mood["bad"] and int(q.split()[1][:-1]) % 2: raise TimeoutError
        return "a" if len(a) > len(b) else "b" if len(b) > len(a) else "tie"
    j = Judge(fn, "moody", "h1")
    first = ask(j, p, cache=c, give_up=99); mood["bad"] = False
    then = ask(j, p, cache=c)
    assert first.counts == {"down": 6, "ok": 6} and then.counts == {"ok": 12} and (then.cached, then.calls) == (12, 12)
    assert ask(Judge(fn, "moody", "h2"), p, cache=c).cached == 0
    for f in tmp_path.rglob("*"):
        if f.is_file(): f.write_bytes(b"broken"+f.read_bytes()[6:])
    assert ask(j, p, cache=c).cached == 0

def test_a_model_as_judge():
    class Model:
        hash, seen = "sha256:m", []
        def generate(self, prompts, **kw): self.seen += prompts; return [Reply("[[A]]" if "good" in p.split("Answer B")[0] else "B", 1, 1, "stop") for p in prompts]
    m = Model(); p = pl.DataFrame([dict(prompt="q", a="good", b="bad"), dict(prompt="r", a="bad", b="good")])
    said = ask(model_judge(m), p)
    assert said.frame["verdict"].to_list() == ["a", "b"] and len(m.seen) == 4 and said.counts == {"ok": 2}
    with pytest.raises(EvalError, match="lacks a place"): model_judge(m, "{prompt} {a}")
    assert len({model_judge(m).hash, model_judge(m, temperature=.5).hash, model_judge(m, "{prompt}{a}{b}").hash}) == 3

# ---- metrics ---------------------------------------------------------------------------------------------------------
def test_squad_golden():
    "Pairs worked out by the published script's definition"
    assert squad_words("The cat's  hat, a hat!") == ["cats", "hat", "hat"]
    for a, r, f in [("the quick brown fox", "quick fox", .8), ("fox", "fox fox", 2/3), ("a an the", "", 1.), ("x", "", 0.), ("Denver Broncos", "The Denver Broncos.", 1.)]: assert token_f1(a, r) == pytest.approx(f)

@given(st.lists(st.sampled_from("uvwxyz"), max_size=6), st.lists(st.sampled_from("uvwxyz"), max_size=6))
@hyp(max_examples=100, deadline=None)
def test_f1_is_symmetric_and_bounded(a, b):
    x, y = token_f1(" ".join(a), " ".join(b)), token_f1(" ".join(b), " ".join(a))
    assert x == pytest.approx(y) and 0 <= x <= 1 and (x == 1) == (sorted(a) == sorted(b))

@given(st.integers(1, 9), st.data())
@hyp(max_examples=60, deadline=None)
def test_pass_curves_are_the_averages_over_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([1]*c+[0]*(n-c), k))
    assert float(pass_at_k(n, c, k)) == pytest.approx(np.mean([max(s) for s in subsets])) and float(pass_hat_k(n, c, k)) == pytest.approx(np.mean([min(s) for s in subsets]))

def test_pass_k_is_unbiased_where_the_plug_in_is_not():
    g = np.random.default_rng(0); c = g.binomial(8, .7, 40_000)
    assert pass_hat_k(8, c, 4).mean() == pytest.approx(.7**4, abs=.004) and ((c/8)**4).mean() > .7**4+.03
    assert pass_at_k(8, c, 4).mean() == pytest.approx(1-.3**4, abs=.002)
    for bad in ((4, 5, 1), (4, 2, 5), (4, 2, 0)):
        with pytest.raises(EvalError): pass_at_k(*bad)
    with pytest.raises(EvalError, match="right"): repeats(["a", "a"], [1, .5])

def test_repeats_cover_over_prompts():
    "300 worlds of 40 prompts; the interval is over prompts, however often each was asked"
    g, truth, hits = np.random.default_rng(1), 2*3/(5*6), 0   # E[p²] of Beta(2,3)
    for _ in range(300):
        p = g.beta(2, 3, 40); item = np.repeat(np.arange(40), 6)
        r = repeats(item, g.random(240) < p[item], ks=[2]).row(1, named=True); hits += r["lo"] <= truth <= r["hi"]
    assert binomtest(hits, 300, .95).pvalue > 1e-4

def test_perplexity_edges():
    assert perplexity([1., 1.], [3, 5]).value == pytest.approx(math.e) and math.isnan(perplexity([1., 2.], [3, 5], ["s", "s"]).lo)
    d, b = (perplexity(*np.random.default_rng(3).uniform(.5, 2, (1, 200)), np.random.default_rng(4).integers(1, 50, 200), np.arange(200)//2, method=m) for m in ("delta", "bootstrap"))
    assert d.value == b.value and (d.lo, d.hi) == pytest.approx((b.lo, b.hi), rel=.02)
    for bad in (([], []), ([math.nan], [1]), ([1.], [0]), ([1., 2.], [1])):
        with pytest.raises(EvalError): perplexity(*bad)

def test_win_rate_edges():
    w = win_rate([1, 1, 1, None])
    assert (w.figure.value, w.without, w.p) == (1., 1, .25) and w.figure.hi == 1
    with pytest.raises(EvalError, match="no pair"): win_rate([None, None])
    with pytest.raises(EvalError, match="points"): win_rate([.7])
    assert math.isnan(win_rate([1, 0, 1, 0], ["s", "s", "t", "t"]).p)

# ---- prediction-powered inference ------------------------------------------------------------------------------------
def test_ppi_by_the_formulas():
    g = np.random.default_rng(0); y = g.choice([0, .5, 1], 150); f = np.where(g.random(150) < .7, y, g.choice([0, .5, 1], 150)); r = g.choice([0, .5, 1], 900)
    for lam in (0., .4, 1.):
        c = ppi_mean(y, f, r, lam=lam)
        se = math.sqrt(lam**2*r.var(ddof=1)/900+(y-lam*f).var(ddof=1)/150)
        assert c.figure.value == pytest.approx(lam*r.mean()+(y-lam*f).mean()) and (c.figure.hi-c.figure.lo)/2 == pytest.approx(stats.t.isf(.025, 149)*se)
    best = ppi_mean(y, f, r)
    assert best.lam == pytest.approx(np.cov(y, f)[0, 1]/150/(r.var(ddof=1)/900+f.var(ddof=1)/150)) and all(ppi_mean(y, f, r, lam=k).width >= best.width-1e-9 for k in np.linspace(0, 1, 11))

def test_ppi_covers_in_clusters():
    "400 worlds: 40 labelled and 200 other sources of 3 pairs, the judge's errors shared in a source"
    g, hits, naive = np.random.default_rng(7), 0, 0
    for _ in range(400):
        src = np.repeat(np.arange(240), 3); p = g.beta(4, 3, 240)[src]
        y = (g.random(720) < p).astype(float); off = (g.random(240) < .3)[src]; f = np.where(off, 1., y); k = src < 40
        c = ppi_mean(y[k], f[k], f[~k], src[k].tolist(), src[~k].tolist()); hits += c.figure.lo <= 4/7 <= c.figure.hi; naive += c.naive.lo <= 4/7 <= c.naive.hi
    assert binomtest(hits, 400, .95).pvalue > 1e-4 and naive < 40

def test_ppi_refuses():
    for bad in (([1, 0], [1], [1, 0]), ([1], [1], [1, 0]), ([1, 0], [1, math.nan], [1, 0])):
        with pytest.raises(EvalError): ppi_mean(*bad)
    with pytest.raises(EvalError, match="keeps some"): rehearse([1, 0]*20, [1, 0]*20, labelled=39)

# ---- passports -------------------------------------------------------------------------------------------------------
def test_kappa_against_statsmodels():
    sm = pytest.importorskip("statsmodels.stats.inter_rater")
    g = np.random.default_rng(0); x = g.choice(list("abt"), 300); y = np.where(g.random(300) < .6, x, g.choice(list("abt"), 300))
    names = dict(a="a", b="b", t="tie"); x, y = [names[v] for v in x], [names[v] for v in y]
    k = cohen_kappa(x, y); ref = sm.cohens_kappa(sm.to_table(np.array([["a", "b", "tie"].index(v) for v in x+y]).reshape(2, -1).T, 3)[0])
    assert k.value == pytest.approx(ref.kappa) and (k.lo, k.hi) == pytest.approx((ref.kappa_low, ref.kappa_upp), abs=.006)
    assert krippendorff_alpha(list(zip(x, y))).value == pytest.approx(k.value, abs=.01)
    assert krippendorff_alpha([["a", "a", None], ["b", None, None], ["b", "b", "b"]]).n == 2
    with pytest.raises(EvalError, match="unknown labels"): cohen_kappa(["a"], ["c"])

def test_firth_against_logit():
    sm = pytest.importorskip("statsmodels.api")
    g = np.random.default_rng(1); X = np.c_[np.ones(4000), g.normal(size=(4000, 2))]; y = g.random(4000) < 1/(1+np.exp(-X@[.2, .8, -.5]))
    b, se = logit_firth(X, y); ref = sm.Logit(y.astype(float), X).fit(disp=0, cov_type="HC0")
    assert b == pytest.approx(ref.params, abs=.003) and se == pytest.approx(ref.bse, rel=.02)
    b, se = logit_firth(np.c_[np.ones(8), [-4, -3, -2, -1, 1, 2, 3, 4]], [0]*4+[1]*4)
    assert np.isfinite(b).all() and 0 < b[1] < 10

def test_false_alarms_are_as_rare_as_promised():
    "200 judges without a bias: each figure's interval leaves zero out in about 5 % of them"
    alarms = np.zeros(2)
    for k in range(200):
        g, p = np.random.default_rng(k), some_pairs(90, 1000+k)
        said = ask(lambda q, a, b: g.choice(["a", "b", "tie"]), p)
        first = position(said)[1]; longer = next(f for f in length(said) if f.name == "longer, beyond people")
        alarms += [not f.lo <= 0 <= f.hi for f in (first, longer)]
    assert all(binomtest(int(a), 200, .05).pvalue > 1e-3 for a in alarms), alarms

def test_a_bias_of_place_is_found_whatever_its_direction():
    p = some_pairs(150)
    for reply, sign in (("a", 1), ("b", -1)):
        g = np.random.default_rng(0)
        f = position(ask(lambda q, a, b: reply if g.random() < .6 else g.choice(["a", "b"]), p))
        assert f[1].value*sign > .3 and f[1].lo*f[1].hi > 0 and f[0].value > .3

def test_passport_edges():
    p = some_pairs(30)
    with pytest.raises(EvalError, match="no human verdicts"): passport(ask(length_judge(), p.drop("human")))
    with pytest.raises(EvalError, match="unknown human"): passport(ask(length_judge(), p.with_columns(human=pl.lit("x"))))
    with pytest.raises(EvalError, match="both the judge"): passport(ask(length_judge(), p.with_columns(human=pl.lit(None, pl.String))))
    tie = passport(ask(by_score(lambda q, x: 0, "even"), p))
    assert tie["ties"].value == 1 and "odds per doubling" not in [f.name for f in tie.figures] and tie._repr_markdown_()
    half = passport(ask(length_judge(), some_pairs(120).with_columns(human=pl.when(pl.int_range(pl.len()) < 60).then("human"))))
    assert half["win rate, corrected"].n == 120 and "PPI++" in half["win rate, corrected"].method
    assert passport(ask(length_judge(), p), ask(length_judge(), p))["says the same again"].value == 1

@pytest.mark.skipif(not (shared/"pandalm").exists(), reason="../shared/data/pandalm is not here")
def test_passports_on_pandalm():
    p = load_pairs(shared/"pandalm")
    assert (len(p), p["source"].n_unique(), p["raters"].list.len().unique().to_list()) == (999, 170, [3])
    people = krippendorff_alpha(p["raters"].to_list(), p["source"].to_list())
    s = passport(ask(length_judge(), p), data="pandalm", draws=60)
    assert people.value > .8 and s["people, Krippendorff's α"].value == people.value
    assert .55 < s["agreement"].value < .67 and s["longer, beyond people"].lo > .2 and s["order decides"].value == 0 and "separated" in s["odds per doubling"].method
    assert s.rehearsal.covered["corrected"] > .85 and s.rehearsal.width < 1
    r = passport(recorded(p, load_replies(shared/"pandalm/pandalm-7b-testset-v1.json"), "pandalm-7b"), draws=30)
    assert r["Cohen's κ"].lo > s["Cohen's κ"].value and "one order" in r.notes[0]

@pytest.mark.skipif(not (shared/"llmbar").exists(), reason="../shared/data/llmbar is not here")
def test_passports_on_llmbar():
    p = load_pairs(shared/"llmbar")
    assert len(p) == 419 and set(p["human"]) == {"a", "b"} and p["part"].n_unique() == 5
    hard = passport(ask(length_judge(), p.filter(pl.col("part") != "Natural")))
    assert hard["agreement, both decided"].hi < .5, "LLMBar's adversarial answers are made to be the longer, worse ones"

def test_pairs_that_cannot_be_read(tmp_path):
    for name, text in (("a.jsonl", "{"), ("b.jsonl", '{"prompt": "x"}'), ("c.jsonl", ""), ("d.jsonl", "[1]"), ("e.jsonl", "\xff")):
        (f := tmp_path/name).write_bytes(text.encode("latin-1"))
        with pytest.raises(EvalError): load_pairs(f)
    for text in ("{", '{"id": 1}', "[]", '[{"idx": 1}]'):
        f.write_text(text)
        with pytest.raises(EvalError, match="replies"): load_replies(f)
    (tmp_path/"pl").mkdir(); (tmp_path/"pl/testset-v1.json").write_text('[{"idx": 1}]')
    with pytest.raises(EvalError, match="cannot read"): load_pairs(tmp_path/"pl")

def test_similarity_asks_for_vectors_together():
    class Emb:
        name, calls = "fake", 0
        def embed(self, texts): Emb.calls += 1; return np.array([[math.cos(len(t)), math.sin(len(t))] for t in texts], np.float32)
    said = ask(similarity_judge(Emb()), some_pairs(30))
    assert Emb.calls == 1 and said.counts == {"ok": 30} and ask(overlap_judge(), some_pairs(5)).counts == {"ok": 5}

# ---- suites ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("s", suites(), ids=lambda s: s.name)
def test_shipped_suites_mark_their_references(s):
    for q in s.spec.prompts:
        v = s.rubric.score(q.prompt, q.reference, q.category)
        assert v.score == 10 and v.passed, f"{q.id}: {v!r}"
        assert not s.rubric.score(q.prompt, q.prompt, q.category).passed and not s.rubric.score(q.prompt, "", q.category).passed
        others = [s.rubric.score(q.prompt, o.reference, q.category).passed for o in s.spec.prompts if o.id != q.id and o.category != q.category]
        assert not any(others), q.id

def test_every_automotive_criterion_can_be_lost():
    "Partial credit: each question's own points come apart"
    s = load_suite("automotive")
    for q in s.spec.prompts:
        words = q.reference.split()
        got = {s.rubric.score(q.prompt, " ".join(words[:k])).score for k in range(len(words)+1)}
        assert len(got) >= 4, f"{q.id}: {sorted(got)}"

TEA = "name: tea\nversion: 1.0.0\nmetrics: [rubric]\nrubric: {name: tea, criteria: [{name: any, points: 1, words: {min: 1}}]}\nprompts:\n  - {id: q1, prompt: 'How hot?', reference: '80', criteria: [{name: hot, points: 3, any: ['80']}]}\n  - {id: q2, prompt: 'How long?'}\n"
@pytest.mark.parametrize("was,now,what", [("name: tea\n", "", "name: is missing"), ("1.0.0", "1.0", "line 2"), ("[rubric]", "[bleu]", "line 3"), ("[rubric]", "[]", "line 3"), ("id: q2", "id: q1", r"line 7.*same as in prompts\[0\]"), ("How long", "how  HOT", "same as"),
    ("points: 3", "points: x", "line 6.*criteria"), ("any: ['80']", "matches: '('", "line 6.*does not compile"), ("any: ['80']", "any: ['{heat}']", "line 6.*no {heat}"), ("name: hot", "name: any", "line 6.*second criterion"), ("words: {min: 1}", "words: {least: 1}", "line 4"),
    ("rubric: {", "repeats: 3\nrubric: {", "same answer"), ("rubric: {name: tea, criteria: [{name: any, points: 1, words: {min: 1}}]}", "sampling: {temperature: 0}", "needs a rubric"), ("id: q1", "id: q 1", "line 6"), ("prompts:", "promts:", "promts|prompts"), ("'How hot?'", "''", "line 6"), ("{id: q2", "[", "YAML|line")])
def test_mistakes_in_a_suite_name_their_line(was, now, what):
    assert was in TEA
    with pytest.raises(EvalError, match=what): loads_suite(TEA.replace(was, now, 1), "tea.yaml")

@given(st.integers(0, len(TEA)), st.integers(0, 12), st.text(alphabet="{}[]:,-'\"\n ab0&*!|>%@", max_size=4))
@hyp(max_examples=150, deadline=None)
def test_a_damaged_suite_is_an_error_of_ours(at, drop, put):
    try: s = loads_suite(TEA[:at]+put+TEA[at+drop:], "tea.yaml")
    except EvalError as e: assert str(e)
    else: assert len(s) >= 1

@pytest.mark.parametrize("text", ["[["*3000, "? [a, b]\n: c", "name: 2026-13-45", "- 1", "", "\x00", "a: &x 1\nb: *x", "1: 2"])
def test_what_is_no_suite(text):
    with pytest.raises(EvalError): loads_suite(text)

def test_suites_by_name_and_file(tmp_path):
    with pytest.raises(EvalError, match="automotive"): load_suite("no-such")
    (tmp_path/"r.yaml").write_text("name: r\ncriteria: [{name: c, points: 1, any: [yes]}]", encoding="utf-8")
    (tmp_path/"s.yaml").write_text("name: s\nversion: 0.1.0\nmetrics: [rubric]\nrubric: r.yaml\nprompts: [{id: q, prompt: 'Well?'}]", encoding="utf-8")
    with pytest.raises(EvalError): load_suite(tmp_path/"s.yaml")   # YAML reads `yes` as a truth value, and the rubric says so
    (tmp_path/"r.yaml").write_text("name: r\ncriteria: [{name: c, points: 1, any: ['yes']}]", encoding="utf-8")
    assert load_suite(tmp_path/"s.yaml").rubric.score("Well?", "yes").score == 10
    assert len({s.hash for s in suites()}) == len(list(suites_folder().glob("*.yaml")))

# ---- the cache of evaluations ----------------------------------------------------------------------------------------
def test_the_tiny_model_on_a_suite(tmp_path, home):
    from somaagent.llm.chat import load_model
    m, c = load_model("tiny"), Cache(tmp_path/"c")
    one = run_suite(m, "support-desk", c, limit=4); again = run_suite(m, "support-desk", Cache(tmp_path/"c"), limit=4); bare = run_suite(m, "support-desk", limit=4)
    assert (one.kept.hits, one.kept.misses, again.kept.rate) == (0, 12, 1.) and again.result.frame.equals(one.result.frame)
    assert bare.result.frame["answer"].to_list() == one.result.frame["answer"].to_list() and [f.name for f in one.figures] == ["passed", "rubric, of 10", "exact match", "token F1", "perplexity"]
    assert run_suite(m, "support-desk", c, limit=6).kept.hits == 12 and compare(one.result, again.result, "rubric").overall.diff == 0
    drawn = loads_suite((suites_folder()/"support_desk.yaml").read_text(encoding="utf-8").replace("repeats: 1", "repeats: 2").replace("temperature: 0", "temperature: 0.9").replace("[rubric, exact, f1, loss]", "[rubric]"))
    x, y = run_suite(m, drawn, limit=3), run_suite(m, drawn, limit=2)
    assert x.result.frame["answer"][:4].to_list() == y.result.frame["answer"].to_list() and x.result.frame["answer"].n_unique() > 3 and x.repeats["k"].to_list() == [1, 1, 2, 2]

CHILD = """
import os, signal, sys
from collections import namedtuple
from somaagent.evals.cached import run_suite
from somaagent.store.cache import Cache
Reply = namedtuple("Reply", "text prompt_tokens completion_tokens finish")
class Model:
    hash, name, n = "sha256:m", "m", 0
    def generate(self, prompts, **kw):
        if self.n and sys.argv[2] == "die": os.kill(os.getpid(), signal.SIGKILL)
        self.n += 1
        return [Reply(f"An answer to {p}", 3, 4, "stop") for p in prompts]
    def loss(self, p, a): return [1.]*len(p), [3]*len(p)
m = Model(); r = run_suite(m, "automotive", Cache(sys.argv[1]), batch=5)
print(m.n, r.kept.hits, r.kept.misses)
"""
def test_kill_9_and_resume(tmp_path):
    run = lambda how: subprocess.run([sys.executable, "-c", CHILD, str(tmp_path/"c"), how], capture_output=True, text=True)
    assert run("die").returncode == -signal.SIGKILL
    assert run("live").stdout.split() == ["3", "5", "55"] and run("live").stdout.split() == ["0", "60", "0"]

def test_failures_are_not_kept(tmp_path):
    class Model:
        hash, name = "sha256:w", "w"
        def __init__(self): self.asked = []
        def generate(self, prompts, **kw): self.asked.append(len(prompts)); return [Reply("", 9, 0, "too_long") if "VIN" in p else Reply("yes", 3, 1, "stop") for p in prompts]
        def loss(self, p, a): return [math.nan if "VIN" in x else 1. for x in p], [2]*len(p)
    m = Model(); one = run_suite(m, "automotive", Cache(tmp_path)); two = run_suite(m, "automotive", Cache(tmp_path))
    vin = one.result.frame.filter(pl.col("prompt").str.contains("VIN"))
    assert m.asked == [20, 1] and two.kept.misses == 2 and vin["loss"].to_list() == [None] and one.figures[-1].n == 19

def test_kept_is_right_when_the_cache_is_not(tmp_path):
    c = Cache(tmp_path); k = Kept(c)
    assert k.map([1, 2], lambda ix: [i+1 for i in ix]) == [1, 2]
    for f in tmp_path.rglob("*"):
        if f.is_file(): f.write_bytes(f.read_bytes()[:-1])
    assert Kept(c).map([1, 2], lambda ix: [i+1 for i in ix]) == [1, 2] and math.isnan(Kept().rate)
    with pytest.raises(EvalError, match="wrong number"): k.map([7], lambda ix: [])

# ---- the command -----------------------------------------------------------------------------------------------------
def soma(*args):
    from somaagent.cli.eval import eval_
    return CliRunner().invoke(eval_, [str(a) for a in args])

def test_the_command(tmp_path, home):
    run = lambda *a: soma("run", "support-desk", "--limit", 2, "--json", *a)
    one, two, three = (json.loads(run(*a).output) for a in (("--out", tmp_path/"a.parquet"), ("--out", tmp_path/"b.parquet"), ("--no-cache", "--out", tmp_path/"c.parquet")))
    assert (one["hits"], one["misses"], two["hits"], two["misses"], three["hits"]) == (0, 6, 6, 0, 0) and one["figures"] == two["figures"] == three["figures"]
    c = json.loads(soma("compare", tmp_path/"a.parquet", tmp_path/"b.parquet", "--metric", "loss", "--json").output)
    assert c["overall"]["diff"] == 0 and c["metric"] == "loss"
    from somaagent.cli.app import soma as root
    assert CliRunner().invoke(root, ["eval", "suites", "--json"]).exit_code == 0

def test_the_command_refuses(tmp_path, home):
    (tmp_path/"x.jsonl").write_text('{"id": "refund", "answer": "ok"}'); (tmp_path/"y.jsonl").write_text("nonsense")
    for args, what in ((("run", "support-desk", "--answers", tmp_path/"x.jsonl"), "have no answer"), (("run", "support-desk", "--answers", tmp_path/"y.jsonl"), "cannot read"), (("run", "support-desk", "--answers", "x", "--model", "tiny"), "either"),
                       (("compare", tmp_path/"x.jsonl", tmp_path/"y.jsonl"), "not a saved evaluation"), (("passport", tmp_path/"none"), "cannot read judged pairs")):
        r = soma(*args); assert r.exit_code == 1 and what in r.output and "Traceback" not in r.output

# ---- the harness -----------------------------------------------------------------------------------------------------
def test_token_logprobs_are_those_of_the_loss():
    from somaagent.evals.harness import token_logprobs
    from somaagent.llm.chat import load_model
    m = load_model("tiny"); qs, an = ["Where is my order FW-1234?", "Hello"], ["It is on its way.", "Dear customer, thank you for writing to us."]
    nll, n = m.loss(qs, an); got = token_logprobs(m, m.encode(qs, an))
    assert [l for l, _ in got] == pytest.approx((-nll*n).tolist(), rel=1e-4)
    best = m.generate(qs[:1], max_new_tokens=8)[0].text; ids = m.tok(m.render(qs[0]), add_special_tokens=False)["input_ids"]; tail = m.tok(best, add_special_tokens=False)["input_ids"]
    assert token_logprobs(m, [(ids+tail, len(ids))])[0][1] and not got[1][1]

def test_the_harness_or_a_word_about_it(tmp_path):
    from somaagent.evals.harness import harness_model, run_harness
    try: import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"somaagent\[harness\]"): harness_model(object())
        pytest.skip("lm-eval is not installed here")
    from somaagent.llm.chat import load_model
    rows = [dict(q="Where is my order FW-1234?", choices=["It is on its way.", "xq zz vv kk"], gold=0), dict(q="I want a refund.", choices=["qq ww ee", "Your refund is approved."], gold=1)]
    (tmp_path/"rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path/'rows.jsonl'}}}}}\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\n"
    (tmp_path/"a.yaml").write_text("task: soma_mc\n"+base+"output_type: multiple_choice\ndoc_to_target: gold\ndoc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n")
    (tmp_path/"b.yaml").write_text("task: soma_gen\n"+base+"output_type: generate_until\ndoc_to_target: '{{choices[gold]}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n")
    (tmp_path/"c.yaml").write_text("task: soma_ppl\n"+base.replace("'{{q}}'", "''")+"output_type: loglikelihood_rolling\ndoc_to_target: '{{q}}'\nmetric_list: [{metric: word_perplexity}]\n")
    r = run_harness(load_model("tiny"), ["soma_mc", "soma_gen", "soma_ppl"], tmp_path)
    assert r["soma_mc"][0].value == 1 and r["soma_gen"][0].name == "exact_match" and r["soma_ppl"][0].value > 1
