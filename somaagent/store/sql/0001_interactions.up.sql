-- What an application's users asked and what it answered, one row each; and the rows that could not be read, with the reason.
-- Money is Decimal(18, 9): exact to a billionth of a dollar. Times are UTC to the millisecond. JSON columns hold '' when there is nothing.
CREATE TABLE IF NOT EXISTS interactions
(
    id                String CODEC(ZSTD(1)),
    ts                DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    app               LowCardinality(String),
    user_id           String CODEC(ZSTD(1)),
    session_id        String CODEC(ZSTD(1)),
    prompt            String CODEC(ZSTD(1)),
    answer            String CODEC(ZSTD(1)),
    messages          String CODEC(ZSTD(1)) COMMENT 'JSON list of chat messages',
    model             LowCardinality(String),
    provider          LowCardinality(String),
    category          LowCardinality(String),
    prompt_tokens     UInt32,
    completion_tokens UInt32,
    cost_usd          Decimal(18, 9),
    latency_ms        Nullable(Float64),
    status            LowCardinality(String) DEFAULT 'ok',
    error             String CODEC(ZSTD(1)),
    rating            Nullable(Float64),
    feedback          String CODEC(ZSTD(1)) COMMENT 'JSON object',
    experiment        LowCardinality(String),
    arm               LowCardinality(String),
    source            LowCardinality(String) COMMENT 'id of the import; empty when logged live',
    source_line       UInt64,
    meta              Map(LowCardinality(String), String),
    INDEX ix_id         id         TYPE bloom_filter(0.01) GRANULARITY 1,
    INDEX ix_user       user_id    TYPE bloom_filter(0.01) GRANULARITY 4,
    INDEX ix_session    session_id TYPE bloom_filter(0.01) GRANULARITY 4,
    INDEX ix_source     source     TYPE set(64) GRANULARITY 4,
    INDEX ix_experiment experiment TYPE set(64) GRANULARITY 4,
    INDEX ix_rating     rating     TYPE minmax GRANULARITY 4
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(ts)
ORDER BY (app, ts, id)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS quarantine
(
    ts     DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    source LowCardinality(String) COMMENT 'id of the import',
    file   LowCardinality(String),
    line   UInt64,
    field  LowCardinality(String),
    reason String CODEC(ZSTD(1)),
    raw    String CODEC(ZSTD(1)) COMMENT 'the row as it came, shortened',
    INDEX ix_reason reason TYPE set(64) GRANULARITY 4
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(ts)
ORDER BY (source, line, ts)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;
