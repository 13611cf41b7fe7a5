-- A row that was put aside can be mended: it is kept whole, and what became of it is written down beside it.
ALTER TABLE quarantine ADD COLUMN IF NOT EXISTS whole String CODEC(ZSTD(1)) COMMENT 'the row as it came; empty where it was too long to keep';

CREATE TABLE IF NOT EXISTS quarantine_fixes
(
    ts             DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    source         LowCardinality(String),
    line           UInt64,
    outcome        LowCardinality(String) COMMENT 'imported, dismissed, or failed again',
    field          LowCardinality(String),
    reason         String CODEC(ZSTD(1)),
    interaction_id String CODEC(ZSTD(1)),
    note           String CODEC(ZSTD(1))
)
ENGINE = MergeTree
ORDER BY (source, line, ts)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE VIEW IF NOT EXISTS quarantine_open AS
SELECT q.ts AS ts, q.source AS source, q.file AS file, q.line AS line, if(f.tries = 0, q.field, f.field) AS field, if(f.tries = 0, q.reason, f.reason) AS reason,
    q.raw AS raw, q.whole AS whole, f.tries AS tries
FROM (SELECT source, line, min(z.ts) AS ts, argMax(z.file, z.ts) AS file, argMax(z.field, z.ts) AS field, argMax(z.reason, z.ts) AS reason, argMax(z.raw, z.ts) AS raw, argMax(z.whole, z.ts) AS whole FROM quarantine AS z GROUP BY source, line) AS q
LEFT JOIN (SELECT source, line, count() AS tries, max(x.outcome != 'failed') AS closed, argMax(x.field, x.ts) AS field, argMax(x.reason, x.ts) AS reason FROM quarantine_fixes AS x GROUP BY source, line) AS f
    ON f.source = q.source AND f.line = q.line
WHERE f.closed = 0;
