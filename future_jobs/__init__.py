"""Durable scheduled jobs in your own database, written by your own SQLAlchemy Session."""

from __future__ import annotations
