"""Revisions have a note, and say for how many steps the functions before them are scored on."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("revisions") as table:
        table.add_column(sa.Column("note", sa.Text()))
        table.add_column(sa.Column("compared_steps", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    with op.batch_alter_table("revisions") as table:
        table.drop_column("compared_steps")
        table.drop_column("note")
