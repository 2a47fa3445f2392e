"""A comparison of losses: its plan, its trainings' processes, tables and figures."""
