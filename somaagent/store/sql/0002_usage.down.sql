DROP VIEW IF EXISTS model_cost SYNC;
DROP VIEW IF EXISTS model_performance SYNC;
DROP VIEW IF EXISTS model_cost_daily_mv SYNC;
DROP VIEW IF EXISTS model_performance_hourly_mv SYNC;
DROP TABLE IF EXISTS model_cost_daily SYNC;
DROP TABLE IF EXISTS model_performance_hourly SYNC;
DROP TABLE IF EXISTS model_usage SYNC;
