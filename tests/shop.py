"""A small application: orders, and an outbox that handlers write into."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Integer, String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session, relationship


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "shop_order"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    customer: Mapped[str] = mapped_column(String(100))
    total: Mapped[int] = mapped_column(Integer, default=0)
    lines: Mapped[list[OrderLine]] = relationship(back_populates="order", cascade="all, delete-orphan")

    def send_invoice(self, copies: int = 1) -> None:
        object_session(self).add(Letter(text=f"invoice for {self.customer} x{copies}"))

    def __repr__(self) -> str:
        return f"<Order of {self.customer}>"


class OrderLine(Base):
    __tablename__ = "shop_order_line"

    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    article: Mapped[str] = mapped_column(String(100))
    order: Mapped[Order] = relationship(back_populates="lines")


class Letter(Base):
    """The outbox. ``text`` is unique, so that a letter which is written twice is an error."""

    __tablename__ = "shop_letter"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(String(200), unique=True)


def letters(session: Session) -> list[str]:
    return [letter.text for letter in session.query(Letter).order_by(Letter.id)]
