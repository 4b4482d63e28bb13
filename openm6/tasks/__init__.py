"""Tasks: one line of instruction with typed slots says what goes in and what comes out (see `grammar`)."""
