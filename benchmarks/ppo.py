"""PPO beside the last TRL that had it (1.12): the same task, model, settings, number of samples and seeds, in one run.

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0 peft==0.21.2
    python benchmarks/ppo.py --peer-python peer/bin/python --out experiments/ppo_peer.json

The task: answer questions to a support desk so that the answer names the order of the question (4 points), ends with the desk's greeting (3) and takes at most 18 words (3, less .3 for each word
more): 10 at best, counted by a line of Python. Start and reference is the shipped tiny model. Both sides learn by LoRA on every linear layer from the same prompts, with the same learning rate, clip, price
of divergence, passes and minibatches; each side of each seed runs in a process of its own with one thread. `ours` has these settings, `defaults` is `PPOConfig()` as it comes, and `trl` is TRL's PPOTrainer with
a value network that is trained whole, as its documentation does; `rloo` is the REINFORCE leave-one-out of the TRL that is a dependency here, by `train.prefer`. All final policies are measured by the same code on prompts that nobody learned from: reward of greedy and of sampled answers, and divergence
from the reference. Seconds are CPU seconds of the job after imports, which a busy machine disturbs less than the clock."""
import argparse, gzip, json, os, random, re, resource, shutil, subprocess, sys, tempfile, time
for k in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"): os.environ[k] = {"OMP_NUM_THREADS": "1"}.get(k, "false")
os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path

root = Path(__file__).resolve().parents[1]
order = re.compile(r"\bfw-\d{4}\b", re.I)
LENGTH, SCALE, MIDDLE = 64, 2.5, 5.   # longest answer in tokens; the score that is learned from is (points - MIDDLE)/SCALE

def points(prompts, answers, rows=None):
    "0 to 10: the right order is named, the greeting is at the end, and nothing is said twice"
    def one(q, a):
        named = {x.upper() for x in order.findall(a)} == {order.search(q).group().upper()}
        return 4.*named + 3.*a.rstrip().endswith("Kind regards, Fernwell") + max(0., 3-.3*max(0, len(a.split())-18))
    return [one(q, a) for q, a in zip(prompts, answers)]

def score(prompts, answers, rows=None): return [(x-MIDDLE)/SCALE for x in points(prompts, answers)]

def prompts(n=600, held=200):
    "Questions of the sample traffic that name one order, in a fixed shuffle: to learn from, and held out"
    seen = set()
    with gzip.open(root/"data/support_desk/traffic.jsonl.gz", "rt", errors="replace") as f:
        for line in f:
            try: q = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError): continue
            if isinstance(q, str) and len(order.findall(q)) == 1 and len(q) < 200: seen.add(q)
    found = sorted(seen); random.Random(0).shuffle(found)
    return found[held:held+n], found[:held]

def ours(a, ask, kind):
    "Our PPO; `separate` with a critic of its own, otherwise as `ours`"
    import peft, polars as pl, torch, transformers
    from somaagent.train.ppo import PPOConfig, ppo
    torch.set_num_threads(1)
    same = dict(lr=2e-3, minibatch=32, epochs=2, beta=.05, kl_target=None, scale_reward="none", missing_eos_penalty=1.) if kind != "defaults" else {}
    cfg = PPOConfig(base=a.model, updates=a.updates, samples=a.samples, max_new_tokens=LENGTH, seed=a.seed, threads=1, critic="separate" if kind == "separate" else "shared", **same)
    t0, w0 = time.process_time(), time.perf_counter()
    res = ppo(cfg, pl.DataFrame(dict(prompt=ask)), score if kind != "defaults" else points, f"{a.child_out}/job")
    cpu, wall = time.process_time()-t0, time.perf_counter()-w0
    raw = (lambda x: x*SCALE+MIDDLE) if kind != "defaults" else (lambda x: x)
    return dict(cpu=cpu, wall=wall, model=res.model_dir, history=[dict(reward=raw(h["reward"]), kl=h["kl_k1"], clipped=h["clipped"]) for h in res.history])

def rloo(a, ask, kind):
    "TRL's REINFORCE leave-one-out, of the version this project runs on: four answers to each of a quarter of the prompts"
    import datasets, peft, polars as pl, torch, transformers, trl
    from somaagent.train.prefer import PreferConfig, prefer
    torch.set_num_threads(1)
    t0, w0 = time.process_time(), time.perf_counter()
    cfg = PreferConfig(method="rloo", base=a.model, steps=a.updates, batch=a.samples, per_prompt=4, lr=2e-3, beta=.05, max_new_tokens=LENGTH, seed=a.seed, threads=1)
    res = prefer(cfg, pl.DataFrame(dict(prompt=ask)), f"{a.child_out}/job", score)
    return dict(cpu=time.process_time()-t0, wall=time.perf_counter()-w0, model=res.model_dir, history=[dict(reward=h["reward"]*SCALE+MIDDLE) for h in res.history])

def told(tok, keep):
    "A line of Python in the shape that TRL wants of a reward model"
    import torch
    from types import SimpleNamespace
    class Body(torch.nn.Module):
        def forward(self, input_ids, **kw): return SimpleNamespace(hidden_states=[input_ids])
    class Reward(torch.nn.Module):
        base_model_prefix = "body"
        def __init__(self): super().__init__(); self.body = Body()
        def score(self, ids):
            texts = tok.batch_decode(ids)
            q = [t.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for t in texts]
            s = [t.split("<|im_start|>assistant\n")[1].split("<|im_end|>")[0].replace(tok.pad_token, "").strip() for t in texts]
            keep.append(sum(points(q, s))/len(q))
            return torch.tensor(score(q, s))[:, None, None].expand(-1, ids.shape[1], 1)
    return Reward()

def trl(a, ask, kind):
    "TRL's PPO"
    import datasets, peft, torch, transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    transformers.utils.logging.set_verbosity_error(); datasets.disable_progress_bars(); torch.set_num_threads(1)
    t0, w0, keep = time.process_time(), time.perf_counter(), []
    tok = transformers.AutoTokenizer.from_pretrained(a.model, padding_side="left")
    text = [tok.apply_chat_template([dict(role="user", content=q)], tokenize=False, add_generation_prompt=True) for q in ask]
    rows = datasets.Dataset.from_dict(dict(input_ids=tok(text, add_special_tokens=False)["input_ids"]))
    policy = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    torch.manual_seed(a.seed)
    value = transformers.AutoModelForSequenceClassification.from_pretrained(a.model, num_labels=1, dtype=torch.float32)
    torch.nn.init.zeros_(value.score.weight)
    args = PPOConfig(output_dir=f"{a.child_out}/job", seed=a.seed, total_episodes=a.updates*a.samples, per_device_train_batch_size=a.samples, gradient_accumulation_steps=1, num_mini_batches=max(1, a.samples//32),
        num_ppo_epochs=2, learning_rate=2e-3, lr_scheduler_type="polynomial", lr_scheduler_kwargs=dict(lr_end=2e-4, power=1.), weight_decay=0., response_length=LENGTH, stop_token="eos", temperature=1.,
        missing_eos_penalty=1., kl_coef=.05, cliprange=.2, vf_coef=.1, cliprange_value=.2, gamma=1., lam=.95, num_sample_generations=0, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_steps=1, dataloader_pin_memory=False)
    lora = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0., target_modules="all-linear", task_type="CAUSAL_LM")
    t = PPOTrainer(args=args, processing_class=tok, model=policy, ref_model=None, reward_model=told(tok, keep), value_model=value, train_dataset=rows, eval_dataset=rows.select([0]), peft_config=lora)
    t.remove_callback(transformers.trainer_callback.PrinterCallback)
    t.train()
    dest = f"{a.child_out}/model"
    t.model.policy.merge_and_unload().save_pretrained(dest); tok.save_pretrained(dest)
    log = [h for h in t.state.log_history if "objective/kl" in h]
    return dict(cpu=time.process_time()-t0, wall=time.perf_counter()-w0, model=dest, history=[dict(reward=r, kl=h["objective/kl"], clipped=h["policy/clipfrac_avg"]) for r, h in zip(keep, log)])

def child(a):
    "One job, in this process; what came of it as JSON"
    ask = json.loads(Path(a.child_out, "prompts.json").read_text())
    got = dict(trl=trl, rloo=rloo).get(a.child, ours)(a, ask, a.child)
    import transformers, torch
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    if a.child in ("trl", "rloo"): import trl as t; versions["trl"] = t.__version__
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3
    Path(a.child_out, "got.json").write_text(json.dumps(got | dict(peak_mb=peak, versions=versions)))

def examine(folder, ask, reps=2):
    "A policy on held-out prompts: points of greedy and of sampled answers, divergence from the reference (sum over the answer, nats)"
    import torch
    from somaagent.llm.chat import load_model
    from somaagent.train.actor import ActorCritic
    from somaagent.train.policy import kl_estimate
    m = load_model("tiny", folder) if folder else load_model("tiny")
    greedy = points(ask, [c.text for c in m.generate(ask, max_new_tokens=LENGTH)])
    pol, ref = ActorCritic(m), ActorCritic(load_model("tiny"))
    pts, kls = [], []
    for k in range(reps):
        ro = pol.rollout(pol.encode(ask), LENGTH, 1., seed=10_000+k)
        pts += points(ask, ro.texts)
        with torch.no_grad():
            for i in range(0, len(ro), 50):
                e, r = (x.evaluate(ro.take(range(i, i+50))) for x in (pol, ref))
                kls += ((e["logp"]-r["logp"])*e["mask"]).sum(1).tolist()
    mean = lambda x: sum(x)/len(x)
    return dict(greedy=mean(greedy), sampled=mean(pts), kl=mean(kls))

def job(a, kind, seed, ask, python):
    "Run one side of one seed in a process of its own"
    with tempfile.TemporaryDirectory(prefix="soma-ppo-") as tmp:
        Path(tmp, "prompts.json").write_text(json.dumps(ask[0]))
        cmd = [python, __file__, "--child", kind, "--child-out", tmp, "--seed", str(seed), "--updates", str(a.updates), "--samples", str(a.samples), "--model", str(root/"data/tiny")]
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode: sys.exit(f"{kind}, seed {seed}: failed\n{r.stderr[-3000:]}")
        got = json.loads(Path(tmp, "got.json").read_text())
        got |= dict(side=kind, seed=seed, samples_per_s=a.updates*a.samples/got["cpu"]) | examine(got.pop("model"), ask[1])
    got["history"] = [{k: round(v, 3) for k, v in h.items()} for h in got["history"]]
    got = {k: round(v, 3) if isinstance(v, float) else v for k, v in got.items()}
    print(f"{kind:9} seed {seed}: held-out reward {got['greedy']:5.2f} greedy {got['sampled']:5.2f} sampled, KL {got['kl']:5.2f}, {got['cpu']:6.1f} CPU s, {got['wall']:6.1f} s, {got['samples_per_s']:5.1f} samples/CPU s, {got['peak_mb']:5.0f} MB", flush=True)
    return got

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peer-python", help="python of an environment with trl 1.12; without it only our side runs")
    p.add_argument("--seeds", default="0,1,2"); p.add_argument("--updates", type=int, default=25); p.add_argument("--samples", type=int, default=64)
    p.add_argument("--sides", default="ours,trl,rloo,defaults"); p.add_argument("--out", help="JSON of everything, for the notebook")
    for k in ("child", "child-out", "model"): p.add_argument(f"--{k}", help=argparse.SUPPRESS)
    p.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return child(a)
    if a.peer_python is None: a.sides = a.sides.replace(",trl", "")
    if a.peer_python and not shutil.which(a.peer_python): sys.exit(f"no such python: {a.peer_python} – make the environment as the head of this file says")
    ask = prompts(); base = examine(None, ask[1])
    print(f"{len(ask[0])} prompts, {len(ask[1])} held out; reference: {base['greedy']:.2f} greedy, {base['sampled']:.2f} sampled", flush=True)
    shown = " ".join(x if x != a.peer_python else "peer/bin/python" for x in sys.argv[1:])
    about, jobs = dict(command=f"python benchmarks/ppo.py {shown}", date=time.strftime("%Y-%m-%d"), task=f"{a.updates} updates of {a.samples} samples", reference={k: round(x, 3) for k, x in base.items()}), []
    if a.out and Path(a.out).exists() and (was := json.loads(Path(a.out).read_text()))["task"] == about["task"]: jobs = was["jobs"]   # go on where a run was stopped
    def keep(): Path(a.out).write_text(json.dumps(about | dict(jobs=sorted(jobs, key=lambda j: (j["seed"], j["side"]))))+"\n")
    for s in a.seeds.split(","):
        for side in a.sides.split(","):
            if any((j["side"], j["seed"]) == (side, int(s)) for j in jobs): continue
            jobs.append(job(a, side, int(s), ask, a.peer_python if side == "trl" else sys.executable))
            if a.out: keep()
    if a.out: keep()
    mean = lambda side, k: sum(x)/len(x) if (x := [j[k] for j in jobs if j["side"] == side]) else float("nan")
    for side in a.sides.split(","): print(f"{side:9} mean: " + ", ".join(f"{k} {mean(side,k):.2f}" for k in ("greedy", "sampled", "kl", "cpu", "samples_per_s", "peak_mb")))
    if "trl" in a.sides:
        for side in [x for x in a.sides.split(",") if x != "trl"]: print(f"{side}: {mean(side,'samples_per_s')/mean('trl','samples_per_s'):.2f} times TRL's samples per CPU second; peak memory {mean(side,'peak_mb')/mean('trl','peak_mb'):.2f} of TRL's")

if __name__ == "__main__": main()
