-- What the workbench found out: A/B estimates look by look, training jobs, and ratings of models by judges, rubrics and people.
CREATE TABLE IF NOT EXISTS ab_test_results
(
    ts            DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    experiment    LowCardinality(String),
    metric        LowCardinality(String),
    arm           LowCardinality(String),
    control       LowCardinality(String),
    look          UInt32 COMMENT 'number of the look at the data, from 1',
    n_control     UInt64,
    n_arm         UInt64,
    value_control Nullable(Float64),
    value_arm     Nullable(Float64),
    diff          Nullable(Float64) COMMENT 'arm minus control',
    lo            Nullable(Float64),
    hi            Nullable(Float64),
    alpha         Float64,
    p_value       Nullable(Float64),
    method        LowCardinality(String),
    verdict       LowCardinality(String),
    detail        String CODEC(ZSTD(1)) COMMENT 'JSON object',
    INDEX ix_metric metric TYPE set(64) GRANULARITY 4
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(ts)
ORDER BY (experiment, metric, arm, look, ts)
SETTINGS non_replicated_deduplication_window = 1000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS finetuning_jobs
(
    id           String,
    updated_at   DateTime64(3, 'UTC'),
    created_at   DateTime64(3, 'UTC'),
    name         LowCardinality(String),
    method       LowCardinality(String) COMMENT 'sft, reward, ppo, dpo, …',
    provider     LowCardinality(String) DEFAULT 'local',
    base         LowCardinality(String),
    status       LowCardinality(String) COMMENT 'queued, running, succeeded, failed, cancelled',
    dataset_hash String,
    model_hash   String,
    steps        UInt64,
    tokens       UInt64,
    seconds      Float64,
    train_loss   Nullable(Float64),
    val_loss     Nullable(Float64),
    peak_mb      Nullable(Float64),
    cost_usd     Decimal(18, 9),
    config       String CODEC(ZSTD(1)) COMMENT 'JSON object',
    error        String CODEC(ZSTD(1)),
    run          String,
    INDEX ix_status  status       TYPE set(16) GRANULARITY 4,
    INDEX ix_dataset dataset_hash TYPE bloom_filter(0.01) GRANULARITY 4
)
ENGINE = ReplacingMergeTree(updated_at)
ORDER BY id
SETTINGS non_replicated_deduplication_window = 1000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS model_quality_ratings
(
    ts             DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    model          LowCardinality(String),
    version        LowCardinality(String),
    rater          LowCardinality(String) COMMENT 'rubric, judge model, or person',
    metric         LowCardinality(String),
    category       LowCardinality(String),
    interaction_id String CODEC(ZSTD(1)),
    dataset_hash   String CODEC(ZSTD(1)),
    score          Float64,
    max_score      Float64 DEFAULT 1,
    passed         Nullable(Bool),
    run            String CODEC(ZSTD(1)),
    detail         String CODEC(ZSTD(1)) COMMENT 'JSON object',
    INDEX ix_interaction interaction_id TYPE bloom_filter(0.01) GRANULARITY 4,
    INDEX ix_category    category       TYPE set(256) GRANULARITY 4
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(ts)
ORDER BY (model, version, metric, ts)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE VIEW IF NOT EXISTS model_quality AS
SELECT
    model, version, rater, metric, category,
    count()                                        AS n,
    avg(score)                                     AS mean,
    sqrt(varSampStable(toFloat64(score)))          AS sd,
    avg(toFloat64(passed))                         AS pass_rate
FROM model_quality_ratings
GROUP BY model, version, rater, metric, category;
