"Releasing models: versions with evidence, promotion, rollback."
