"""Quality: raters, agreement, measures and the calibrated score, by golden values, by simulation with a stated error, and at the edges."""
import json, os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import binomtest

from somaagent.core.errors import DataError, NoUsableRowsError
from somaagent.data.agreement import among_answers, among_neighbours, label_confidence, result_of
from somaagent.data.calibrate import QualityModel, TIERS, fit_quality, load_tiers, proof, propensity, signals, tier, tier_table, why
from somaagent.data.raters import _capped, debias, fit_judgments, fit_ratings, hold_out, plurality
from somaagent.data.reliability import auc, auc_difference, measure, rate, reliability, wilson

shared = Path(os.environ.get("SOMA_SHARED_DATA") or Path(__file__).resolve().parents[2]/"shared"/"data")

def world(seed=0, n=2400, users=300, rated=.4, noise=.9, weights=(1.4,-1.)):
    "A log of which the truth is known: two signals, a refusal, ratings around 4.3 and 2.6 with leniency and noise"
    g = np.random.default_rng(seed)
    x = np.clip(g.normal(0,.5,(n,2)),-1,1)
    refuses = g.random(n) < .15
    z = g.random(n) < 1/(1+np.exp(-(.6 + 2*x@np.array(weights) - 2.*refuses)))
    u,lean = g.integers(0,users,n),g.normal(0,.4,users)
    stars = np.clip(np.round(np.where(z,4.3,2.6)+lean[u]+g.normal(0,noise,n)),1,5)
    df = pl.DataFrame(dict(id=[f"i{k}" for k in range(n)], user_id=[f"u{k:03d}" for k in u], prompt=[f"How do I change setting {k}?" for k in range(n)], answer=np.where(refuses,"I am sorry, but I cannot help with that.","Open the menu and press the button.").tolist(),
        model=["m"]*n, rating=np.where(g.random(n) < rated, stars, np.nan), signal_a=x[:,0], signal_b=x[:,1])).with_columns(pl.col("rating").fill_nan(None))
    return df,z

# ---- raters ----------------------------------------------------------------------------------------------------------
def test_leniency_is_found_and_removed():
    g = np.random.default_rng(1)
    b,v = g.normal(0,.7,80),g.normal(3.5,.7,60)
    u,i = np.repeat(np.arange(80),25),g.integers(0,60,2000)
    df = pl.DataFrame(dict(id=[f"{k:02d}" for k in i], user_id=[f"{k:02d}" for k in u], rating=v[i]+b[u]+g.normal(0,.5,2000)))
    f = fit_ratings(df)
    assert np.corrcoef(f.raters["leniency"], b)[0,1] > .97 and f.spread["noise"] == pytest.approx(.5, abs=.05) and f.spread["leniency"] == pytest.approx(.7, abs=.15)
    inside = np.abs(f.raters["leniency"].to_numpy() - (b-b.mean())) < 2.5*f.raters["leniency_se"].to_numpy() + .15
    assert inside.mean() > .9
    assert np.abs(debias(df, scale=None).to_numpy()-v[i]).mean() < .75*np.abs(df["rating"].to_numpy()-v[i]).mean()

def test_no_rater_outweighs_the_cap():
    g = np.random.default_rng(0)
    for _ in range(50):
        i,w0 = g.integers(0,4,20),g.uniform(.5,3,4)
        w = _capped(g.lognormal(0,2.5,20), i, w0, cap := float(g.uniform(.1,.6)))
        total = w0+np.bincount(i, weights=w, minlength=4)
        assert (w <= cap*total[i]*(1+1e-6)).all() and (w >= 0).all()

def test_two_hundred_votes_are_one_voice():
    base = pl.DataFrame(dict(id=["t"]*6+["o"]*6, user_id=[f"u{k}" for k in range(6)]*2, rating=[1.,2.,1.,2.,1.,2.]+[4.,3.,4.,3.,4.,3.]))
    vote = lambda n: pl.concat([base, pl.DataFrame(dict(id=["t"]*n, user_id=["loud"]*n, rating=[5.]*n))])
    one,many = (fit_ratings(vote(n)).items.filter(item="t")["value"][0] for n in (1,200))
    assert one == pytest.approx(many, abs=1e-9) and many < 2.6

def test_judgments_golden():
    votes = pl.DataFrame([dict(item=f"{k}", rater=r, label=l) for k in range(40) for r,l in (("a","xy"[k%2]),("b","xy"[k%2]),("c","x"))])
    f = fit_judgments(votes)
    assert f.items.sort(pl.col("item").cast(pl.Int64))["verdict"].to_list() == ["x","y"]*20
    r = dict(zip(f.raters["rater"], f.raters["reliability"]))
    assert r["a"] == pytest.approx(r["b"]) and r["a"] > .9 and r["c"] < .6
    bare = fit_judgments(votes, strength=1e-9).raters
    assert dict(zip(bare["rater"], bare["reliability"]))["c"] == pytest.approx(.5, abs=1e-6)
    assert plurality(votes).height == 40 and f.loglik[-1] >= f.loglik[0]
    assert np.allclose(f.confusion.sum(2), 1) and np.allclose(f.items.select(pl.selectors.starts_with("p_")).sum_horizontal(), 1)

def test_rater_edges():
    with pytest.raises(NoUsableRowsError): fit_ratings(pl.DataFrame(dict(id=["a"], user_id=["u"], rating=[float("nan")])))
    with pytest.raises(DataError, match="finite"): fit_ratings(pl.DataFrame(dict(id=["a"], user_id=["u"], rating=[float("inf")])))
    with pytest.raises(DataError, match="between 0 and 1"): fit_ratings(pl.DataFrame(dict(id=["a"], user_id=["u"], rating=[1.])), cap=0)
    with pytest.raises(DataError, match="nobody gave"): fit_judgments(pl.DataFrame(dict(item=["a"], rater=["r"], label=["x"])), known={"a":"q"})
    out = debias(pl.DataFrame(dict(id=["a","b"], user_id=[None,"u"], rating=[4.,None])))
    assert out.to_list() == [4.,None]

@pytest.mark.skipif(not (shared/"pandalm").exists(), reason="no shared data here")
def test_weighed_judges_beat_the_plain_mean_on_held_out_humans():
    panel = ["annotator1","annotator2","annotator3"]
    load = lambda f: json.loads((shared/"pandalm"/f).read_text(encoding="utf-8"))
    rows = [(str(h["idx"]),a,str(h[a])) for h in load("testset-v1.json") for a in panel] + [(str(x["idx"]),"panda",str(x["pandalm_result"])) for x in load("pandalm-7b-testset-v1.json")]
    rows += [(str(x["idx"]),"gpt",{"1":"1","2":"2","Tie":"0"}[x["gpt_result"]]) for x in load("gpt-3.5-turbo-testset-v1.json") if x["gpt_result"] != "garbage"]
    votes = pl.DataFrame(rows, schema=["item","rater","label"], orient="row")
    for keep in panel:
        seen,held = hold_out(votes, keep, panel)
        mean = seen.with_columns(x=pl.col("label").replace_strict({"1":-1.,"2":1.,"0":0.}, return_dtype=pl.Float64)).group_by("item").agg(pl.col("x").mean()).select("item", verdict=pl.when(pl.col("x") > .5).then(pl.lit("2")).when(pl.col("x") < -.5).then(pl.lit("1")).otherwise(pl.lit("0")))
        agree = lambda f: (held.join(f.select("item", v="verdict"), on="item")["v"] == held.join(f, on="item")["verdict"]).mean()
        assert agree(fit_judgments(seen).items) > agree(mean) + .05

# ---- measures --------------------------------------------------------------------------------------------------------
def test_wilson_and_auc_golden():
    assert wilson(8,10) == pytest.approx((.4902,.9433), abs=1e-4) and wilson(0,0) == (0.,1.)
    assert auc([.1,.4,.35,.8],[0,0,1,1]).value == .75 and auc([1,1,1,1],[0,1,0,1]).value == .5 and auc([0,1],[0,1]).value == 1.

def test_delong_covers():
    "400 worlds; at 95 % the count of covering intervals is binomial: a wrong variance fails, a right one with p < 1e-4"
    g,truth,hits = np.random.default_rng(0),.7602,0   # Φ(1/√2)
    for _ in range(400):
        y = np.arange(120) < 60
        a = auc(g.normal(size=120)+y, y); hits += a.lo <= truth <= a.hi
    assert binomtest(hits, 400, .95).pvalue > 1e-4

def test_clustered_intervals_are_wider_and_differences_narrower():
    g = np.random.default_rng(2); u = np.repeat(np.arange(50),20); y = g.random(1000) < np.repeat(g.uniform(.1,.9,50),20)
    x = y+g.normal(0,1,1000)+np.repeat(g.normal(0,1,50),20)
    wide,narrow = auc(x,y,u),auc(x,y)
    assert wide.value == narrow.value and wide.hi-wide.lo > narrow.hi-narrow.lo
    assert (r := rate(y,u)).hi-r.lo > rate(y).hi-rate(y).lo
    assert auc_difference(x,x,y).value == 0

def test_perfect_and_vain_probabilities_are_told_apart():
    "A perfect score is called calibrated in about 97.5 % of 60 worlds, an overconfident one in none"
    g,fair,vain = np.random.default_rng(3),0,0
    for k in range(60):
        p = g.beta(1,1,800); y = g.random(800) < p
        fair += measure(p,y,boot=100,seed=k).calibrated
        vain += measure(1/(1+((1-p)/p)**2.5),y,boot=100,seed=k).calibrated
    assert binomtest(fair, 60, .975).pvalue > 1e-4 and vain == 0
    assert reliability([.2]*3,[0,1,0])["n"].sum() == 3
    for bad in (([.1],[2]),([float("nan")],[1]),([.1,.2],[1])):
        with pytest.raises(DataError): measure(*bad)

# ---- agreement -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text,want", [("x\n#### 1,234.50","1234.5"),("A: $18","18"),("The answer is 42","42"),(None,""),("card_arrival","card_arrival"),("one two three four five six seven eight 9 and 10","10"),("-3","-3")])
def test_results(text, want): assert result_of(text) == want

def test_agreement_does_not_count_the_row_itself_or_its_author_twice():
    df = pl.DataFrame(dict(prompt=["q"]*4, answer=["A: 1","A: 1","A: 1","A: 2"], model=["a","a","a","b"]))
    assert among_answers(df).to_list()[:3] == [among_answers(df)[0]]*3 and among_answers(df)[0] < 0
    assert among_answers(df, author=None)[0] > among_answers(df, author=None)[3]

def test_copies_do_not_vouch_for_each_other():
    texts = [f"where is my card number {k}" for k in range(8)] + ["where is my card number 0"]*3 + [f"a loan of {k} please" for k in range(8)]
    near = among_neighbours(texts, ["card"]*8+["loan"]*11, k=4)
    assert near[8:11].max() == -1 and near[11:].min() > 0
    assert label_confidence(texts, ["x"]*19).tolist() == [0.]*19

# ---- the calibrated score --------------------------------------------------------------------------------------------
def test_tiers_are_data(tmp_path):
    (tmp_path/"t.yaml").write_text("version: 2.0.0\ntiers: {Top: 0.8, Rest: 0.0}\n")
    r = load_tiers(tmp_path/"t.yaml")
    assert r["version"] == "2.0.0" and pl.DataFrame(dict(p_good=[.8,.79999])).select(tier(rules=r))["tier"].to_list() == ["Top","Rest"]
    assert list(TIERS["tiers"]) == ["Excellent","Good","Fair","Poor"]
    for bad in ({"tiers":{"A":.5}},{"tiers":{}},{"tiers":{"A":1.2,"B":0}},{"tier":{}},[1]):
        with pytest.raises(DataError): load_tiers(bad)

@pytest.mark.parametrize("seed", [0,1])
def test_recovers_probabilities_from_noisy_ratings(seed):
    "Truth known: unrated rows are ranked (their own best possible AUC is about 0.85), probabilities within 0.11 on average, tiers in order"
    df,z = world(seed)
    f = fit_quality(df); t = f.frame; none = t["rating"].is_null().to_numpy()
    c = measure(t["p_good"].to_numpy()[none], z[none], t["user_id"].filter(pl.Series(none)), boot=50)
    assert c.auc.lo > .8 and c.ece.value < .11 and .6 < c.slope < 2
    shares = tier_table(t, z, t["user_id"])["good"].drop_nulls().to_list()
    assert shares == sorted(shares, reverse=True)
    w = dict(zip(f.model.signals, f.model.weight))
    assert w["a"] > 0 > w["b"] and w["refusal"] > 0
    assert proof(f, boot=50).auc.lo > .6

def test_the_others_ratings_are_no_mirror_of_ones_own():
    "One model, one wording: the mean of the others is high where the own rating is low, and must not be learnt from"
    df,z = world(3); df = df.with_columns(answer=pl.lit("Open the menu."))
    w = dict(zip((m := fit_quality(df).model).signals, m.weight))
    assert abs(w["model"]) < 3 and abs(w["wording"]) < 3 and w["a"] > 1

def test_a_row_is_scored_without_its_own_users_ratings():
    df,_ = world(n=900)
    flip = df.with_columns(rating=pl.when(pl.col("user_id") == "u001").then(6-pl.col("rating")).otherwise(pl.col("rating")))
    one = signals(df).filter(df["user_id"] == "u001"); two = signals(flip).filter(df["user_id"] == "u001")
    assert one.equals(two)

def test_a_bomb_lifts_no_tier():
    df,_ = world()
    bad = [dict(id=f"b{k}", user_id="loud", prompt="How?", answer="I am sorry, but I cannot help with that.", model="m", rating=None, signal_a=-1., signal_b=1.) for k in range(150)]
    quiet = pl.concat([df, pl.DataFrame(bad, schema=df.schema)])
    loud = quiet.with_columns(rating=pl.when(pl.col("user_id") == "loud").then(5.).otherwise(pl.col("rating")))
    a,b = (fit_quality(x).frame for x in (quiet,loud))
    m = (a["user_id"] == "loud") | a["answer"].str.starts_with("I am sorry") & a["rating"].is_null()
    rank = {k: -n for n,k in enumerate(TIERS["tiers"])}
    up = np.array([rank[y] > rank[x] for x,y in zip(a["tier"].filter(m), b["tier"].filter(m))])
    assert not up[(a["user_id"].filter(m) == "loud").to_numpy()].any() and up.mean() < .05

def test_why_adds_up_and_a_kept_model_scores_alike(tmp_path):
    df,_ = world(); f = fit_quality(df)
    logit = f.frame["logits"].struct.unnest().sum_horizontal().to_numpy()
    assert np.allclose(1/(1+np.exp(-logit)), f.frame["p_good"].to_numpy(), atol=1e-3)
    f.model.save(tmp_path/"m.json"); again = QualityModel.load(tmp_path/"m.json")
    assert again.frame().equals(f.model.frame()) and np.corrcoef(again.apply(df)["p_signals"], f.frame["p_signals"])[0,1] > .98
    assert any(x.startswith("refusal") for x in why(f.frame.filter(pl.col("answer").str.starts_with("I am")).row(0, named=True)))
    with pytest.raises(DataError, match="missing"): again.apply(df.drop("signal_a"))
    (tmp_path/"m.json").write_text("{}")
    with pytest.raises(DataError, match="no model"): QualityModel.load(tmp_path/"m.json")
    assert fit_quality(df).frame.equals(f.frame)

def test_audit_pins_a_shifted_scale():
    df,z = world(2); f = fit_quality(df, {"good_rating": 4.2})
    ids = np.random.default_rng(0).choice(df.height, 400, replace=False)
    g = f.audit([f"i{k}" for k in ids], z[ids].tolist()); rest = np.setdiff1d(np.arange(df.height), ids)
    e = lambda x: measure(x.frame["p_good"].to_numpy()[rest], z[rest], boot=1).ece.value
    assert e(g) < .6*e(f)
    with pytest.raises(NoUsableRowsError): f.audit(["nobody"],[1])

def test_propensity_repairs_a_missing_at_random_mean():
    g = np.random.default_rng(0); x = g.normal(size=4000); seen = g.random(4000) < 1/(1+np.exp(-x))
    w = propensity(x[:,None], seen, limit=20.)
    assert abs(np.average(x[seen], weights=w[seen])) < .08 < x[seen].mean()

def test_degenerate_logs():
    df,_ = world(n=600)
    none = pl.lit(None, pl.Float64)
    with pytest.raises(NoUsableRowsError, match="no row has a rating"): fit_quality(df.with_columns(rating=none))
    with pytest.raises(NoUsableRowsError, match="no row has a rating"): fit_quality(df.with_columns(rating=pl.lit(float("nan"))))
    with pytest.raises(NoUsableRowsError, match="too few"): fit_quality(df.head(30))
    with pytest.raises(DataError, match="one side"): fit_quality(df.with_columns(rating=pl.lit(5.)))
    blank = fit_quality(df.with_columns(signal_a=pl.lit(float("nan")), signal_b=none))
    assert np.isfinite(blank.frame["p_good"].to_numpy()).all() and dict(zip(blank.model.signals, blank.model.weight))["a"] == 0
    odd = fit_quality(df.with_columns(answer=pl.when(pl.int_range(pl.len()) < 5).then(None).otherwise(pl.col("answer")), user_id=pl.when(pl.int_range(pl.len()) < 9).then(None).otherwise(pl.col("user_id"))))
    assert odd.frame["tier"][:5].to_list() == ["Poor"]*5 and why(odd.frame.row(0, named=True)) == ["not usable: empty_answer"]
    with pytest.raises(DataError, match="exists already"): signals(df.with_columns(signal_refusal=pl.lit(0.)))
