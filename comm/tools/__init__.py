"""Tools around a job: measuring links and launchers, and checking hosts."""
