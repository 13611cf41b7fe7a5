"""Turn a language-model application's traffic into a better model, with the proof that it is better

Modules:

- `somaagent.abtest.aggregate`: Counts, means and covariances of every metric and arm, computed where the rows are, in one statement
- `somaagent.abtest.group`: A test that may be looked at, and stopped early, with boundaries that keep its promise at any number of looks
- `somaagent.abtest.quantile`: The latency that 95 % of requests stay under, per arm, and how much it moved, with intervals that know that a user's requests resemble each other
- `somaagent.abtest.rollup`: The report of a long experiment, refreshed in a blink: per-unit sums of the days that are over are kept, and checked before they are believed
- `somaagent.abtest.simulate`: The false-positive rate, power, length and coverage of a rule, measured on traffic where the truth is known
- `somaagent.abtest.stopped`: What the difference really is, when the test stopped because it looked large
- `somaagent.abtest.walk`: How much error each look may use, and the boundaries that follow, exactly, for any number of looks at any times
- `somaagent.abtest.worlds`: Traffic of which the truth is known, thousands of experiments at once
- `somaagent.cli.app`: One command, groups that load when they are used, errors in one line.
- `somaagent.cli.doctor`: What is installed, what is reachable, where each setting came from, and what each missing extra would give.
- `somaagent.cli.hosted`: What a job at OpenAI or Together would cost, asking for it, watching it, and the model it makes.
- `somaagent.cli.improve`: The main job: traffic in, a better model out, with a report that shows whether it is better.
- `somaagent.cli.runs`: What ran, how it ended, and where its report is.
- `somaagent.cli.train`: Training from the command line: submit a job, watch it, read its log, end it, try it again.
- `somaagent.core.errors`: One hierarchy for the whole house: every error names the offending value and the way out.
- `somaagent.core.logs`: Logging that never writes a secret down.
- `somaagent.core.progress`: One call that is a Rich bar in a terminal, a tqdm bar in a notebook, and a plain line in a log.
- `somaagent.core.records`: The five nouns, sortable ids, a clock that tests can stop, and hashes of content.
- `somaagent.core.settings`: One file of typed, validated settings; every value overridable from the environment; every mistake named.
- `somaagent.runs.figures`: Numbers that read well, and charts whose words stay sharp at any width.
- `somaagent.runs.notebook`: A notebook as an experiment: checked parameters, a kernel of its own, and a status that tells the truth.
- `somaagent.runs.record`: What a notebook found, written down so that a report, a registry or the next stage can read it.
- `somaagent.runs.report`: One page per run: what was decided, on what evidence, from which data, at what cost.
- `somaagent.runs.track`: Every run in Weights & Biases: offline, silent and inside the workbench's own folder, until you say otherwise.
- `somaagent.runs.workflow`: Notebooks chained by what they hand on; killed anywhere, the same command goes on.
- `somaagent.store.artifacts`: Files and folders kept under the hash of their content, on disk or in any object store.
- `somaagent.store.cache`: Work that was done once is not done again: bytes by key, on disk or in Redis.
- `somaagent.store.engine`: One process owns an embedded warehouse: the lock, the journal and the inserts that happen exactly once.
- `somaagent.store.migrations`: The warehouse's schema as numbered SQL files that can be applied, undone, and checked against what is really there.
- `somaagent.store.sample`: Generated traffic for the warehouse: to look at dashboards before there are users, and to measure how fast they are.
- `somaagent.store.server`: One small process owns the embedded warehouse, so that many can use it: started by whoever needs it first, gone when nobody does.
- `somaagent.store.state`: What changes its mind: versions, releases, datasets, runs, experiments and imports, in SQLite or PostgreSQL.
- `somaagent.store.warehouse`: Every interaction, and everything that is computed from them, in ClickHouse: embedded, shared between processes, or on a server, behind the same four verbs.
- `somaagent.train.actor`: A language model that can be sampled from, asked how likely its tokens were, and asked what it expects to earn, with its own starting point as the reference.
- `somaagent.train.child`: The process that one training job runs in.
- `somaagent.train.hosted`: Train at a provider without paying twice, losing a job, or telling anybody the key.
- `somaagent.train.job`: One interface to a piece of training, wherever it runs: on this machine, at OpenAI, at Together.
- `somaagent.train.jobs`: Training jobs that are waited for, worked on by one process at a time, and never lost.
- `somaagent.train.openai_jobs`: Fine-tuning jobs at OpenAI, for the accounts that may still have them.
- `somaagent.train.policy`: The arithmetic of proximal policy optimisation, one small function at a time, each held against a slow and obvious version in double precision.
- `somaagent.train.ppo`: Proximal policy optimisation for a language model: sample, score, look back once, take a few clipped steps, stay near the reference, and be able to go on after a kill with the same weights.
- `somaagent.train.prefer`: Four ways to learn from preferences or rewards, behind one job that looks like the others: one config, one folder, one result, and a second start that goes on.
- `somaagent.train.preferences`: Let a model answer each question several times, let a judge say which answer is better, and keep only what the judge would say again.
- `somaagent.train.provider`: What has to be written down before money is spent elsewhere, and what a provider's refusal means.
- `somaagent.train.recipe`: What a model is trained by, as a file that a person can read, a program can check and another process can carry out.
- `somaagent.train.reward`: Learn a score from preferences, and show before anybody optimises it whether it ranks, whether its odds can be believed, and whether it only likes long answers.
- `somaagent.train.rlaif`: Learning from AI feedback as one job: sample, judge, learn a reward, optimise, evaluate against the honest controls, and fall back to the supervised model when anything leaves its bounds.
- `somaagent.train.together_jobs`: Fine-tuning jobs of open models at Together: LoRA or every weight, on answers or on preferences.
- `somaagent.train.worker`: One process per device that carries out jobs, each in a process of its own, and stays in control of it."""

__version__ = "0.1.0"
