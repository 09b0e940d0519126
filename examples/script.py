"""A list of things to do, which reminds you. A plain script; run it in an empty folder.

    python script.py add "Water the plants" 3d      what, when
    python script.py run                            what is due; from cron, or whenever you like
    python script.py run --in 3d                    as if it were three days from now
    python script.py done 1                         no more reminders
    python script.py list

A time is a duration (3d, 1h30m) or a local time (2027-01-31T09:00).
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from future_jobs import ScheduledJob, Scheduler, Status, create_tables, current_job
from future_jobs.times import resolve

engine = create_engine("sqlite:///things.db")


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    is_done: Mapped[bool] = mapped_column(default=False)

    def remind(self) -> None:
        """Remind now, and again tomorrow, until it is done."""
        job = current_job()
        if self.is_done or job is None:
            return
        print(f"{self.id}: {self.text}")
        job.reschedule("1d")


def add(scheduler: Scheduler, text: str, when: str) -> None:
    thing = Thing(text=text)
    scheduler.session.add(thing)
    job = scheduler.schedule(when, thing.remind)
    print(f"{thing.id}: {text}; a reminder at {job.run_at.astimezone():%Y-%m-%d %H:%M}")


def done(scheduler: Scheduler, thing_id: int) -> None:
    thing = scheduler.session.get(Thing, thing_id)
    if thing is None:
        raise SystemExit(f"there is no thing {thing_id}")
    thing.is_done = True
    for job in scheduler.session.scalars(scheduler.jobs_for(thing)):
        scheduler.cancel(job)


def show(scheduler: Scheduler) -> None:
    for thing in scheduler.session.scalars(select(Thing).order_by(Thing.id)):
        waiting = scheduler.jobs_for(thing).where(ScheduledJob.status == Status.SCHEDULED)
        times = [f"{job.run_at.astimezone():%Y-%m-%d %H:%M}" for job in scheduler.session.scalars(waiting)]
        print(f"{thing.id}: {thing.text}; {'done' if thing.is_done else ', '.join(times)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Things to do, with reminders.")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="add a thing")
    adding.add_argument("text")
    adding.add_argument("when", help="such as 3d, 1h30m or 2027-01-31T09:00")
    running = commands.add_parser("run", help="remind of what is due")
    running.add_argument("--in", dest="later", default="0s", help="as if so much time had passed")
    commands.add_parser("done", help="a thing is done").add_argument("id", type=int)
    commands.add_parser("list", help="show all things")
    given = parser.parse_args()

    Base.metadata.create_all(engine)
    create_tables(engine)
    with Session(engine) as session:
        scheduler = Scheduler(session)
        if given.command == "add":
            add(scheduler, given.text, given.when)
        elif given.command == "done":
            done(scheduler, given.id)
        elif given.command == "list":
            show(scheduler)
        else:
            scheduler.run_due(now=resolve(given.later, now=datetime.now(UTC), timezone=None))
        session.commit()


if __name__ == "__main__":
    import script  # by its name: as __main__.Thing no other process would find what the jobs are about

    script.main()
