-- What people made of an answer, event by event, whenever it arrives; and interactions with it. The latest event of a rater and kind counts, all are kept.
-- An event speaks for a row when it comes from the row's own user, from nobody in particular, or from a reviewer (trusted): a stranger's does not.
ALTER TABLE interactions ADD COLUMN IF NOT EXISTS provider_id String MATERIALIZED meta['provider_id'];

ALTER TABLE interactions ADD INDEX IF NOT EXISTS ix_provider provider_id TYPE bloom_filter(0.01) GRANULARITY 4;

CREATE TABLE IF NOT EXISTS feedback
(
    id             String COMMENT 'follows from the content: the same event is stored once',
    version        UInt32 COMMENT 'grows when the event finds its interaction',
    ts             DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    kind           LowCardinality(String) COMMENT 'rating, thumbs, edit, regenerated, engagement, outcome, …',
    user_id        String CODEC(ZSTD(1)) COMMENT 'who says so; empty where nobody knows',
    trusted        Bool COMMENT 'a reviewer, who may speak for rows of others',
    number         Float64 COMMENT 'of a rating: stars',
    value          String CODEC(ZSTD(1)) COMMENT 'JSON object, as it enters the feedback of the interaction',
    interaction_id String CODEC(ZSTD(1)) COMMENT 'empty while it is not known',
    matched_by     LowCardinality(String) COMMENT 'id, provider, trace or session',
    provider_id    String CODEC(ZSTD(1)),
    trace_id       String CODEC(ZSTD(1)),
    session_id     String CODEC(ZSTD(1)),
    source         LowCardinality(String),
    source_line    UInt64,
    INDEX ix_interaction interaction_id TYPE bloom_filter(0.01) GRANULARITY 4
)
ENGINE = ReplacingMergeTree(version)
ORDER BY id
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;

CREATE VIEW IF NOT EXISTS interactions_with_feedback AS
WITH
latest AS
(
    SELECT f.interaction_id AS of, f.user_id AS rater, f.kind AS kind,
        argMax((f.ts, f.id, f.trusted, f.number, f.value), (f.ts, f.id)) AS said
    FROM feedback AS f FINAL
    WHERE f.interaction_id != ''
    GROUP BY of, rater, kind
),
voices AS
(
    SELECT of, arrayReverseSort(x -> (x.4, x.5), groupArray((kind, rater, said.3 AS trusted, said.1 AS at, said.2 AS event, said.4 AS number, said.5 AS value))) AS v
    FROM latest GROUP BY of
)
SELECT
    i.id AS id, i.ts AS ts, i.app AS app, i.user_id AS user_id, i.session_id AS session_id, i.prompt AS prompt, i.answer AS answer, i.messages AS messages,
    i.model AS model, i.provider AS provider, i.category AS category, i.prompt_tokens AS prompt_tokens, i.completion_tokens AS completion_tokens,
    i.cost_usd AS cost_usd, i.latency_ms AS latency_ms, i.status AS status, i.error AS error,
    arrayFilter(x -> x.2 IN ('', i.user_id) OR x.3, w.v) AS heard,
    arrayMap(x -> x.6, arrayFilter(x -> x.1 = 'rating', heard)) AS stars,
    multiIf(empty(stars), i.rating, i.rating IS NULL OR arrayExists(x -> x.1 = 'rating' AND x.2 IN ('', i.user_id), heard), arrayAvg(stars), (arraySum(stars) + i.rating) / (length(stars) + 1)) AS rating,
    arrayConcat(arrayFlatten(arrayMap(x -> JSONExtractKeysAndValuesRaw(x.7), heard)), if(empty(heard), [], JSONExtractKeysAndValuesRaw(i.feedback))) AS said,
    if(empty(said) OR empty(heard), i.feedback, concat('{', arrayStringConcat(arrayMap(x -> concat(toJSONString(x.1), ': ', x.2), arrayFilter((x, n) -> indexOf(said.1, x.1) = n, said, arrayEnumerate(said))), ', '), '}')) AS feedback,
    i.experiment AS experiment, i.arm AS arm, i.source AS source, i.source_line AS source_line, i.meta AS meta, length(w.v) AS feedback_events
FROM interactions AS i
LEFT JOIN voices AS w ON w.of = i.id;
