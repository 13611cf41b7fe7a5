-- One narrow row for every billable call, and two roll-ups that are filled as the rows arrive. A latency of 0 or NULL is unknown and enters no statistic.
CREATE TABLE IF NOT EXISTS model_usage
(
    ts                DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    id                String CODEC(ZSTD(1)) COMMENT 'id of the interaction or of the call',
    kind              LowCardinality(String) DEFAULT 'chat' COMMENT 'chat, judge, embed, train',
    app               LowCardinality(String),
    provider          LowCardinality(String),
    model             LowCardinality(String),
    status            LowCardinality(String) DEFAULT 'ok',
    prompt_tokens     UInt32,
    completion_tokens UInt32,
    cost_usd          Decimal(18, 9),
    latency_ms        Nullable(Float64),
    experiment        LowCardinality(String),
    arm               LowCardinality(String),
    source            LowCardinality(String),
    INDEX ix_id         id         TYPE bloom_filter(0.01) GRANULARITY 4,
    INDEX ix_status     status     TYPE set(8) GRANULARITY 4,
    INDEX ix_experiment experiment TYPE set(64) GRANULARITY 4
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(ts)
ORDER BY (app, model, ts)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS model_performance_hourly
(
    hour              DateTime64(0, 'UTC'),
    app               LowCardinality(String),
    provider          LowCardinality(String),
    model             LowCardinality(String),
    kind              LowCardinality(String),
    calls             SimpleAggregateFunction(sum, UInt64),
    errors            SimpleAggregateFunction(sum, UInt64),
    prompt_tokens     SimpleAggregateFunction(sum, UInt64),
    completion_tokens SimpleAggregateFunction(sum, UInt64),
    latency_mean      AggregateFunction(avg, Nullable(Float64)),
    latency_var       AggregateFunction(varSampStable, Nullable(Float64)),
    latency_quantiles AggregateFunction(quantilesTDigest(0.5, 0.95, 0.99), Nullable(Float64))
)
ENGINE = AggregatingMergeTree
PARTITION BY toYYYYMM(hour)
ORDER BY (hour, app, provider, model, kind)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS model_cost_daily
(
    day               Date,
    app               LowCardinality(String),
    provider          LowCardinality(String),
    model             LowCardinality(String),
    kind              LowCardinality(String),
    calls             SimpleAggregateFunction(sum, UInt64),
    prompt_tokens     SimpleAggregateFunction(sum, UInt64),
    completion_tokens SimpleAggregateFunction(sum, UInt64),
    cost_usd          SimpleAggregateFunction(sum, Decimal(38, 9))
)
ENGINE = AggregatingMergeTree
PARTITION BY toYYYYMM(day)
ORDER BY (day, app, provider, model, kind)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE MATERIALIZED VIEW IF NOT EXISTS model_performance_hourly_mv TO model_performance_hourly AS
SELECT
    toDateTime64(toStartOfHour(ts, 'UTC'), 0, 'UTC')      AS hour,
    app, provider, model, kind,
    count()                                               AS calls,
    countIf(status = 'error')                             AS errors,
    sum(model_usage.prompt_tokens)                        AS prompt_tokens,
    sum(model_usage.completion_tokens)                    AS completion_tokens,
    avgState(nullIf(latency_ms, 0))                       AS latency_mean,
    varSampStableState(nullIf(latency_ms, 0))             AS latency_var,
    quantilesTDigestState(0.5, 0.95, 0.99)(nullIf(latency_ms, 0)) AS latency_quantiles
FROM model_usage
GROUP BY hour, app, provider, model, kind;

CREATE MATERIALIZED VIEW IF NOT EXISTS model_cost_daily_mv TO model_cost_daily AS
SELECT
    toDate(ts, 'UTC')                       AS day,
    app, provider, model, kind,
    count()                                 AS calls,
    sum(model_usage.prompt_tokens)          AS prompt_tokens,
    sum(model_usage.completion_tokens)      AS completion_tokens,
    sum(toDecimal128(model_usage.cost_usd, 9)) AS cost_usd
FROM model_usage
GROUP BY day, app, provider, model, kind;

CREATE VIEW IF NOT EXISTS model_performance AS
SELECT
    hour, app, provider, model, kind,
    sum(h.calls)                                        AS calls,
    sum(h.errors)                                       AS errors,
    sum(h.prompt_tokens)                                AS prompt_tokens,
    sum(h.completion_tokens)                            AS completion_tokens,
    avgMerge(latency_mean)                              AS mean_ms,
    sqrt(varSampStableMerge(latency_var))               AS sd_ms,
    toFloat64(quantilesTDigestMerge(0.5, 0.95, 0.99)(latency_quantiles)[1]) AS p50_ms,
    toFloat64(quantilesTDigestMerge(0.5, 0.95, 0.99)(latency_quantiles)[2]) AS p95_ms,
    toFloat64(quantilesTDigestMerge(0.5, 0.95, 0.99)(latency_quantiles)[3]) AS p99_ms
FROM model_performance_hourly AS h
GROUP BY hour, app, provider, model, kind;

CREATE VIEW IF NOT EXISTS model_cost AS
SELECT
    day, app, provider, model, kind,
    sum(d.calls)             AS calls,
    sum(d.prompt_tokens)     AS prompt_tokens,
    sum(d.completion_tokens) AS completion_tokens,
    sum(d.cost_usd)          AS cost_usd
FROM model_cost_daily AS d
GROUP BY day, app, provider, model, kind;
