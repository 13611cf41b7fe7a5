"""What every room stands on: errors, settings, records, logs, progress."""
