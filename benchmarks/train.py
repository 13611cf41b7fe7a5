"""Training speed and memory: `train.sft` beside plain TRL on rows of uneven length, in one run.

    python benchmarks/train.py [--steps 30] [--batch 16] [--repeats 3] [--sides trl,trl32,ours,packed,trlpack] [--out FILE]
    python benchmarks/train.py --peer-python peer/bin/python     # also PPO beside TRL 1.12's, by benchmarks/ppo.py (about five minutes)
    python benchmarks/train.py --gpu [--steps 30]                # a random-initialised 8 B Llama, LoRA and QLoRA; needs CUDA, 40 GB of disk
    python benchmarks/train.py --gpu --dry                       # the same path with a toy configuration, wherever you are

Every side runs in a process of its own with one thread, from a parquet file to a saved adapter; imports are not counted. They read the same rows, each once; the sides take turns, and the median of the repeats counts. A useful token is a token of
a prompt or an answer that was read in training; padding is not. `TRL` is `trl.SFTTrainer` with `trl.SFTConfig()` as it comes (bf16, activations computed again), but for the batch, the number of
steps and `use_cpu`, without which it does not start here. Seconds are processor seconds on a CPU, which a busy
machine disturbs less than the clock, and seconds of the clock on a GPU. Peak memory is that of the process, with what the imports take in brackets.

FLOPs of a useful token with LoRA (for MFU): 4 for each weight of a matrix (2 forwards, 2 for the gradients of activations; frozen weights have no gradient) and 6 × layers × hidden × mean length for causal
attention. Activations computed again are not counted."""
import argparse, json, os, random, resource, statistics, subprocess, sys, tempfile, time
for k, v in dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", HF_HUB_OFFLINE="1", SOMA_PROGRESS="none").items(): os.environ.setdefault(k, v)
from pathlib import Path

root = Path(__file__).resolve().parents[1]
TITLE = {"ours": "`train.sft`", "packed": "`train.sft`, packed", "trl": "TRL defaults", "trl32": "TRL, fp32, nothing computed again", "trlpack": "TRL defaults + packing"}
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12}   # dense bf16 FLOP/s, makers' data sheets
LLAMA8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=4096, max_position_embeddings=2048)

def uneven(n, seed=0, most=10):
    "Rows of one to `most` questions and their answers; one question is the most frequent"
    import polars as pl
    from somaagent.data.supportdesk import ask, reference
    rng = random.Random(seed)
    def row():
        k = min(most, 1 + int(rng.expovariate(.6)))
        qs = [ask(rng) for _ in range(k)]
        return dict(prompt="\n\n".join(qs), answer="\n\n".join(map(reference, qs)))
    return pl.DataFrame([row() for _ in range(n)])

def make_model(folder, shape, dtype):
    "A random-initialised Llama with the tiny model's tokenizer"
    import torch, transformers
    from somaagent.core.settings import data_dir
    dev = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0); torch.set_default_dtype(dtype)
    with torch.device(dev): net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, pad_token_id=0, bos_token_id=None, eos_token_id=2, tie_word_embeddings=False))
    torch.set_default_dtype(torch.float32)
    net.save_pretrained(folder, safe_serialization=True)
    transformers.AutoTokenizer.from_pretrained(data_dir()/"tiny").save_pretrained(folder)

def side_ours(a, out):
    from somaagent.train.sft import SFTConfig, sft
    r = sft(SFTConfig(base=a.base, method=a.method, rank=16, lr=2e-4, epochs=10**6, budget_tokens=10**12, max_steps=a.steps, batch=a.batch, max_length=a.max_length, layout={"packed": "packed"}.get(a.side, "auto")), a.data, out)
    return dict(tokens=r.tokens, micro_batch=r.plan.micro_batch, layout=r.plan.layout, recompute=r.plan.recompute, loss=r.history[-1]["loss"])

def side_trl(a, out):
    import datasets, peft, torch, transformers, trl
    transformers.utils.logging.set_verbosity_error(); datasets.disable_progress_bars()
    ds = datasets.load_dataset("parquet", data_files=f"{a.data}/train.parquet", split="train", cache_dir=f"{out}/cache")
    say = lambda role: lambda t: [dict(role=role, content=t)]
    ds = ds.map(lambda r: dict(prompt=say("user")(r["prompt"]), completion=say("assistant")(r["answer"])), remove_columns=ds.column_names)
    kw = dict(trl32=dict(bf16=False, gradient_checkpointing=False), trlpack=dict(packing=True)).get(a.side, {})
    if a.method == "qlora": kw["model_init_kwargs"] = dict(device_map={"": 0}, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16))
    batch = max(1, round(a.batch * 160 / a.max_length)) if a.side == "trlpack" else a.batch   # full rows: about as many tokens an update
    args = trl.SFTConfig(output_dir=f"{out}/t", per_device_train_batch_size=batch, max_steps=a.steps, report_to="none", disable_tqdm=True, max_length=a.max_length, use_cpu=not torch.cuda.is_available(), **kw)
    from somaagent.llm.chat import find_model
    t = trl.SFTTrainer(model=find_model(a.base), args=args, train_dataset=ds, peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    t.train(); t.save_model(f"{out}/adapter")
    logs = [l for l in t.state.log_history if "num_tokens" in l]
    return dict(tokens=int(logs[-1]["num_tokens"]), loss=logs[-1].get("loss"), bf16=args.bf16, recompute=args.gradient_checkpointing)

def child(a):
    "One side; what it took"
    import torch, transformers, trl, peft, datasets, polars
    from trl import SFTTrainer; from somaagent.train import sft as _   # noqa: imports are not counted
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    mb = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    before, c, t = mb(), cpu(), time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        try: res = (side_ours if a.side in ("ours", "packed") else side_trl)(a, out)
        except torch.OutOfMemoryError: res = dict(error="out of memory")
    gpu = torch.cuda.is_available()
    if gpu: torch.cuda.synchronize()
    print("RESULT " + json.dumps(res | dict(cpu=cpu() - c, wall=time.perf_counter() - t, peak_mb=torch.cuda.max_memory_allocated() / 2**20 if gpu else mb(), import_mb=before)))

def run(side, a, data, base="tiny", method="lora"):
    "A side in a process of its own"
    cmd = [sys.executable, "-W", "ignore", __file__, "--side", side, "--data", str(data), "--base", str(base), "--method", method, "--steps", str(a.steps), "--batch", str(a.batch), "--max-length", str(a.max_length)]
    p = subprocess.run(cmd, capture_output=True, text=True)
    line = [l for l in p.stdout.splitlines() if l.startswith("RESULT ")]
    if not line: return dict(error=(p.stderr.strip().splitlines() or ["no output"])[-1][:160])
    return json.loads(line[-1][7:])

def cpu_table(a):
    sides, runs = a.sides.split(","), {}
    with tempfile.TemporaryDirectory() as d:
        rows = uneven(a.rows); rows.write_parquet(f"{d}/train.parquet")
        for k in range(a.repeats):
            for s in sides:
                if k and "error" in runs[s][0]: continue
                runs.setdefault(s, []).append(r := run(s, a, d))
                print(f"  {k+1}/{a.repeats} {s}: {r.get('error') or f'''{r['tokens']/r['cpu']:,.0f} useful tokens per CPU-second'''}", file=sys.stderr, flush=True)
    rate = {s: statistics.median(r["tokens"] / r["cpu"] for r in rs) for s, rs in runs.items() if "error" not in rs[0]}
    if "trl" not in rate: sys.exit(f"TRL did not run: {runs['trl'][0]['error']}")
    print(f"\nLoRA of rank 16 on the tiny model, {a.steps} updates of {a.batch} rows of uneven length, one thread; median of {a.repeats}. TRL {version('trl')}, torch {version('torch')}.\n")
    print("| | useful tokens per CPU-second | beside TRL defaults | CPU-seconds of the job | peak MB (imports) | |\n|---|---|---|---|---|---|")
    for s in sides:
        r = runs[s][0]
        if "error" in r: print(f"| {TITLE[s]} | – | – | – | – | not measured: {r['error']} |"); continue
        med = lambda k: statistics.median(x[k] for x in runs[s])
        print(f"| {TITLE[s]} | {rate[s]:,.0f} | {rate[s]/rate['trl']:.1f}× | {med('cpu'):.1f} | {med('peak_mb'):.0f} ({med('import_mb'):.0f}) | measured |")
    return dict(runs=runs, ratio=rate.get("ours", 0) / rate["trl"])

def version(name):
    from importlib.metadata import version
    return version(name)

def ppo_rows(a):
    "PPO beside TRL 1.12's, by benchmarks/ppo.py"
    print("\n| PPO on the tiny model | samples per CPU-second | |\n|---|---|---|")
    if not a.peer_python:
        for s in ("`train.ppo`", "TRL 1.12's PPOTrainer"): print(f"| {s} | – | not measured: give --peer-python, see benchmarks/ppo.py |")
        return None
    with tempfile.TemporaryDirectory() as d:
        p = subprocess.run([sys.executable, root/"benchmarks/ppo.py", "--peer-python", a.peer_python, "--out", f"{d}/ppo.json", "--seeds", "0", "--sides", "ours,trl", *a.ppo_args.split()], capture_output=True, text=True)
        if p.returncode: print(f"| | – | not measured: {(p.stderr.strip().splitlines() or ['?'])[-1][:160]} |"); return None
        res = json.loads(Path(f"{d}/ppo.json").read_text())
    for j in res["jobs"]: print(f"| {dict(ours='`train.ppo`', trl='TRL 1.12, PPOTrainer').get(j['side'], j['side'])} | {j['samples_per_s']:.1f} | measured, peak {j['peak_mb']:.0f} MB |")
    return res

def flops(shape, length):
    "FLOPs of a useful token, forward and backward with LoRA, and the weights in matrices"
    h, f, n = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = h * shape["num_key_value_heads"] // shape["num_attention_heads"]
    weights = n * (2 * h * h + 2 * h * kv + 3 * h * f) + h * shape["vocab_size"]
    return 4 * weights + 6 * n * h * length, weights

def gpu_table(a):
    "The check for a GPU, or its rehearsal"
    import torch
    cuda = torch.cuda.is_available()
    if not cuda and not a.dry: sys.exit("benchmarks/train.py --gpu needs a CUDA GPU, and there is none here. To rehearse the path with a toy configuration: --gpu --dry")
    shape, name = (TOY if a.dry else LLAMA8B), torch.cuda.get_device_name() if cuda else "no GPU (rehearsal)"
    peak = next((v for k, v in PEAK.items() if k in name), None)
    rows = []
    with tempfile.TemporaryDirectory() as d:
        base = Path(d)/"base"; make_model(base, shape, torch.float32 if a.dry and not cuda else torch.bfloat16)
        uneven(a.rows, most=30).write_parquet(f"{d}/train.parquet")
        if cuda: torch.cuda.empty_cache()
        for method in ("lora", "qlora"):
            for s in ("trl", "ours"):
                why = "QLoRA needs CUDA" if method == "qlora" and not cuda else ""
                rows.append((method, s, dict(error=why) if why else run(s, a, d, base, method)))
    mean = [r["tokens"] / (a.steps * a.batch) for *_, r in rows if "error" not in r]
    per, weights = flops(shape, statistics.mean(mean) if mean else 0)
    print(f"\nRandom-initialised Llama, {weights/1e9:.3g} B weights in matrices, on {name}; {a.steps} updates of {a.batch} rows, {statistics.mean(mean) if mean else 0:.0f} tokens on average; {per:.3g} FLOPs a useful token (4 × weights in matrices + 6 × layers × hidden × length)\n")
    print("| | useful tokens/s | beside TRL | MFU | peak GB | |\n|---|---|---|---|---|---|")
    for method, s, r in rows:
        if "error" in r: print(f"| {method}, {TITLE[s]} | – | – | – | – | not measured: {r['error']} |"); continue
        speed = r["tokens"] / r["wall"]
        trl = next((x["tokens"] / x["wall"] for m, y, x in rows if m == method and y == "trl" and "error" not in x), None)
        mfu = f"{per * speed / peak:.0%}" if peak and not a.dry else "–"
        print(f"| {method}, {TITLE[s]} | {speed:,.0f} | {f'{speed/trl:.1f}×' if trl else '–'} | {mfu} | {r['peak_mb']/1024:.1f} | {'rehearsed, no measurement' if a.dry else 'measured'} |")
    return dict(rows=rows, device=name)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=30); p.add_argument("--batch", type=int, default=16); p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--rows", type=int, help="by default as many as are read once"); p.add_argument("--max-length", type=int, default=1024); p.add_argument("--out")
    p.add_argument("--sides", default="trl,trl32,ours,packed", help="also trlpack"); p.add_argument("--peer-python"); p.add_argument("--ppo-args", default=""); p.add_argument("--gpu", action="store_true"); p.add_argument("--dry", action="store_true")
    p.add_argument("--side"); p.add_argument("--data"); p.add_argument("--base", default="tiny"); p.add_argument("--method", default="lora")
    a = p.parse_args()
    if a.side: return child(a)
    if a.dry: a.steps, a.batch = min(a.steps, 3), min(a.batch, 4)
    a.rows = a.rows or a.steps * a.batch   # one pass: every side reads the same rows
    res = gpu_table(a) if a.gpu else dict(sft=cpu_table(a), ppo=ppo_rows(a))
    if a.out: Path(a.out).write_text(json.dumps(res, indent=1) + "\n")

if __name__ == "__main__": main()
