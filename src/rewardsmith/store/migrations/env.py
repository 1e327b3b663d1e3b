"""Runs the migrations on the connection and inside the transaction that `Database.migrate` opened."""

from alembic import context

from rewardsmith.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite cannot alter a column: Alembic copies the table instead
)
context.run_migrations()
