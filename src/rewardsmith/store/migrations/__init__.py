"""Alembic's scripts, run by `Database.migrate`. A test fails when they and `schema.py` differ."""
