"A/B tests whose answer holds: design, assignment, estimation, decision."
