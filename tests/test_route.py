"""The router under odd requests, broken files, noise and failing models; and its log read by off-policy evaluation."""
import asyncio, json, os
import numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st

from somaagent.core.errors import ModelError, NoUsableRowsError
from somaagent.core.records import utcnow
from somaagent.llm import difficulty as D
from somaagent.llm.hardness import Light, rules
from somaagent.llm.resilience import Breaker
from somaagent.llm.route import Live, Needs, Router, needs_of, routed
from somaagent.llm.tradeoff import cross_fit, curve, tolerance_for

SMALL, LARGE = "openai/gpt-4o-mini", "openai/gpt-4o"

def made(n=200, seed=0, a=3.5, small=.9, large=.15):
    rng = np.random.default_rng(seed)
    k = rng.integers(1, 9, n)
    prompts = ["Please add up " + " and ".join(str(x) for x in rng.integers(2, 999, j)) + "." for j in k]
    good = lambda b: (rng.random(n) < 1/(1+np.exp(-(a-b*k)))).astype(int)
    return pl.concat([pl.DataFrame(dict(prompt=prompts, model=m, good=good(b))) for m, b in ((SMALL, small), (LARGE, large))])

@pytest.fixture(scope="module")
def est(): return D.train(made(), strengths=(3.,))

@settings(max_examples=60, deadline=None)
@given(st.text(max_size=400))
def test_any_text_has_finite_features_and_chances(est, text):
    dense, slots = D.features(text)
    assert np.isfinite(dense).all() and all(0 <= s < 1 << D.BITS for s in slots)
    p = est.chances(text)
    assert np.isfinite(p).all() and ((p >= 0) & (p <= 1)).all()
    assert 0 < rules(dense) < 1

@pytest.mark.parametrize("text", ["", " ", "9"*5000, "1.2.3.4 ٣٤ ² ½ 1e999", "\ud800", "x"*2_000_000, "{"*9000, "." * 9000, "%s {{x}} ' ; DROP TABLE"])
def test_odd_texts_get_a_choice(est, text):
    c = Router([SMALL, LARGE], est).choose(text[:300_000])
    assert c.model in (SMALL, LARGE) and 0 < c.propensity <= 1 and all(isinstance(v, str) for v in c.meta().values())

@pytest.mark.parametrize("request_", [[], {}, dict(messages=[]), dict(messages=[dict(role="user", content=None)]), dict(messages=[dict(role="user", content=[dict(type="text", text="hi"), dict(type="image_url", image_url=dict(url="x"))])]), [dict(role="system", content="no user")]])
def test_odd_bodies(request_): assert Router([SMALL]).choose(request_).model == SMALL

def test_body_says_what_it_needs():
    n = needs_of(dict(messages=[dict(role="user", content=[dict(type="image_url")])], response_format=dict(type="json_schema"), stream=True, max_completion_tokens=7))
    assert n.can == ("stream", "structured", "vision") and n.tokens == 7
    with pytest.raises(ModelError, match="cannot do vision"): Router(["openai/gpt-3.5-turbo"]).choose(dict(messages=[dict(role="user", content=[dict(type="image_url")])]))

@pytest.mark.parametrize("bad", [dict(quality=float("nan")), dict(tolerance=-.1), dict(latency_ms=-1), dict(cost_usd="x"), dict(quality=2)])
def test_bad_needs(bad):
    with pytest.raises(ModelError): Needs(**bad)

def test_context_is_obeyed():
    r = Router(["openai/gpt-4", LARGE])
    c = r.choose("word " * 12_000)
    assert c.model == LARGE and "too short" in c.candidates[0].out
    with pytest.raises(ModelError, match="no model can serve"): r.choose("word " * 150_000)

def test_looking_does_not_use_up_the_trial_request():
    now = [0.]
    b = Breaker("m", row=1, cool=5, clock=lambda: now[0])
    r = Router([SMALL, LARGE], breakers={SMALL: b})
    b.fail()
    assert r.choose("hello").model == LARGE
    now[0] = 6
    for _ in range(20): assert r.choose("hello").model == SMALL
    assert b.allow() and not b.allow()
    assert r.choose("hello").model == LARGE
    b.ok()
    assert r.choose("hello").model == SMALL

def test_latency_forgets():
    now = [0.]
    l = Live(half_life=10, clock=lambda: now[0])
    assert l.latency_ms is None and l.errors == 0
    l.seen(1000); now[0] = 100; l.seen(10); l.seen(ok=False); l.seen(float("nan"))
    assert 10 <= l.latency_ms < 12 and .3 < l.errors < .35

def test_cheapest_good_enough_and_ties(est):
    r = Router([LARGE, SMALL], est)
    for k in range(1, 9):
        c = r.choose("Please add up " + " and ".join("77" for _ in range(k)) + ".")
        fit = [x for x in c.candidates if not x.out]
        top = max(x.p_good for x in fit)
        assert c.cost == min(x.cost_usd for x in fit if x.p_good >= top-.05) and set(c.order) | {c.model} == {LARGE, SMALL}
    assert r.choose("hi", Needs(quality=1.)).model == max(r.choose("hi").candidates, key=lambda x: x.p_good).model

def test_a_model_without_outcomes_is_said_to_be_guessed(est):
    c = Router([SMALL, LARGE, "openai/gpt-4"], est).choose("hi")
    assert {x.model: x.basis for x in c.candidates} == {SMALL: "learned", LARGE: "learned", "openai/gpt-4": "rule"}
    assert "guess" in " ".join(Router([SMALL, LARGE]).choose("hi").why)

# the estimate

def test_noise_is_not_dressed_as_judgement():
    "At most about 5 % of pure noise may pass for knowledge"
    rng, useful = np.random.default_rng(3), 0
    base = made(120)
    for _ in range(20): useful += D.train(base.with_columns(good=pl.Series((rng.random(len(base)) < .7).astype(int))), folds=3, strengths=(10.,)).card["useful"]
    assert useful <= 4          # P(more than 4 of 20 at 5 %) is .003

def test_one_prompt_lies_in_one_fold():
    p = [f"q{k}" for k in range(50)]*3
    f = D.fold_of(p, 5)
    assert len(set(zip(p, f))) == 50 and len(set(f)) == 5

def test_same_answers_same_estimate(est):
    again = D.train(made().sample(fraction=1., shuffle=True, seed=5), strengths=(3.,))
    assert again.card["data"] == est.card["data"] and np.allclose(again.chances("Please add up 3."), est.chances("Please add up 3."), atol=1e-6)

@pytest.mark.parametrize("rows, why", [(dict(prompt=["a"], model=["m"]), "lack a column"), (dict(prompt=["a"]*60, model=["m"]*60, good=[1]*60), "too few different"), (dict(prompt=[f"a{k}" for k in range(60)], model=["m"]*60, good=[2]*60), "0 or 1"),
    (dict(prompt=[], model=[], good=[]), "judged answers"), (dict(prompt=["a"]*9, model=["m"]*9, good=[1]*9), "judged answers")])
def test_too_little_is_refused(rows, why):
    with pytest.raises(NoUsableRowsError, match=why): D.train(pl.DataFrame(rows, schema_overrides=dict(prompt=pl.String, model=pl.String, good=pl.Int64) if not rows.get("prompt") else None))

def test_one_sided_outcomes_work():
    e = D.train(pl.DataFrame(dict(prompt=[f"ask {k}" for k in range(80)], model=["m"]*80, good=[1]*80)), strengths=(3.,))
    assert not e.card["useful"] and .9 < e.chances("x")[0] < 1

def test_a_file_that_was_tampered_with_is_refused(est, tmp_path):
    card = est.save(tmp_path)
    whole, arrays = card.read_text(), next(tmp_path.glob("*.npz"))
    kept = arrays.read_bytes()
    for change in (lambda c: c | dict(models=c["models"][::-1]), lambda c: c | dict(arrays="../../etc/passwd"), lambda c: c | dict(features="sha256:other")):
        card.write_text(json.dumps(change(json.loads(whole))))
        with pytest.raises(ModelError): D.load(tmp_path)
    card.write_text(whole[:50])
    with pytest.raises(ModelError, match="card"): D.load(tmp_path)
    card.write_text(whole)
    with np.load(arrays) as z: parts = {k: z[k] for k in z}
    np.savez(arrays, **parts | dict(bias=parts["bias"]+.1))
    with pytest.raises(ModelError, match="not the one"): D.load(tmp_path)
    np.savez(arrays, **parts | dict(bias=np.array([print], object)))
    with pytest.raises(ModelError, match="cannot be read"): D.load(tmp_path)
    arrays.write_bytes(kept[:100])
    with pytest.raises(ModelError, match="cannot be read"): D.load(tmp_path)
    arrays.write_bytes(kept)
    assert D.load(tmp_path).hash == est.hash
    with pytest.raises(ModelError, match="no estimate"): D.load(tmp_path/"none")

def test_embeddings_are_used_and_asked_for():
    rng, n = np.random.default_rng(0), 200
    v = {f"thing {k}": rng.normal(size=8)/3 for k in range(n)}
    good = [int(x[0] > 0) for x in v.values()]
    e = D.train(pl.DataFrame(dict(prompt=list(v), model=["m"]*n, good=good)), vectors=v, strengths=(.1,), embedding="made")
    assert e.card["useful"] and e.chances("x", np.eye(8)[0])[0] > .8 > .2 > e.chances("x", -np.eye(8)[0])[0]
    with pytest.raises(ModelError, match="trained with embeddings: 'made'"): e.chances("x")

# the curve

def test_curve_by_hand():
    "Two requests that only the dear model gets, one both, one neither; scored in the best order"
    c = curve([.9, .8, .1, .2], [0, 0, 1, 0], [1, 1, 1, 0], 1, 10, keep=(1., .5), reps=50)
    q = np.array([.25, .5, .75, .75, .75])
    assert np.isclose(c["APGR"]["router"], ((q[1:]+q[:-1])/2-.25).mean()/.5) and np.isclose(c["APGR"]["oracle"], c["APGR"]["router"])
    assert np.isclose(c["calls saved at 100%"]["router"], .5) and np.isclose(c["dollars saved at 100%"]["router"], 1-(2*10+2)/40)
    assert np.isclose(c["calls saved at 50%"]["random"], 1-(.375-.25)/.5) and np.isclose(c["calls saved at 100%"]["random"], 0)

def test_a_blind_score_is_not_significant_and_equal_scores_are_random():
    rng = np.random.default_rng(0)
    w, s = (rng.random(600) < .6).astype(float), (rng.random(600) < .85).astype(float)
    ps = [curve(rng.random(600), w, s, 1, 9, reps=200, seed=k).p for k in range(20)]
    assert sum(p < .05 for p in ps) <= 4
    assert abs(curve(np.zeros(600), w, s, 1, 9, reps=50)["APGR"]["router"]-.5) < .12

@pytest.mark.parametrize("bad", [([.1, .2], [1, 1], [0, 1]), ([.1], [0], [1]), ([.1, np.nan], [0, 0], [1, 1]), ([.1, .2], [0], [1, 1])])
def test_curve_refuses(bad):
    with pytest.raises(NoUsableRowsError): curve(*bad, 1, 2, reps=10)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.booleans(), st.booleans()), min_size=3, max_size=60), st.sampled_from([.9, .95, .99, 1.]))
def test_tolerance_keeps_what_it_promises(rows, keep):
    score, w, s = (np.array(v, float) for v in zip(*rows))
    score = np.abs(score)               # the dear model never less likely
    t = tolerance_for(score, w, s, keep)
    y = np.where(score > t, s, w)
    assert 0 <= t <= 1 and (y.sum() >= keep*s.sum()-1e-9 or t == 0)

def test_cross_fit_does_not_see_the_answer():
    "Answers that hang on nothing cannot be foretold"
    noise = made(150, small=0., large=0., a=.5)
    seen = cross_fit(noise, folds=3, strengths=(10.,))
    assert len(seen) == len(noise) and abs(np.corrcoef(seen["p"], seen["good"])[0, 1]) < .2

# the log

def test_off_policy_evaluation_reads_the_routers_log(tmp_path):
    "Logged propensities give back what the large model alone would have earned"
    from somaagent.abtest.offpolicy import evaluate
    from somaagent.store.warehouse import Warehouse
    rng, r, rows = np.random.default_rng(0), Router([SMALL, LARGE], epsilon=.4, seed=2), []
    worth = {SMALL: .5, LARGE: .9}
    for k in range(1500):
        c = r.choose("What is the capital of France?" if k % 3 else "A shop sells 12 boxes at $3.50. If 15% go, and 4 more come, what is left, and how much is it in 3 years at 1,200 a day?", id=f"r{k}")
        rows.append(dict(id=f"int_{k:05}", ts=utcnow(), prompt="p", model=c.model if k % 10 else "a fallback", status="ok", meta=c.meta() | dict(passed=str(int(rng.random() < worth[c.model])))))
    with Warehouse(f"chdb://{tmp_path}/wh") as wh:
        wh.insert("interactions", rows)
        log = routed(wh)
    assert len(log) == 1500 and set(log["context"]) == {SMALL, LARGE}
    for m, v in worth.items():
        e = evaluate(log, {"*": m})
        assert e["dr"]["lo"] < v < e["dr"]["hi"] and abs(e.weight-1) < .15

def test_cascade_survives_errors():
    r = Router([SMALL, LARGE])
    async def ask(m, q):
        if m == SMALL: raise ConnectionError("down")
        return "answer"
    async def yes(a): return True
    c = asyncio.run(r.cascade("hi", ask, yes))
    assert c.model == LARGE and c.passed and "ConnectionError" in c.steps[0][1]
    c = asyncio.run(r.cascade("hi", ask, lambda a: False))
    assert not c.passed and c.answer == "answer"
    async def dead(m, q): raise ConnectionError("down")
    with pytest.raises(ModelError, match="no model of the cascade"): asyncio.run(r.cascade("hi", dead, yes))
    async def cancelled(m, q): raise asyncio.CancelledError
    with pytest.raises(asyncio.CancelledError): asyncio.run(r.cascade("hi", cancelled, yes))
