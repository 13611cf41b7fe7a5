"""The gateway: one address for every model, and a record of everything that went through it."""
