DROP VIEW IF EXISTS quarantine_open SYNC;
DROP TABLE IF EXISTS quarantine_fixes SYNC;
ALTER TABLE quarantine DROP COLUMN IF EXISTS whole;
