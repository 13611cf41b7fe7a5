"Evaluation: tasks, judges and paired comparisons."
