"""Secrets of users, and those that a job's reward functions are given."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "secrets",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_secrets_user_id_users", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_secrets"),
        sa.UniqueConstraint("user_id", "key", name="uq_secrets_user_id_key"),
    )
    op.create_table(
        "job_secrets",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("secret_id", sa.Integer()),
        sa.Column("sealed", sa.LargeBinary()),
        sa.ForeignKeyConstraint(
            ["version_id"], ["versions.id"], name="fk_job_secrets_version_id_versions", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["secret_id"], ["secrets.id"], name="fk_job_secrets_secret_id_secrets", ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("version_id", "name", name="pk_job_secrets"),
    )
    op.create_index("ix_job_secrets_secret_id", "job_secrets", ["secret_id"])


def downgrade() -> None:
    op.drop_table("job_secrets")
    op.drop_table("secrets")
