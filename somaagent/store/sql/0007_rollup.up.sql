-- What the units of an experiment summed up to, for stretches of time that are over: a segment is one such stretch, written once and never changed.
-- A manifest names the segments that count, and what they were made of; it is one row, so it changes in one step. Segments that no manifest names are waste.
CREATE TABLE IF NOT EXISTS ab_rollup
(
    segment  String COMMENT 'id of the stretch of time',
    arm      LowCardinality(String),
    unit     UInt64 COMMENT 'xxHash64 of the unit',
    member   UInt64 COMMENT 'xxHash64 of unit and arm',
    requests UInt64,
    s0  Float64, s1  Float64, s2  Float64, s3  Float64, s4  Float64, s5  Float64, s6  Float64, s7  Float64, s8  Float64, s9  Float64,
    s10 Float64, s11 Float64, s12 Float64, s13 Float64, s14 Float64, s15 Float64, s16 Float64, s17 Float64, s18 Float64, s19 Float64
)
ENGINE = MergeTree
PARTITION BY segment
ORDER BY member
SETTINGS non_replicated_deduplication_window = 1000, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS ab_manifests
(
    experiment LowCardinality(String),
    question   String COMMENT 'hash of what was summed up: columns, population, start',
    version    UInt64 COMMENT 'the highest counts',
    ts         DateTime64(3, 'UTC'),
    body       String CODEC(ZSTD(1)) COMMENT 'JSON: segments with their times, rows and check sums; caps'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (experiment, question)
SETTINGS non_replicated_deduplication_window = 1000, fsync_after_insert = 1;
