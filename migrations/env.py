"""Run the revisions with the ``alembic`` command, for those who work on future_jobs; see ``alembic.ini``."""

import os
from logging.config import fileConfig

from alembic import context
from alembic.util import CommandError
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool

from future_jobs import schema

WAYS = "name the database: `-x url=...`, the environment variable FUTURE_JOBS_URL, or sqlalchemy.url in alembic.ini"


def find_url() -> str:
    """Return the database's URL from the first place that has one."""
    given = context.get_x_argument(as_dictionary=True).get("url")
    url = given or os.environ.get("FUTURE_JOBS_URL") or context.config.get_main_option("sqlalchemy.url")
    if not url:
        raise CommandError(WAYS)
    return url


def run_offline() -> None:
    """Write the SQL instead of running it."""
    url = find_url()
    context.configure(url=url, literal_binds=True, **schema.autogenerate_options(make_url(url)))
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run under the upgrade lock, in one transaction where the database has transactional DDL."""
    engine = create_engine(find_url(), poolclass=NullPool)
    with schema.exclusive(engine) as connection:
        context.configure(connection=connection, **schema.autogenerate_options(engine.url))
        with context.begin_transaction():
            context.run_migrations()
        if schema.current(connection) is None:
            schema.version.drop(connection, checkfirst=True)


if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)

if context.is_offline_mode():
    run_offline()
else:
    run_online()
