"""What Alembic runs: the migrations, on the connection and in the transaction that `upgrade` opened."""

from alembic import context

from service.store.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
