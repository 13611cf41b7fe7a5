DROP VIEW IF EXISTS model_quality SYNC;
DROP TABLE IF EXISTS model_quality_ratings SYNC;
DROP TABLE IF EXISTS finetuning_jobs SYNC;
DROP TABLE IF EXISTS ab_test_results SYNC;
