"""What is there for those who want it: each module is imported by name, and nothing else imports it."""

__all__: list[str] = []
