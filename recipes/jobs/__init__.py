"""Three real jobs, each one command from a file to a report."""
