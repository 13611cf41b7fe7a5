"The sample log is what its generator writes, and its truth holds"
import gzip, json

from somaagent.core.settings import data_dir
from somaagent.data.supportdesk import BROKEN, POLICY, WEIGHTS, corpus, reference, traffic, truth, write_sample

LOG = data_dir() / "support_desk" / "traffic.jsonl.gz"


def rows():
    for line in gzip.open(LOG):
        try: r = json.loads(line)
        except ValueError: continue
        if isinstance(r, dict) and not r["id"].endswith("x"): yield r


def test_shipped_log_is_what_the_generator_writes(tmp_path):
    assert write_sample(tmp_path / "again.jsonl.gz").read_bytes() == LOG.read_bytes()


def test_truth_in_meta_is_derivable_from_the_prompt():
    n = 0
    for r in rows():
        t = truth(r["prompt"]); n += 1
        assert t is not None and t.category == r["category"], r["prompt"]
        assert {k: r["meta"][k] for k in t.meta()} == t.meta()
        assert r["meta"]["truth_reference"] == reference(t)
    assert n > 6_000


def test_right_answers_say_the_key_of_their_outcome_and_of_no_other():
    for r in rows():
        t, low = truth(r["prompt"]), r["meta"]["truth_reference"].lower()
        assert t.key in low and t.step_key in low and (t.ref or t.place).lower() in low
        assert not [o.key for o in POLICY[t.category] if o.name != t.outcome and "{" not in o.key and o.key in low]


def test_every_kind_of_damage_is_there_and_every_category():
    lines = traffic()
    kinds = dict(broken_json=lambda l: not l.endswith((b"}", b"]")), not_an_object=lambda l: l.startswith(b"["), bad_utf8=lambda l: b"\xe9" in l, nul_byte=lambda l: b"\\u0000" in l,
        missing_prompt=lambda l: b'"prompt":' not in l and l.startswith(b"{"), prompt_is_number=lambda l: b'"prompt": 42,' in l, negative_tokens=lambda l: b'"completion_tokens": -7' in l,
        tokens_is_text=lambda l: b'"many"' in l, bad_timestamp=lambda l: b'"yesterday"' in l, future_timestamp=lambda l: b'"2126-' in l, rating_out_of_range=lambda l: b'"rating": 11' in l, cost_is_text=lambda l: b'"a lot"' in l)
    assert set(kinds) == set(BROKEN)
    assert [k for k, f in kinds.items() if not any(map(f, lines))] == []
    assert {r["category"] for r in rows()} == set(WEIGHTS)


def test_pre_training_shares_no_message_with_the_log():
    seen = {r["prompt"].lower() for r in rows()}
    assert not [d for d in corpus(4000) if d[0]["content"].lower() in seen]
