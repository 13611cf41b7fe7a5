-- Who met which arm, when first, and with what probability: one row per experiment, unit and arm. The same exposure written twice does no harm: readers take the earliest.
CREATE TABLE IF NOT EXISTS ab_exposures
(
    ts         DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    experiment LowCardinality(String),
    unit       String CODEC(ZSTD(1)) COMMENT 'user, session or request, as the experiment says',
    arm        LowCardinality(String),
    propensity Float64 DEFAULT 1 COMMENT 'probability of this arm for this unit at that time',
    reason     LowCardinality(String) DEFAULT 'hash' COMMENT 'hash, override, random or bandit',
    revision   UInt32 COMMENT 'of the experiment that assigned it'
)
ENGINE = MergeTree
ORDER BY (experiment, unit, ts)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;
