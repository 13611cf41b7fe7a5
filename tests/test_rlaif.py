"RLAIF under faults: killed in several stages it ends with the same weights; a full disk and a judge that dies are clear ends."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import polars as pl, pytest

from somaagent.core.errors import TrainError
from somaagent.train import rlaif as module
from somaagent.train.rlaif import RLAIFConfig, rlaif

CFG = dict(method="ppo", threads=1, answers=2, least=.4, max_new_tokens=16, held_out=6, least_accuracy=0., worst=-9., reward=dict(max_steps=4, rank=4, save_every=2),
    policy=dict(updates=4, samples=8, minibatch=8, rank=4, save_every=1), control=dict(max_steps=2, rank=4))

def brief(prompts, answers, rows): return [3.*("order" in a.lower())-.2*len(a.split()) for a in answers]
def questions(a, b): return pl.DataFrame(dict(prompt=[f"{q} FW-{n}?" for n in range(a, b) for q in ("Where is my order", "Can I cancel order")]))
def run(out, **kw): return rlaif(RLAIFConfig(**CFG | kw), questions(1201, 1211), brief, out, test=questions(1301, 1304))

SCRIPT = f"""import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_rlaif import run
print(run(sys.argv[1]).hash)"""

def start(out): return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1", SOMA_PROGRESS="none"))

def kill_when(p, there, seconds=120):
    "Kill the process as soon as something is there"
    end = time.monotonic()+seconds
    while not there():
        assert p.poll() is None, p.communicate()[1][-800:]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.01)
    p.send_signal(signal.SIGKILL); p.wait()

@pytest.mark.slow
def test_killed_in_two_stages_it_ends_with_the_same_weights(tmp_path):
    calm = run(tmp_path/"calm")
    out = tmp_path/"killed"
    kill_when(start(out), lambda: any((out/"reward_model").glob("**/checkpoint*")) or (out/"reward_model.json").exists())
    assert (out/"judge.json").exists() and not (out/"result.json").exists()
    kill_when(start(out), lambda: (out/"policy"/"checkpoint").exists() or (out/"optimise.json").exists())
    assert not (out/"result.json").exists()
    p = start(out); said, err = p.communicate(timeout=300)
    assert p.returncode == 0, err[-800:]
    assert said.split()[-1] == calm.hash
    a, b = (json.loads((d/"result.json").read_text()) for d in (tmp_path/"calm", out))
    assert a["arms"] == b["arms"] and a["differences"] == b["differences"] and a["sentence"] == b["sentence"]

def test_a_full_disk_is_said_and_the_job_goes_on(tmp_path, monkeypatch):
    real, left = module.write_json, [2]
    def full(path, obj):
        left[0] -= 1
        if left[0] < 0: raise OSError(28, "No space left on device")
        return real(path, obj)
    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(TrainError, match="No space left.*ree space"): run(tmp_path/"job", method="dpo", use_reward_model=False, policy=dict(steps=1, batch=4, rank=4))
    monkeypatch.setattr(module, "write_json", real)
    done = run(tmp_path/"job", method="dpo", use_reward_model=False, policy=dict(steps=1, batch=4, rank=4))
    assert (tmp_path/"job"/"result.json").exists() and done.chosen == "policy"

def test_a_judge_that_dies_half_way_leaves_the_supervised_model(tmp_path):
    calls = []
    def dying(prompts, answers, rows):
        calls.append(len(answers))
        if len(calls) > 1: raise ConnectionError("the judge hung up")
        return brief(prompts, answers, rows)
    r = rlaif(RLAIFConfig(**CFG | dict(use_reward_model=False)), questions(1201, 1211), dying, tmp_path/"job", test=questions(1301, 1304))
    assert r.chosen == "sft" and "hung up" in r.fell_back and (tmp_path/"job"/"judged.parquet").exists()
