DROP VIEW IF EXISTS interactions_with_feedback SYNC;
DROP TABLE IF EXISTS feedback SYNC;
ALTER TABLE interactions DROP INDEX IF EXISTS ix_provider;
ALTER TABLE interactions DROP COLUMN IF EXISTS provider_id;
