"""Orders that are reminded of until they are paid: a Flask application, whose jobs cron runs.

    flask --app flask_app run
    curl -X POST localhost:5000/orders/Ada
    curl -X POST localhost:5000/orders/1/pay
    curl localhost:5000/orders/1

The line for cron, on as many hosts as you like:

    * * * * *  cd /srv/shop && flask --app flask_app run-jobs
"""

from __future__ import annotations

from typing import Any

from flask import Flask, abort
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from future_jobs import ScheduledJob, Scheduler, create_tables, job

engine = create_engine("sqlite:///orders.db")
session = scoped_session(sessionmaker(engine))
scheduler = Scheduler(session, allow=["flask_app."])
app = Flask(__name__)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "order"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    is_paid: Mapped[bool] = mapped_column(default=False)
    reminders: Mapped[int] = mapped_column(default=0)


Base.metadata.create_all(engine)
create_tables(engine)


@job(max_attempts=5, backoff="1m", expires="2d")
def remind(order: Order) -> None:
    """Remind a customer. ``session`` is the job's own here: the reminder is counted once, with the job."""
    if not order.is_paid:
        order.reminders += 1
        session.add(order)


@app.post("/orders/<customer>")
def place(customer: str) -> tuple[dict[str, Any], int]:
    order = Order(customer=customer)
    session.add(order)
    for when in ("3d", "10d"):
        scheduler.schedule(when, remind, content_object=order)
    session.commit()
    return shown(order), 201


@app.post("/orders/<int:order_id>/pay")
def pay(order_id: int) -> dict[str, Any]:
    order = found(order_id)
    order.is_paid = True
    for each in session.scalars(scheduler.jobs_for(order)):
        scheduler.cancel(each)
    session.commit()
    return shown(order)


@app.get("/orders/<int:order_id>")
def look(order_id: int) -> dict[str, Any]:
    return shown(found(order_id))


@app.cli.command("run-jobs")
def run_jobs() -> None:
    """Run what is due."""
    report = scheduler.run_due(ignore_errors=True)
    print(f"{report.complete} complete, {report.failed} failed, {report.expired} expired")


@app.teardown_appcontext
def close(error: BaseException | None) -> None:  # noqa: ARG001
    session.remove()


def found(order_id: int) -> Order:
    return session.get(Order, order_id) or abort(404)


def shown(order: Order) -> dict[str, Any]:
    jobs = session.scalars(scheduler.jobs_for(order).order_by(ScheduledJob.run_at))
    return {
        "id": order.id,
        "customer": order.customer,
        "is_paid": order.is_paid,
        "reminders": order.reminders,
        "jobs": [{"run_at": each.run_at.isoformat(), "status": each.status} for each in jobs],
    }
