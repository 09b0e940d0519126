"""One module for each system: how it enqueues and drains, in its own words."""
