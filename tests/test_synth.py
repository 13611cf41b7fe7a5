"""Made rows and predicted categories: what must never pass, what must come out the same, what a killed job leaves."""
import json, os, random, signal, subprocess, sys, time
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np, polars as pl, pytest
from hypothesis import given, settings as hyp, strategies as st

from somaagent.core.errors import DataError, NoUsableRowsError
from somaagent.data import categories as cat, synthesize as syn
from somaagent.data.dedup import overlap, text_key
from somaagent.data.supportdesk import POLICY, ask
from somaagent.data.templates import compile_template, load_templates

root = Path(__file__).resolve().parents[1]
shared = Path(os.environ.get("SOMA_SHARED_DATA", root/"../shared/data"))
Said = namedtuple("Said", "text")

# ---- templates: what must not be possible

ESCAPES = ["{{ ''.__class__ }}", "{{ x.__class__.__base__ }}", "{{ x['__class__'] }}", "{{ (x|default(1)).__class__ }}", "{{ self }}", "{{ self._TemplateReference__context }}", "{{ x() }}", "{{ ''.join(['a','b']) }}", "{{ lipsum }}", "{{ namespace }}",
    "{{ x|attr('__class__') }}", "{{ [1]|map(attribute='__class__')|list }}", "{{ x|format(1) }}", "{{ 'a'|center(1000000000) }}", "{{ 'a'*1000000000 }}", "{{ [0]*1000000000 }}", "{{ 9**9**9 }}", "{{ 'a' ~ 'b' }}", "{% set a = 'a' %}{{ a }}",
    "{% for i in 'abc' %}{{ i }}{% endfor %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% include 'x' %}", "{% import 'os' as os %}", "{% extends 'x' %}", "{% block b %}{% endblock %}", "{% call x() %}{% endcall %}", "{% filter upper %}x{% endfilter %}", "{% raw %}{% endraw",
    "{{ '%999999999d' % 1 }}", "{{ x.format }}", "{{ x.format('{0.__class__}') }}", "{{ missing }}", "{{ x.missing }}", "{{ " + "("*4000 + "1" + ")"*4000 + " }}", "{{ " + "9"*6000 + " }}", "{{ 1/0 }}", "{{ 'a' < 1 }}", "{{ x|default(y) }}{{ y }}", "x"*30_000, "", "   "]

@pytest.mark.parametrize("text", ESCAPES, ids=lambda t: t[:40] or "empty")
def test_templates_that_reach_out_are_refused(text):
    with pytest.raises(DataError): compile_template(text)(x="value")

def test_a_template_takes_no_time_whatever_it_holds():
    t0 = time.process_time()
    for text in ESCAPES:
        try: compile_template(text)(x="value")
        except DataError: pass
    assert time.process_time()-t0 < 5

@hyp(max_examples=150, deadline=None)
@given(st.text("{}%|()[]'\"._ abx019*+-/~=<>", max_size=60))
def test_any_text_is_a_template_or_a_data_error(text):
    try: assert isinstance(compile_template(text)(x="v", a=1, b=2.), str)
    except DataError: pass

@hyp(max_examples=40, deadline=None)
@given(st.lists(st.integers(1,5), min_size=1, max_size=4), st.integers(1,3))
def test_every_combination_has_one_number(sizes, n_prompts):
    slots = {f"s{i}": list(range(k)) for i,k in enumerate(sizes)}
    body = " ".join("{{ %s }}" % s for s in slots)
    t, = load_templates([dict(prompt=[f"p{k} {body}" for k in range(n_prompts)], answer=body, slots=slots)])
    assert t.size == n_prompts*int(np.prod(sizes)) == len({t.row(i)[0] for i in range(t.size)})

# ---- made rows

BOX = dict(slots=dict(ref={"from":1000,"to":1400}, thing=["lamp","chair","tent"]), templates=[
    dict(category="refund", prompt=["Take the {{ thing }} back, FW-{{ ref }}.", "I want my money for FW-{{ ref }}, the {{ thing }}!"], answer="Your refund for FW-{{ ref }} is approved."),
    dict(category="status", prompt="Where may FW-{{ ref }} be?", answer="Order FW-{{ ref }} is on its way.")])
META = {"origin","synthetic","generator","seed"}

def test_seeds_reproduce_and_differ():
    a,b,c = (syn.from_templates(BOX, 200, seed=s).frame for s in (3,3,4))
    assert a.equals(b) and not a.equals(c) and a["id"].n_unique() == 200

@pytest.mark.parametrize("seed", range(3))
def test_no_made_row_says_what_a_test_row_or_a_real_row_says(seed):
    rng = random.Random(seed)
    every = syn.from_templates(BOX, 10_000, seed=seed).frame
    taken = every.sample(400, seed=seed)["prompt"].to_list()
    odd = [t.upper().replace(" ", "  ")+" \u200b!" for t in taken]   # said otherwise, meant the same
    rng.shuffle(odd)
    made = syn.from_templates(BOX, 10_000, real=odd[:200], test=odd[200:], near_test=1.01, seed=seed)
    assert not overlap(made.frame, pl.DataFrame(dict(prompt=odd))).any()
    assert made.frame.height == every.height-400 and made.dropped["test"] == 200 and made.note
    assert made.frame.select(text_key("prompt")).is_unique().all()

def test_what_comes_out_passes_the_check_of_contamination():
    from somaagent.data.contamination import leaks
    held = pl.DataFrame(dict(prompt=["Take the lamp back, FW-1003.", "Which chair is the best for a small kitchen?"]))
    made = syn.from_templates(BOX, 300, test=held, seed=0)
    assert made.frame.height > 100 and made.dropped["test"] > 0 and not leaks(made.frame, held).any()

def test_near_the_test_is_too_near():
    near = syn.from_templates(BOX, 50, test=["Where may FW-0001 be?"], near_test=.6, seed=0)
    assert near.dropped["test"] > 0 and not near.frame["prompt"].str.starts_with("Where may").any()

def test_provenance_is_complete_and_survives_the_log():
    made = syn.from_templates(BOX, 40, seed=1)
    for i,r in zip(syn.as_interactions(made, "desk"), made.frame.iter_rows(named=True)):
        m = json.loads(r["meta"])
        assert META | {"template","values"} <= m.keys() and r["source"] == "synthetic" == m["origin"] and all(isinstance(v,str) for v in m.values())
        assert i.app == "desk-synthetic" and i.source == "synthetic" and i.meta == m and i.id == r["id"] and i.user_id == "synthetic"
        used = json.loads(m["values"]); assert str(used["ref"]) in r["prompt"]
    real = pl.DataFrame(dict(id=["x"], source=["imp_1"], prompt=["q"], answer=["a"]))
    with pytest.raises(DataError): syn.as_interactions(real, "desk")

def test_made_rows_arrive_in_the_warehouse_once(home):
    from somaagent.data.interactions import log
    from somaagent.store.warehouse import warehouse
    rows = syn.as_interactions(syn.from_templates(BOX, 25, seed=1), "desk")
    with warehouse(f"chdb://{home}/wh", mode="direct") as wh:
        log(rows, wh); log(rows, wh)
        got = wh.query("SELECT count() AS n, uniqExact(id) AS ids, any(app) AS app, any(source) AS source FROM interactions")
    assert got.rows() == [(25, 25, "desk-synthetic", "synthetic")]

@hyp(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("a b c d e".split()), max_size=9), st.lists(st.sampled_from("a b c d e".split()), max_size=9))
def test_rouge_is_the_textbook_recursion(a, b):
    T = np.zeros((len(a)+1,len(b)+1), int)
    for i,x in enumerate(a):
        for j,y in enumerate(b): T[i+1,j+1] = T[i,j]+1 if x == y else max(T[i,j+1],T[i+1,j])
    assert syn._lcs(a,b) == T[-1,-1]
    assert syn.rouge_l(" ".join(a)," ".join(b)) == pytest.approx(2*T[-1,-1]/(len(a)+len(b)) if a and b else 0)

def test_the_pool_finds_what_comparing_with_everything_finds():
    rng = random.Random(5)
    texts = [ask(rng) for _ in range(700)]
    pool = syn.Pool(texts[:400], .6); pool.add(texts[400:550]); pool.add(texts[550:600])   # in the matrix, and not yet
    for t in texts[600:]:
        want = max(syn.rouge_l(t,o) for o in texts[:600])
        got,other = pool.nearest(t)
        assert (got == pytest.approx(want)) if want >= .6 else got == 0, (t,want,got)
        if got: assert syn.rouge_l(t,other) == got

# ---- self-instruct

class Model:
    "Deterministic in prompt and seed, as a model is; counts what it was asked"
    ref,hash,asked = "fake","sha256:1",0
    def generate(self, prompts, seed=0, **kw):
        self.asked += len(prompts); out = []
        for i,p in enumerate(prompts):
            r = random.Random(f"{p}{seed}{i}")
            out.append(Said("\n".join(f"{k}. {ask(r)}" for k in range(3)) if "more messages" in p else f"Thank you for writing. We look into it."))
        return out
SEEDS = pl.DataFrame([dict(id=f"r{k}", prompt=ask(random.Random(k), c), category=c) for k,c in enumerate(list(POLICY)*3)])

def test_self_instruct_says_where_every_row_comes_from_and_repeats_nothing():
    held = [ask(random.Random(1000+k)) for k in range(150)]
    s = syn.self_instruct(Model(), SEEDS, 25, test=held, seed=2)
    assert s.frame.height == 25 and s.tried >= 25+sum(s.dropped.values())-s.dropped.get("quality",0)-75
    for r in s.frame.iter_rows(named=True):
        m = json.loads(r["meta"])
        assert META | {"model","teacher","seeds","parents","round"} <= m.keys() and m["model"] == "sha256:1" and m["parents"].startswith("sha256:")
        shown = SEEDS.filter(pl.col("id").is_in(m["seeds"].split(",")))
        assert shown.height == 3 and set(shown["category"]) == {r["category"]}
        assert max(syn.rouge_l(r["prompt"],t) for t in held) < .7 and max(syn.rouge_l(r["prompt"],t) for t in SEEDS["prompt"]) < .7
    assert syn.self_instruct(Model(), SEEDS, 25, test=held, seed=2).frame.equals(s.frame)

def test_a_model_that_only_copies_ends():
    class Copies(Model):
        def generate(self, prompts, **kw): self.asked += len(prompts); return [Said(p.split("\n")[1]) for p in prompts]
    m = Copies(); s = syn.self_instruct(m, SEEDS, 10, calls=40)
    assert s.frame.height == 0 and m.asked == 40 and s.dropped == {"copy": 40} and "yielded no more" in s.note

@pytest.mark.parametrize("bad", [None, "", "\0", "1. \n2. ", "x"*200_000, "1. "+"\u202e"*50, "{{ 7*7 }}", "As an AI language model I cannot"])
def test_nonsense_from_a_model_is_counted_not_kept(bad):
    class Odd(Model):
        def generate(self, prompts, **kw): return [Said(bad) for _ in prompts]
    s = syn.self_instruct(Odd(), SEEDS, 5, calls=4, batch=2)
    assert s.frame.height == 0 and sum(s.dropped.values()) == s.tried > 0

JOB = """
import os, sys, time, random; sys.path.insert(0, {here!r})
from test_synth import Model, SEEDS, syn
class Slow(Model):
    def generate(self, prompts, **kw): time.sleep({wait}); return super().generate(prompts, **kw)
m = Slow(); s = syn.self_instruct(m, SEEDS, 30, batch=4, seed=9, out={out!r})
s.frame.write_parquet({to!r}); print(m.asked)
"""

def test_a_killed_job_goes_on_and_ends_the_same(tmp_path):
    here = str(Path(__file__).parent)
    run = lambda out,to,wait: subprocess.Popen([sys.executable, "-c", JOB.format(here=here, out=str(tmp_path/out), to=str(tmp_path/to), wait=wait)], stdout=subprocess.PIPE, text=True)
    clean = run("a","a.parquet",0); whole = int(clean.communicate()[0])
    p = run("b","b.parquet",.15); log = tmp_path/"b"/"rounds.jsonl"
    for _ in range(400):
        if log.exists() and log.read_bytes().count(b"\n") >= 2: break
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close()
    assert not (tmp_path/"b.parquet").exists()
    with open(log, "ab") as f: f.write(b'{"texts": ["1. torn')          # and a line that was being written
    rest = run("b","b.parquet",0); asked = int(rest.communicate()[0])
    assert pl.read_parquet(tmp_path/"a.parquet").equals(pl.read_parquet(tmp_path/"b.parquet"))
    assert 0 < asked < whole
    with pytest.raises(DataError, match="another job"): syn.self_instruct(Model(), SEEDS, 30, batch=4, seed=10, out=tmp_path/"b")

def test_mix_has_the_share_it_says():
    real,made = pl.DataFrame(dict(prompt=[f"q{i}" for i in range(90)], answer=["a"]*90)),syn.from_templates(BOX, 200)
    for share in (0,.25,.5):
        same,top = syn.mix(real,made,share),syn.mix(real,made,share,on_top=True)
        assert same.height == 90 and top.filter(~pl.col("made")).height == 90
        assert same["made"].mean() == pytest.approx(share, abs=.01) == top["made"].mean()
    with pytest.raises(NoUsableRowsError): syn.mix(real, made, .9, on_top=True)

# ---- categories

def desk(n, seed):
    rng = random.Random(seed)
    return pl.DataFrame([dict(user_id=f"u{rng.randrange(n//4)}", prompt=ask(rng,c), category=c) for c in (rng.choice(list(POLICY)) for _ in range(n))])

def test_the_promise_holds_on_fresh_rows():
    """Of the rows predicted at least 90 % are right. Five models; each threshold is the end of a one-sided 90 % interval, so one miss in five by chance has probability
    below .41, and each must miss by more than the error of 600 fresh rows (3 standard errors, 3.7 points) to fail: below .001 together. Seeds are fixed."""
    for seed in range(5):
        m,fresh = cat.fit_categories(desk(160, seed)),desk(600, 100+seed)
        p = m(fresh["prompt"]); k = p["category"] != "other"
        assert k.mean() > .3 and (p["category"] == fresh["category"]).filter(k).mean() > .9-.037

def test_an_unknown_category_mostly_lands_in_other():
    "Three quarters of three unknown categories, and not fewer than when no row is assumed to be unknown"
    some = ["password","billing","refund"]
    a,b = (cat.leave_one_out(desk(400, 1), some, unseen=u) for u in (.1,0.))
    assert a["other"].mean() > .75 and a["other"].mean() >= b["other"].mean(), (a,b)

def test_given_categories_stay_and_rows_keep_their_order():
    d = desk(200, 2).with_columns(category=pl.when(pl.int_range(pl.len())%2 == 0).then(pl.lit("  mine  ")).when(pl.int_range(pl.len())%3 == 0).then("category"))
    f = cat.predict(d)
    assert f["prompt"].equals(d["prompt"]) and f.height == d.height
    given = d["category"].is_not_null()
    assert f.filter(given)["category"].equals(d.filter(given)["category"].str.strip_chars()) and (f.filter(given)["category_source"] == "given").all() and f.filter(given)["category_confidence"].null_count() == given.sum()
    rest = f.filter(~given); assert set(rest["category_source"]) <= {"predicted","other"} and rest["category_confidence"].is_between(0,1).all() and ((rest["category"] == "other") == (rest["category_source"] == "other")).all()

def test_a_frame_whose_rows_all_have_a_category_is_left_alone():
    d = desk(60, 3); assert cat.predict(d).drop("category_confidence","category_source").equals(d)

@pytest.mark.parametrize("text", ["", "   ", "你好，世界", "\u202e\u200b", "a"*100_000, "\0\0", "\n\r\t", "🙂"*50, None])
def test_texts_that_say_nothing_are_other(text):
    m = cat.fit_categories(desk(300, 4)); assert m([text, "x"])["category"][0] == "other"

def test_few_labels_are_refused_and_rare_ones_named():
    with pytest.raises(NoUsableRowsError, match="19"): cat.fit_categories(desk(19, 0))
    with pytest.raises(DataError): cat.fit_categories(desk(60, 0).with_columns(category=pl.lit("one")))
    m = cat.fit_categories(pl.concat([desk(100, 0), pl.DataFrame(dict(user_id=["z"], prompt=["a rare thing"], category=["rare"]))]))
    assert m.meta["rare"] == ["rare"] or "rare" in m.meta["rare"] and "rare" not in m.names

def test_no_threshold_can_save_labels_drawn_by_lot():
    rng = np.random.default_rng(0)
    d = desk(300, 5).with_columns(category=pl.Series(rng.choice(["a","b","c"], 300)))
    assert (cat.predict(d.with_columns(category=pl.when(pl.int_range(pl.len()) < 250).then("category")))["category_source"].tail(50) == "other").all()

def test_a_model_is_the_same_wherever_it_is_made_and_read(tmp_path):
    a,b = cat.fit_categories(desk(200, 6)),cat.fit_categories(desk(200, 6))
    assert a.hash == b.hash != cat.fit_categories(desk(200, 7)).hash
    again = cat.load_categories(a.save(tmp_path/"m.npz")); assert again.hash == a.hash
    raw = (tmp_path/"m.npz").read_bytes()
    for k in (0, 10, len(raw)//2, len(raw)-30):
        (tmp_path/"x.npz").write_bytes(raw[:k] if k%2 else raw[:k]+b"\0"*40+raw[k+40:])
        try: got = cat.load_categories(tmp_path/"x.npz").hash
        except DataError: continue
        assert got == a.hash
    import pickle
    with open(tmp_path/"p.npz","wb") as f: pickle.dump(dict(a=1), f)
    with pytest.raises(DataError): cat.load_categories(tmp_path/"p.npz")

def test_pieces_do_not_depend_on_the_company(): 
    texts = [ask(random.Random(k)) for k in range(40)]+["", "ß ﬁ", "ab"]
    together = cat.pieces(texts)
    for i,t in enumerate(texts): assert (together[i] != cat.pieces([t])).nnz == 0

def test_prediction_is_fast():
    m,texts = cat.fit_categories(desk(300, 8)),desk(400, 9)["prompt"].to_list()*25
    t0 = time.process_time(); m(texts); rate = len(texts)/(time.process_time()-t0)
    assert rate > 20_000, f"{rate:,.0f} rows a second of processor time"

def test_banking77():
    "1,500 rows of 15 of the 77 intents; the whole is measured in experiments/LOG.md"
    if not (shared/"banking77"/"train.csv").exists(): pytest.skip("needs banking77 in the shared data")
    d = pl.read_csv(shared/"banking77"/"train.csv").rename(dict(text="prompt"))
    keep = d["category"].unique().sort()[:15].to_list()
    tr = d.filter(pl.col("category").is_in(keep)).sample(1500, seed=0, shuffle=True)
    te = pl.read_csv(shared/"banking77"/"test.csv").rename(dict(text="prompt")).filter(pl.col("category").is_in(keep))
    m = cat.fit_categories(tr, folds=2); p = m(te["prompt"]); k = p["category"] != "other"
    assert (p["likeliest"] == te["category"]).mean() > .9 and k.mean() > .5 and (p["category"] == te["category"]).filter(k).mean() > .9
