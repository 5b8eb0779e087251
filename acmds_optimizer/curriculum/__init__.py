"""Which samples are fed, and when."""
