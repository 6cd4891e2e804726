"""Mesh and sharding rules, state and step, checkpoints, the ledger of seconds, the loop."""
