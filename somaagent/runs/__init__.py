"Notebooks as experiments: records, execution, tracking, workflows, reports"
